"""The paper's metrics of saved answers: FID, CLIP directional similarity, CLIP image similarity.

    python -m evaluation.evaluate --split seen --mode both pair instruction
    python -m evaluation.metrics out/eval/seen/* --json out/metrics.json --markdown out/metrics.md
    python -m evaluation.metrics FOLDER … --clip laion/CLIP-ViT-L-14-laion2B-s32B-b82K --features inception

FID (Heusel et al., 2017): how far apart two clouds of pictures lie in the space of a network's features, each
taken for a normal distribution. Ours are the answers and the true outputs of the same queries, the features
Inception's, or CLIP's embeddings where pictures are as small as the toy world's; the table says which.

Directional similarity (Gal et al., 2022; for edits, Brooks et al., 2023, section 4): the cosine between what
happened to the picture and what happened to its caption, in a CLIP that no training has seen:

    cos(E(answer) - E(input), T(output caption) - T(input caption))

Image similarity: cos(E(answer), E(input)). A copy of the input has 1, and no direction.

Beside each of the two stands that of the true output. Intervals hold 95 %, by a bootstrap over the queries.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import backbone
import esm
from disk import atomic_write
from evaluation.evaluate import read_answers
from pictures import check_finite, image_to_tensor, load_image

FEATURES = ("clip", "inception")
TEXTS = ("input", "output", "input_caption", "output_caption")  # of a line of answers.jsonl


# --- The metrics --------------------------------------------------------------------------------------------


def directional_similarity(before: Tensor, after: Tensor, said_before: Tensor, said_after: Tensor) -> Tensor:
    """Cosines (B,) of two changes: of pictures' embeddings (B, E), and of their captions' (B, E). A change of
    nothing has cosine 0."""
    return F.cosine_similarity(after - before, said_after - said_before, dim=-1)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Fréchet's distance of the normal distributions fitted to features (N, d) and (M, d), squared as in FID.

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½). With Σ = XᵀX, the trace of that root is the sum of the singular
    values of X₁X₂ᵀ, or of R₁R₂ᵀ where X = QR: a matrix of the smaller of d and the numbers of pictures.
    """
    apart, roots = 0.0, []
    for sign, features in ((1, one.double()), (-1, other.double())):
        apart = apart + sign * features.mean(0)
        x = (features - features.mean(0)) / (len(features) - 1) ** 0.5
        roots.append(torch.linalg.qr(x, mode="r").R)
    own = sum(root.square().sum() for root in roots)
    common = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    distance = apart.square().sum() + own - 2 * common  # of equal clouds 0, but for a rounding to either side
    return distance.clamp(min=0).item()


def bootstrap(statistic: Callable[[Tensor], float], count: int, draws: int = 500, seed: int = 0) -> Tensor:
    """The statistic of so many draws of the queries with repetition, (draws,); it takes their indices.

    Those of two methods' answers to the same queries are of the same draws: subtract them for the spread of
    a difference.
    """
    g = torch.Generator().manual_seed(seed)
    drawn = [statistic(torch.randint(count, (count,), generator=g)) for _ in range(draws)]
    return torch.tensor(drawn, dtype=torch.float64)


def interval(whole: float, draws: Tensor) -> tuple[float, float]:
    """A 95 % interval of a statistic, of its value for all queries and its bootstrap.

    [ours] 1.96 standard deviations of the draws to either side of that value. Quantiles of the draws would
    not do: a distance grows with every repetition, and nearly all draws lie above it.
    """
    half = 1.96 * draws.std().item()
    return whole - half, whole + half


# --- Features of saved pictures -----------------------------------------------------------------------------


def load_pictures(paths: list[Path]) -> Tensor:
    """(B, 3, H, W) in [-1, 1]. Raises ValueError for pictures of different sizes."""
    pictures = [image_to_tensor(load_image(path)) for path in paths]
    for path, picture in zip(paths, pictures):
        if picture.shape != pictures[0].shape:
            raise ValueError(f"{path}: not of the size of {paths[0]}; pictures must be of one size")
    return torch.stack(pictures)


def inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    """torch-fidelity's Inception: images (B, 3, H, W) in [-1, 1] → features (B, 2048)."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        network = FrechetInceptionDistance(feature=2048).inception.to(device)
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--features inception: {reason}; pip install -r requirements-dev.txt") from None
    return lambda images: network(((images + 1) * 127.5).round().to(torch.uint8))


def embed_all(records: list[dict], folder: Path, clip, tokenizer, features, device, batch: int) -> dict:
    """Embeddings of inputs, truths, answers and captions, (N, E) each, and features for the FID, (N, d).

    Raises ValueError where one is not finite.
    """
    found: dict[str, list[Tensor]] = {}
    for start in tqdm(range(0, len(records), batch), desc=str(folder), unit="batch", mininterval=1):
        rows = records[start : start + batch]
        paths = {
            "input": [folder / row["input"] for row in rows],
            "truth": [folder / row["output"] for row in rows],
        }
        for name, files in (paths | {"answer": [folder / row["answer"] for row in rows]}).items():
            pictures = load_pictures(files).to(device)
            found.setdefault(name, []).append(esm.embed(clip, pictures).cpu())
            if features and name != "input":
                found.setdefault(f"{name} features", []).append(features(pictures).cpu())
        for key in ("input_caption", "output_caption"):
            tokens = tokenizer([row[key] for row in rows]).to(device)
            found.setdefault(key, []).append(clip.encode_text(tokens, normalize=True).float().cpu())
    of = f"{folder}: the embeddings of"
    return {name: check_finite(torch.cat(parts), f"{of} {name}") for name, parts in found.items()}


# --- Folders of answers -------------------------------------------------------------------------------------


@torch.no_grad()
def measure(folder: Path, clip, tokenizer, features, device: torch.device, batch: int) -> dict[str, Any]:
    """The metrics of one folder of answers, each with its interval, and those of the truth."""
    records = read_answers(folder, {"answer", *TEXTS})
    if any(not row["input_caption"] or not row["output_caption"] for row in records):
        raise ValueError(f"{folder}: directional similarity needs both captions of every query")
    if any(not isinstance(row[name], str) for row in records for name in TEXTS):
        raise ValueError(f"{folder}: {', '.join(TEXTS)} must be texts")
    if any(row.get("mode") == "other-pair" for row in records):
        raise ValueError(f"{folder}: mode other-pair has no true outputs to measure against")
    found = embed_all(records, folder, clip, tokenizer, features, device, batch)
    answers, truths = (found.get(f"{name} features", found[name]) for name in ("answer", "truth"))
    n, d = answers.shape
    if n <= d:
        raise ValueError(f"{folder}: {n} answers are too few for an FID on {d} features; give more than {d}")
    said = found["input_caption"], found["output_caption"]
    direction, true_direction = (
        directional_similarity(found["input"], found[name], *said) for name in ("answer", "truth")
    )
    image, true_image = (F.cosine_similarity(found["input"], found[name]) for name in ("answer", "truth"))
    statistics = {
        "fid": lambda i: frechet_distance(answers[i], truths[i]),
        "directional_similarity": lambda i: direction[i].mean().item(),
        "image_similarity": lambda i: image[i].mean().item(),
    }
    result: dict[str, Any] = {"folder": str(folder), "n": n}
    result |= {"split": folder.resolve().parent.name, "mode": records[0].get("mode") or folder.resolve().name}
    for name, statistic in statistics.items():
        result[name] = statistic(torch.arange(n))
        draws = bootstrap(statistic, n)
        result[f"{name}_interval"] = interval(result[name], draws)
        result[f"{name}_draws"] = draws.tolist()
    result["true_directional_similarity"] = true_direction.mean().item()
    result["true_image_similarity"] = true_image.mean().item()
    return result


def markdown(results: list[dict], features: str) -> str:
    """A row for each folder."""
    head = ("split", "mode", "n", f"FID ({features})", "CLIP DirSim", "CLIP image similarity")
    rows = [head, ("---", "---", *["---:"] * 4)]
    for result in results:
        cells = []
        for name in ("fid", "directional_similarity", "image_similarity"):
            low, high = result[f"{name}_interval"]
            cells.append(f"{result[name]:.3f} ({low:.3f} … {high:.3f})")
            if f"true_{name}" in result:
                cells[-1] += f" (truth {result[f'true_{name}']:.3f})"
        rows.append((result["split"], result["mode"], str(result["n"]), *cells))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.metrics",
        description="The paper's metrics of saved answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="with answers.jsonl")
    add("--clip", default=backbone.preset("toy").clip_eval, help="folder or hub id of an open_clip model")
    add("--features", default="clip", choices=FEATURES, help="of the FID: that CLIP's, or Inception's")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--batch", type=int, default=64, help="pictures at a time")
    add("--json", type=Path, metavar="OUT", help="all numbers, those of the bootstrap among them")
    add("--markdown", type=Path, metavar="OUT", help="the table that is printed")
    args = parser.parse_args(argv)
    with backbone.one_line_errors("evaluation.metrics"):
        backbone.check_numbers(args, {(1, math.inf): "batch"})
        for path in filter(None, (args.json, args.markdown)):
            if path.is_dir() or path.name == "answers.jsonl":  # before the time is spent
                raise ValueError(f"{path}: no place for a table")
        device = backbone.pick_device(args.device)
        clip, tokenizer = backbone.load_clip(args.clip, device), backbone.load_clip_tokenizer(args.clip)
        features = inception(device) if args.features == "inception" else None
        common = clip, tokenizer, features, device, args.batch
        results = [measure(folder, *common) for folder in args.folders]
        settings = {"clip": args.clip, "features": args.features}
        table = markdown(results, args.features)
        text = json.dumps({**settings, "results": results}, indent=1, allow_nan=False) + "\n"
        for path, content in ((args.json, text), (args.markdown, table)):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, lambda file, content=content: file.write_text(content, encoding="utf-8"))
        print(table, end="")


if __name__ == "__main__":
    main()
