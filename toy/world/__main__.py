"""Writes the toy world as a dataset folder: `python -m toy.world`; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import NoReturn

from toy.world.scenes import random_scene
from toy.world.splits import SPLITS, write_dataset


def _end(reason: str) -> NoReturn:
    print(f"toy.world: error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.world", description="Write the toy world as a dataset folder."
    )
    parser.add_argument("--out", type=Path, default=Path("data/toy"))
    parser.add_argument("--seed", type=int, default=0)
    instructions, pairs = SPLITS["train"]
    parser.add_argument("--pairs", type=int, default=pairs, help="of each instruction in train")
    parser.add_argument("--captions", type=int, help="print captions of so many scenes, and write nothing")
    args = parser.parse_args()
    if args.captions is not None:
        rng = random.Random(args.seed)
        print("\n".join(random_scene(rng).caption() for _ in range(args.captions)))
        return
    if args.out.exists():
        _end(f"{args.out} exists already; remove it or choose another --out")
    if args.pairs < 2:
        _end(f"--pairs {args.pairs}: give 2 or more, an example and a query")
    try:
        write_dataset(args.out, args.seed, SPLITS | {"train": (instructions, args.pairs)})
    except OSError as error:
        _end(str(error))
    for split in SPLITS:
        lines = (args.out / split / "metadata.jsonl").read_text().splitlines()
        print(
            f"{split:20} {len(lines):6} pairs, {len({json.loads(line)['canonical'] for line in lines})} edits"
        )


if __name__ == "__main__":
    main()
