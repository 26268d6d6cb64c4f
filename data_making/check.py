"""Inspects a dataset, ours or another, before training.

    python -m data_making.check data/mine --sheet sheet.png

Prints counts and scores, and names duplicates, broken files, pairs of different frames, and instructions with
too few pairs. `--sheet` draws a contact sheet.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, median

from PIL import Image
from tqdm.contrib.concurrent import thread_map

import backbone
from disk import atomic_write
from pictures import ImageError, load_image, misfit
from pictures.answers import panel_rows
from pictures.pairs import EditPair, read_pairs

THIN = "instructions with fewer than 2 good pairs"
FAULTS = ("broken files", "pairs of different frames", "pairs without a change", "duplicate pairs", THIN)


def check(args: argparse.Namespace) -> None:
    """Prints what a split holds; exits with 1 where something should be mended."""
    if args.sheet and args.sheet.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--sheet {args.sheet}: give a picture's name, such as sheet.png")
    pairs = read_pairs(args.data, args.split, args.columns)
    read = {str(file) for pair in pairs for file in (pair.input, pair.output)}
    if args.sheet and os.path.realpath(args.sheet) in read:
        raise ValueError(f"--sheet {args.sheet}: would overwrite a picture that is read")
    groups: dict[str, list[EditPair]] = {pair.instruction: [] for pair in pairs}  # of good pairs
    faults, seen, sizes = {name: [] for name in FAULTS}, {}, Counter()
    for pair, look in zip(pairs, thread_map(_look, pairs, desc="check", unit="pair", mininterval=1)):
        if isinstance(look, ImageError):
            faults["broken files"].append(str(look))
            continue
        size, before, after, reason = look
        sizes["{} × {}".format(*size)] += 1
        if reason:
            faults["pairs of different frames"].append(f"{pair.output}: {reason}")
        elif before == after:
            faults["pairs without a change"].append(f"{pair.output}: the same picture as {pair.input}")
        elif (key := (pair.instruction, before, after)) in seen:  # in other words it is another pair
            line = f"{pair.input}, {pair.output}: the same pictures as {seen[key]}"
            faults["duplicate pairs"].append(line)
        else:
            seen[key] = pair.input
            groups[pair.instruction].append(pair)
    faults[THIN] = [text for text, group in groups.items() if len(group) < 2]
    counts = [len(group) for group in groups.values()]
    print(f"pairs                  {len(pairs):8}")
    print(f"instructions           {len(groups):8}")
    print(f"good pairs of each     {min(counts):8} to {max(counts)}, median {median(counts):g}")
    print("sizes                  " + ", ".join(f"{size} ({n})" for size, n in sizes.most_common(5)))
    for key in ("clip_before", "clip_after", "clip_image", "clip_direction"):
        values = [pair.extra[key] for pair in pairs if isinstance(pair.extra.get(key), float)]
        if values:
            print(f"{key:22} {fmean(values):8.3f} in the mean, {min(values):.3f} to {max(values):.3f}")
    for name, lines in faults.items():
        print(f"{name}: {len(lines)}")
        print("".join(f"    {line}\n" for line in lines[:20]), end="")
        if len(lines) > 20:
            print(f"    and {len(lines) - 20} more")
    if args.sheet and any(counts):
        write_sheet(groups, args.sheet)
    if any(faults.values()):
        sys.exit(1)


def _look(pair: EditPair) -> tuple[tuple[int, int], str, str, str] | ImageError:
    """Size and digests of the pixels of a pair of pictures, and why they are no pair, or ""."""
    try:
        pictures = [load_image(source) for source in (pair.input, pair.output)]
    except ImageError as error:
        return error
    before, after = (hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures)
    return pictures[0].size, before, after, misfit(*pictures)


def write_sheet(groups: dict[str, list[EditPair]], path: Path) -> None:
    """A picture with the first two good pairs of each of the first 60 instructions, three side by side."""
    rows = []
    for text, group in [(text, group) for text, group in groups.items() if group][:60]:
        files = (file for pair in group[:2] for file in (pair.input, pair.output))
        rows.append((text, [load_image(file).resize((96, 96)) for file in files]))
    sheet = panel_rows(rows, ("before", "after") * 2, side=96, columns=min(3, len(rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, sheet.save)
    print(f"contact sheet: {path}")


@backbone.one_line_errors("data_making.check")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("data_making.check", __doc__)
    add = parser.add_argument
    add("data", help="a dataset's folder")
    add("--split", default="train")
    add("--columns", **backbone.COLUMNS)
    add("--sheet", type=Path, help="write a contact sheet, a picture, there")
    check(parser.parse_args(argv))


if __name__ == "__main__":
    main()
