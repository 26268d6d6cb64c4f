"""Exact metrics of saved answers: the toy world's renderer knows the right answer to the pixel.

    python -m evaluation.evaluate --mode both pair instruction
    python -m toy.score out/eval/seen/* --json out/score.json

Nearest-candidate accuracy. Of a query's scene the renderer makes every edit that exists; these pictures and
the input itself are the candidates. An answer is right when the true edit's picture is the nearest to it in
mean squared error over the pixels. Edits that give one and the same picture count as one candidate. A copy of
the input is nearest to the input, and so scores 0. For a mixture of two edits, the candidates are joined by
all edits of its two families.

Beside it the mean absolute error, in units of 0 … 255: inside the edited region (where truth and input differ
by more than 8), outside it, and where the truth shows a face.  Beside each figure stands that of the truth
itself after a trip through the VAE, below whose errors no editor gets.

An answer of mode "other-pair" is measured by the edit that its example shows, on the query's scene, and left
out where that edit cannot be made.

With `--agreement`, the folders hold answers to the same queries in different wordings. For some queries, the
answers in all folders are nearest to one and the same edit: it prints the share of these, and the share where
that edit is the right one.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import backbone
from disk import write_text
from evaluation.evaluate import read_answers
from pictures import image_to_tensor, load_image, tensor_to_image
from toy import world

UNEDITED = "unedited"  # the name of the input among the families


Edit = world.Edit | world.Mixture


# --- One query ----------------------------------------------------------------------------------------------


def candidates(scene: world.Scene, family: str = "") -> tuple[np.ndarray, list[Edit | None]]:
    """All different pictures that one edit makes of the scene, (N, P, P, 3) uint8, the unedited input first;
    and the edit of each, the first in the order of `world.FAMILIES` that makes it, None for the input."""
    pictures = {_pixels(scene).tobytes(): None}
    for edit, edited in world.candidates(scene, family):
        pictures.setdefault(_pixels(edited).tobytes(), edit)
    shape = (len(pictures), world.PANEL, world.PANEL, 3)
    return np.frombuffer(b"".join(pictures), np.uint8).reshape(shape), list(pictures.values())


def _pixels(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.render(scene))  # (P, P, 3) uint8


class Truth:
    """What a query's answers are measured against."""

    def __init__(self, scene: world.Scene, edit: Edit) -> None:
        after = edit.apply(scene)
        self.family = edit.family
        self.pictures, self.edits = candidates(scene, edit.family)
        self.picture = _pixels(after)
        change = np.abs(self.picture.astype(np.int16) - self.pictures[0]).max(axis=-1)
        self.edited = change > world.VISIBLE  # (P, P) bool
        self.face = world.render_classes(after) == world.CLASSES.index("face")  # (P, P) bool

    def score(self, answer: np.ndarray) -> dict:
        """Of one answer (P, P, 3) uint8. An error over an empty region is None."""
        nearest = self.nearest(answer)
        edit, right = self.edits[nearest], self.is_right(nearest)
        family, instruction = (edit.family, edit.instruction) if edit else (UNEDITED, UNEDITED)
        return {
            "family": self.family,
            "nearest": self.family if right else family,
            "nearest_edit": instruction,
            "right": right,
            "candidates": len(self.pictures),
            **{f"mae_{region}": error for region, error in self.errors(answer).items()},
        }

    def nearest(self, answer: np.ndarray | Image.Image) -> int:
        """The index of the candidate nearest to an answer (P, P, 3) uint8, in mean squared error."""
        apart = self.pictures - np.asarray(answer, np.int32)  # whole numbers: ties are the same everywhere
        return int(np.square(apart).sum(axis=(1, 2, 3), dtype=np.int64).argmin())

    def is_right(self, candidate: int) -> bool:
        return candidate > 0 and np.array_equal(self.pictures[candidate], self.picture)

    def errors(self, answer: np.ndarray) -> dict[str, float | None]:
        """Mean absolute error of a picture (P, P, 3) uint8 by region."""
        error = np.abs(answer.astype(np.float32) - self.picture).mean(axis=-1)  # (P, P)
        regions = {"inside": self.edited, "outside": ~self.edited, "face": self.face}
        return {name: float(error[r].mean()) if r.any() else None for name, r in regions.items()}


# --- Folders of answers -------------------------------------------------------------------------------------


def read_queries(folder: Path) -> list[dict]:
    """The answers' lines, each with the `Scene` and the `Edit` that it is measured by."""
    records = []
    for record in read_answers(folder, {"answer", "mode", "scene", "edit"}):
        try:
            told = record["example"]["edit"] if record["mode"] == "other-pair" else record["edit"]
            scene = world.scene_from_json(json.loads(record["scene"]))
            edit = world.edit_from_json(json.loads(told))
        except (KeyError, TypeError):
            raise ValueError(f"{folder}: not answers of the toy world") from None
        if edit.apply(scene) is not None:
            records.append(record | {"scene": scene, "edit": edit})
    if not records:
        raise ValueError(f"{folder}: no example's edit can be made of its query; edit more queries")
    return records


@torch.no_grad()
def reconstruct(vae: nn.Module, picture: np.ndarray) -> np.ndarray:
    """A picture (P, P, 3) uint8 as the VAE gives it back."""
    x = image_to_tensor(Image.fromarray(picture))[None].to(vae.device)
    return np.asarray(tensor_to_image(vae.decode(vae.encode(x).latent_dist.mean).sample[0]))


def score(folder: Path) -> dict:
    """The metrics of one folder: means over its answers with their number, and by family too."""
    queries = read_queries(folder)
    vae = backbone.load_stable_diffusion(backbone.preset("toy").stable_diffusion).vae
    rows = []
    for query in tqdm(queries, desc=str(folder), unit="query", mininterval=1):
        truth = Truth(query["scene"], query["edit"])
        seen = reconstruct(vae, truth.picture)
        floor = {f"vae_{region}": error for region, error in truth.errors(seen).items()}
        floor["vae_right"] = truth.is_right(truth.nearest(seen))
        answer = np.asarray(load_image(folder / query["answer"]))
        rows.append({"answer": query["answer"], **truth.score(answer), **floor})
    families = sorted({row["family"] for row in rows})
    return {
        "folder": str(folder),
        "split": folder.resolve().parent.name,
        "mode": queries[0]["mode"],
        **accuracy(rows),
        "chance": mean(1 / row["candidates"] for row in rows),
        **{key: mean(row[key] for row in rows) for key in rows[0] if key.startswith(("mae_", "vae_"))},
        "families": {name: accuracy([row for row in rows if row["family"] == name]) for name in families},
        "answers": rows,
    }


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None where there are none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def accuracy(rows: list[dict]) -> dict:
    """The share of right answers, with Wilson's 95 % interval."""
    from scipy.stats import binomtest  # here, because it takes a second to import

    right = sum(row["right"] for row in rows)
    interval = binomtest(right, len(rows)).proportion_ci(method="wilson")
    return {"n": len(rows), "accuracy": right / len(rows), "interval": (interval.low, interval.high)}


def agreement(results: list[dict]) -> dict:
    """The share of the queries whose answers in all folders are nearest to one and the same edit, as
    `accuracy`; `right`: those that agree on the right edit. Copies of the input do not agree. Raises
    ValueError where the folders' queries are others."""
    told = [[(row["answer"], row["family"]) for row in result["answers"]] for result in results]
    if any(queries != told[0] for queries in told):
        raise ValueError("--agreement: the folders hold answers to different queries")
    nearest = zip(*([row["nearest_edit"] for row in result["answers"]] for result in results))
    agree = [len({*edits}) == 1 and UNEDITED not in edits for edits in nearest]
    right = [all(row["right"] for row in rows) for rows in zip(*(result["answers"] for result in results))]
    return accuracy([{"right": each} for each in agree]) | {"right": mean(right)}


def tables(results: list[dict]) -> str:
    """One row a folder, and then one a family with the right answers of each folder."""
    head = ["split", "mode", "n", "accuracy, %", "chance, %", "MAE inside", "MAE outside", "MAE face"]
    rows = []
    for result in results:
        shares = result["accuracy"], *result["interval"], result["vae_right"]
        share, low, high, vae = (100 * each for each in shares)
        cells = [f"{share:.1f} ({low:.1f} … {high:.1f}) (VAE {vae:.1f})", f"{100 * result['chance']:.2f}"]
        for region in ("inside", "outside", "face"):
            error, floor = result[f"mae_{region}"], result[f"vae_{region}"]
            cells.append("–" if error is None else f"{error:.1f} (VAE {floor:.1f})")
        rows.append([result["split"], result["mode"], str(result["n"]), *cells])
    families = sorted({family for result in results for family in result["families"]})
    folders = ["right, by family", *(f"{result['split']}, {result['mode']}" for result in results)]
    by_family = []
    for family in families:
        cells = (result["families"].get(family) for result in results)
        cells = ("–" if c is None else f"{round(c['accuracy'] * c['n'])} of {c['n']}" for c in cells)
        by_family.append([family, *cells])
    return f"{backbone.markdown(head, rows, words=2)}\n{backbone.markdown(folders, by_family)}"


@backbone.one_line_errors("toy.score")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("toy.score", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="with answers.jsonl")
    parser.add_argument("--json", type=Path, metavar="OUT", help="all metrics, or the agreement")
    parser.add_argument("--agreement", action="store_true", help="of the answers in all folders")
    args = parser.parse_args(argv)
    results = [score(folder) for folder in args.folders]
    alike = agreement(results) if args.agreement else None
    if args.json:
        write_text(args.json, json.dumps(alike or results, indent=1, allow_nan=False) + "\n")
    print(tables(results), end="")
    if alike:
        share, low, high = (100 * each for each in (alike["accuracy"], *alike["interval"]))
        right = f"{100 * alike['right']:.1f} % on the right edit"
        print(f"\nagreement: {share:.1f} % ({low:.1f} … {high:.1f}) of {alike['n']} queries, {right}")


if __name__ == "__main__":
    main()
