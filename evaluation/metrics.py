"""The paper's metrics of saved answers: FID and CLIP directional similarity.

    python -m evaluation.evaluate --split seen --mode both pair instruction
    python -m evaluation.metrics out/eval/seen/* --json out/metrics.json
    python -m evaluation.metrics FOLDER … --clip laion/CLIP-ViT-L-14-laion2B-s32B-b82K --features inception

FID (Heusel et al., 2017): how far apart two clouds of pictures lie in the space of a network's features, each
taken for a normal distribution. Ours are the answers and the true outputs of the same queries, the features
Inception's, or CLIP's embeddings where pictures are as small as the toy world's; the table says which.

Directional similarity (Gal et al., 2022; for edits, Brooks et al., 2023, section 4): the cosine between what
happened to the picture and what happened to its caption, in a CLIP that no training has seen:

    cos(E(answer) - E(input), T(output caption) - T(input caption))

Beside it stands that of the true output. Intervals hold 95 %, by a bootstrap over the instructions.
"""

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import backbone
import esm
from disk import write_text
from evaluation.evaluate import read_answers
from pictures import check_finite, load_image, to_bytes, to_panel

BATCH = 64  # pictures at a time


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


def bootstrap(statistic: Callable[[Tensor], float], groups: Sequence[Hashable], draws: int = 500) -> Tensor:
    """The statistic of so many draws of the queries with repetition, (draws,); it takes their indices.

    groups: the instruction of each query. [ours] Whole groups are drawn: answers to one instruction are right
    or wrong together. Those of two methods' answers to the same queries are of the same draws: subtract them
    for the spread of a difference.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    queries = [torch.tensor(each) for each in members.values()]
    g = torch.Generator().manual_seed(0)
    drawn = []
    for _ in tqdm(range(draws), desc="bootstrap", mininterval=2, leave=False):
        picked = torch.randint(len(queries), (len(queries),), generator=g)
        drawn.append(statistic(torch.cat([queries[k] for k in picked])))
    return torch.tensor(drawn, dtype=torch.float64)


def interval(whole: float, draws: Tensor) -> tuple[float, float]:
    """A 95 % interval of a statistic, of its value for all queries and its bootstrap.

    [ours] 1.96 standard deviations of the draws to either side of that value. Quantiles of the draws would
    not do: a distance grows with every repetition, and nearly all draws lie above it.
    """
    half = 1.96 * draws.std().item()
    return whole - half, whole + half


# --- Features of saved pictures -----------------------------------------------------------------------------


def inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    """torch-fidelity's Inception: images (B, 3, H, W) in [-1, 1] → features (B, 2048)."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # of requirements-dev.txt

    network = FrechetInceptionDistance(feature=2048).inception.to(device)
    return lambda images: network(to_bytes(images))


def embed_all(records: list[dict], folder: Path, clip, tokenizer, features, device) -> dict[str, Tensor]:
    """Embeddings of inputs, outputs, answers and captions, (N, E) each, and features for the FID, (N, d).

    Inputs and outputs are cropped to the answers' panel. Raises ValueError where an embedding is not finite.
    """
    found: dict[str, list[Tensor]] = {}
    panel = load_image(folder / records[0]["answer"]).width
    for start in tqdm(range(0, len(records), BATCH), desc=str(folder), unit="batch", mininterval=1):
        rows = records[start : start + BATCH]
        for key in ("input", "output", "answer"):
            pictures = torch.stack([to_panel(load_image(folder / row[key]), panel) for row in rows])
            pictures = pictures.to(device)  # (B, 3, P, P)
            found.setdefault(key, []).append(esm.embed(clip, pictures).cpu())
            if features and key != "input":
                found.setdefault(f"{key} features", []).append(features(pictures).cpu())
        for key in ("input_caption", "output_caption"):
            tokens = tokenizer([row[key] for row in rows]).to(device)
            found.setdefault(key, []).append(clip.encode_text(tokens, normalize=True).float().cpu())
    of = f"{folder}: the embeddings of"
    return {key: check_finite(torch.cat(parts), f"{of} {key}") for key, parts in found.items()}


# --- Folders of answers -------------------------------------------------------------------------------------


@torch.no_grad()
def measure(folder: Path, clip, tokenizer, features, device: torch.device) -> dict[str, Any]:
    """The metrics of one folder of answers, each with its interval and its bootstrap, and the truth's."""
    needed = {"answer", "input", "output", "instruction", "input_caption", "output_caption"}
    records = read_answers(folder, needed)
    if any(not row["input_caption"] or not row["output_caption"] for row in records):
        raise ValueError(f"{folder}: directional similarity needs both captions of every query")
    if any(row.get("mode") == "other-pair" for row in records):
        raise ValueError(f"{folder}: mode other-pair has no true outputs to measure against")
    found = embed_all(records, folder, clip, tokenizer, features, device)
    answers, outputs = (found.get(f"{key} features", found[key]) for key in ("answer", "output"))
    n, d = answers.shape
    if n <= 1.6 * d:  # a bootstrap's draw has 0.63 n different ones
        few = f"{n} answers are too few for an FID on {d} features and its interval"
        raise ValueError(f"{folder}: {few}; give more than {int(1.6 * d)}")
    said = found["input_caption"], found["output_caption"]
    direction, true_direction = (
        directional_similarity(found["input"], found[key], *said) for key in ("answer", "output")
    )
    statistics = {
        "fid": lambda i: frechet_distance(answers[i], outputs[i]),
        "directional_similarity": lambda i: direction[i].mean().item(),
    }
    result: dict[str, Any] = {"folder": str(folder), "n": n}
    result |= {"split": folder.resolve().parent.name, "mode": records[0].get("mode") or folder.resolve().name}
    for name, statistic in statistics.items():
        result[name] = statistic(torch.arange(n))
        draws = bootstrap(statistic, [row["instruction"] for row in records])
        result[f"{name}_interval"] = interval(result[name], draws)
        result[f"{name}_draws"] = draws.tolist()
    result["true_directional_similarity"] = true_direction.mean().item()
    return result


def told_backbone(folder: Path) -> str:
    """The preset that `evaluate.py` noted beside its answers."""
    settings = folder / "settings.json"
    return json.loads(settings.read_text()).get("backbone", "toy") if settings.exists() else "toy"


def table(results: list[dict], features: str) -> str:
    rows = []
    for result in results:
        cells = []
        for name in ("fid", "directional_similarity"):
            low, high = result[f"{name}_interval"]
            cells.append(f"{result[name]:.3f} ({low:.3f} … {high:.3f})")
        truth = f"{result['true_directional_similarity']:.3f}"
        rows.append([f"{result['split']}, {result['mode']}", str(result["n"]), *cells, truth])
    return backbone.markdown(["", "n", f"FID ({features})", "CLIP DirSim", "the truth's"], rows)


@backbone.one_line_errors("evaluation.metrics")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("evaluation.metrics", __doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="with answers.jsonl")
    add("--clip", help="folder or hub id of an open_clip model (default: the answers' preset's)")
    add("--features", default="clip", choices=("clip", "inception"), help="of the FID")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--json", type=Path, metavar="OUT", help="all numbers, those of the bootstrap among them")
    args = parser.parse_args(argv)
    device = backbone.pick_device(args.device)
    args.clip = args.clip or backbone.preset(told_backbone(args.folders[0])).clip_eval
    clip, tokenizer = backbone.load_clip(args.clip, device), backbone.load_clip_tokenizer(args.clip)
    features = inception(device) if args.features == "inception" else None
    results = [measure(folder, clip, tokenizer, features, device) for folder in args.folders]
    if args.json:
        found = {"clip": args.clip, "features": args.features, "results": results}
        write_text(args.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(table(results, args.features), end="")


if __name__ == "__main__":
    main()
