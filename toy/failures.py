"""A page of what an editor gets wrong: how each family of edits fares, what is made instead, and pictures.

    python -m evaluation.evaluate --split seen --mode both
    python -m toy.failures out/eval/seen/both --out docs/failures.md

For every family the page has its share of right answers and the families whose pictures the wrong ones came
nearest to; below, the first wrong answers of each family in the order of the queries, which a seed has drawn:
nothing is picked. Beside answer and truth stands the candidate that was nearer to the answer than the truth.
"""

from collections import Counter
from pathlib import Path

from PIL import Image

import backbone
from disk import write_text
from pictures import load_image
from pictures.answers import panel_rows, save_png
from toy import score

PANELS = ("example before", "example after", "input", "answer", "truth", "nearest")
EACH = 2  # pictures of each family


def table(result: dict) -> str:
    """A row a family, from most to fewest right: right answers, and what the others came nearest to."""
    rows = ["| family | right | nearest when wrong |", "| --- | ---: | --- |"]
    by_share = sorted(result["families"].items(), key=lambda item: -item[1]["accuracy"])
    for family, counts in by_share:
        wrong = Counter(
            row["nearest"] for row in result["answers"] if row["family"] == family and not row["right"]
        )
        nearest = ", ".join(f"{name} {count}" for name, count in wrong.most_common())
        right = counts["n"] - wrong.total()
        rows.append(f"| {family} | {right} of {counts['n']} | {nearest or '–'} |")
    return "\n".join(rows) + "\n"


def first_failures(result: dict) -> list[dict]:
    """The first `EACH` wrong answers of every family, by family."""
    wrong: dict[str, list[dict]] = {}
    for row in result["answers"]:
        if not row["right"]:
            wrong.setdefault(row["family"], []).append(row)
    return [row for family in sorted(wrong) for row in wrong[family][:EACH]]


def sheet(folder: Path, rows: list[dict]) -> Image.Image:
    """A line of six panels for each row, two lines side by side."""
    records = {record["answer"]: record for record in score.read_queries(folder)}
    lines = []
    for row in rows:
        record = records[row["answer"]]
        truth = score.Truth(record["scene"], record["edit"])
        nearest = truth.nearest(load_image(folder / row["answer"]))
        files = record["example_input"], record["example_output"], record["input"], row["answer"]
        panels = [load_image(folder / file) for file in files]
        panels += map(Image.fromarray, (truth.picture, truth.pictures[nearest]))
        lines.append((f"{record['canonical']}; nearest: {row['nearest_edit']}", panels))
    return panel_rows(lines, PANELS, side=96, columns=2)


@backbone.one_line_errors("toy.failures")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("toy.failures", __doc__)
    parser.add_argument("folder", type=Path, help="with answers.jsonl, as evaluate.py writes it")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.md", help="a .png goes beside it")
    args = parser.parse_args(argv)
    if args.out.suffix == ".png":
        raise ValueError(f"--out {args.out}: give the page's name; the picture lies beside it")
    result = score.score(args.folder)
    picture = args.out.with_suffix(".png")
    text = (
        f"# What goes wrong on `{result['split']}`, given {result['mode']}\n\n"
        f"Written by `python -m toy.failures {args.folder} --out {args.out}`: {result['n']} queries, "
        f"{100 * result['accuracy']:.1f} % right.\n\n{table(result)}"
    )
    picture.unlink(missing_ok=True)  # an older page's
    if wrong := first_failures(result):
        save_png(sheet(args.folder, wrong), picture)
        text += (
            f"\nThe first {EACH} wrong answers of each family, by query number:\n\n"
            f"![example pair, input, answer, truth and the nearest candidate]({picture.name})\n"
        )
    write_text(args.out, text)
    print(args.out)


if __name__ == "__main__":
    main()
