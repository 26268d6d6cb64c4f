"""Exact metrics of saved answers: the toy world's renderer knows the right answer to the pixel.

    python evaluate.py --mode both pair instruction
    python toy/score.py out/eval/seen/* --json out/score.json --markdown out/score.md

Nearest-candidate accuracy. Of a query's scene the renderer makes every edit that exists; these pictures and
the input itself are the candidates. An answer is right when the true edit's picture is the nearest to it in
mean squared error over the pixels. Edits that give one and the same picture count as one candidate. A copy of
the input is nearest to the input, and so scores 0.

Beside it the mean absolute error, in units of 0 … 255: inside the edited region (where truth and input differ
by more than 8), outside it, and where the truth shows a face.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import backbone
from toy import world

UNEDITED = "unedited"  # the name of the input among the families
EDITED = 8  # levels of 255 by which a pixel of the edited region differs, in any channel


# --- One query ----------------------------------------------------------------------------------------------


def candidates(scene: world.Scene) -> tuple[np.ndarray, list[str]]:
    """All different pictures that one edit makes of the scene, (N, P, P, 3) uint8, the unedited input first;
    and the family of each, the first in the order of `world.FAMILIES` that makes it."""
    pictures = {_pixels(scene).tobytes(): UNEDITED}
    for edit, edited in world.candidates(scene):
        pictures.setdefault(_pixels(edited).tobytes(), edit.family)
    shape = (len(pictures), world.PANEL, world.PANEL, 3)
    return np.frombuffer(b"".join(pictures), np.uint8).reshape(shape), list(pictures.values())


def _pixels(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.render(scene))  # (P, P, 3) uint8


class Truth:
    """What a query's answers are measured against."""

    def __init__(self, scene: world.Scene, edit: world.Edit) -> None:
        after = edit.apply(scene)
        if after is None:
            raise ValueError(f"the edit {edit} cannot be made of its scene")
        self.family = edit.family
        self.pictures, self.families = candidates(scene)
        self.picture = _pixels(after)
        change = np.abs(self.picture.astype(np.int16) - self.pictures[0]).max(axis=-1)
        self.edited = change > EDITED  # (P, P) bool
        self.face = world.render_classes(after) == world.CLASSES.index("face")  # (P, P) bool

    def score(self, answer: np.ndarray) -> dict:
        """Of one answer (P, P, 3) uint8. An error over an empty region is None."""
        distance = np.square(self.pictures - answer.astype(np.float32)).mean(axis=(1, 2, 3))  # (N,)
        nearest = int(distance.argmin())
        right = nearest > 0 and np.array_equal(self.pictures[nearest], self.picture)
        error = np.abs(answer.astype(np.float32) - self.picture).mean(axis=-1)  # (P, P)
        regions = {"inside": self.edited, "outside": ~self.edited, "face": self.face}
        return {
            "family": self.family,
            "nearest": self.family if right else self.families[nearest],
            "right": right,
            "candidates": len(self.pictures),
            **{f"mae_{k}": float(error[r].mean()) if r.any() else None for k, r in regions.items()},
        }


# --- Folders of answers -------------------------------------------------------------------------------------


def read_answers(folder: Path) -> list[dict]:
    """The lines of `answers.jsonl`, but for one that a running or killed evaluation has left half-written."""
    path = folder / "answers.jsonl"
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            try:
                records.append(json.loads(line))
                missing = {"answer", "scene", "edit"} - records[-1].keys()
            except (ValueError, AttributeError):
                raise ValueError(f"{path}:{number}: not a JSON object") from None
            if missing:
                raise ValueError(f"{path}:{number}: has no {min(missing)!r}; not an answer in the toy world")
    if not records:
        raise ValueError(f"{path}: holds no answers")
    return records


def score(folders: list[Path]) -> list[dict]:
    """The metrics of each folder. Candidates are drawn once for all folders that ask the same query."""
    scores: dict[Path, list[dict]] = {folder: [] for folder in folders}
    records = {folder: read_answers(folder) for folder in scores}
    queries: dict[tuple[str, str], list[tuple[Path, str]]] = {}
    for folder, lines in records.items():
        for line in lines:
            queries.setdefault((line["scene"], line["edit"]), []).append((folder, line["answer"]))
    for (scene, edit), answers in tqdm(queries.items(), desc="scoring", unit="query", mininterval=1):
        truth = Truth(world.scene_from_json(json.loads(scene)), world.Edit(**json.loads(edit)))
        for folder, name in answers:
            with Image.open(folder / name) as image:
                answer = np.asarray(image.convert("RGB"))
            if answer.shape != truth.picture.shape:
                raise ValueError(f"{folder / name}: not a picture of {world.PANEL}×{world.PANEL} pixels")
            scores[folder].append({"answer": name, **truth.score(answer)})
    return [
        {
            "folder": str(folder),
            "split": folder.resolve().parent.name,
            "mode": records[folder][0].get("mode") or folder.resolve().name,
            **summary(rows),
        }
        for folder, rows in scores.items()
    ]


def summary(rows: list[dict]) -> dict:
    """Means over answers with their number, by family too, and the nearest families of each family."""
    by_family: dict[str, list[dict]] = {}
    for row in rows:
        by_family.setdefault(row["family"], []).append(row)
    return {
        **accuracy(rows),
        "chance": mean(1 / row["candidates"] for row in rows),
        **{key: mean(row[key] for row in rows) for key in ("mae_inside", "mae_outside", "mae_face")},
        "faces": sum(row["mae_face"] is not None for row in rows),
        "families": {family: accuracy(by_family[family]) for family in sorted(by_family)},
        "confusion": {
            family: dict(Counter(row["nearest"] for row in by_family[family]).most_common())
            for family in sorted(by_family)
        },
        "answers": sorted(rows, key=lambda row: row["answer"]),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None where there are none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def accuracy(rows: list[dict]) -> dict:
    right = sum(row["right"] for row in rows)
    return {"n": len(rows), "accuracy": right / len(rows), "interval": wilson(right, len(rows))}


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: right / n with n > 0, also near 0 and 1 (E. B. Wilson, 1927)."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def markdown(results: list[dict]) -> str:
    """One row a folder."""
    head = ("split", "mode", "n", "accuracy, %", "chance, %", "MAE inside", "MAE outside", "MAE face")
    rows = [head, ("---", "---", *["---:"] * 6)]
    for result in results:
        low, high = result["interval"]
        errors = (result[key] for key in ("mae_inside", "mae_outside", "mae_face"))
        rows.append(
            (
                result["split"],
                result["mode"],
                str(result["n"]),
                f"{100 * result['accuracy']:.1f} ({100 * low:.1f} … {100 * high:.1f})",
                f"{100 * result['chance']:.2f}",
                *("–" if error is None else f"{error:.1f}" for error in errors),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score saved answers against the toy world's renderer.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="with answers.jsonl")
    parser.add_argument("--json", type=Path, metavar="OUT", help="all metrics, and those of every answer")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="the table that is printed")
    args = parser.parse_args(argv)
    with backbone.one_line_errors("score.py"):
        results = score(args.folders)
        table = markdown(results)
        for path, text in ((args.json, json.dumps(results, indent=1) + "\n"), (args.markdown, table)):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        print(table, end="")


if __name__ == "__main__":
    main()
