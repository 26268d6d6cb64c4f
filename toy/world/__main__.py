"""Writes the toy world as a dataset folder: `python -m toy.world`; see the package's docstring."""

import argparse
import random
from pathlib import Path

from toy.world.scenes import random_scene
from toy.world.splits import TRAINED_MIXTURES, write_dataset


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.world", description="Write the toy world as a dataset folder."
    )
    parser.add_argument("--out", type=Path, default=Path("data/toy"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixtures", action="store_true", help="mixtures of two edits in `train` too")
    parser.add_argument("--captions", type=int, help="print captions of so many scenes, and write nothing")
    args = parser.parse_args()
    if args.captions is not None:
        rng = random.Random(args.seed)
        print("\n".join(random_scene(rng).caption() for _ in range(args.captions)))
        return
    if args.out.exists():
        parser.error(f"{args.out} exists already; remove it or choose another --out")
    try:
        write_dataset(args.out, args.seed, mixtures=TRAINED_MIXTURES if args.mixtures else (0, 0))
    except OSError as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    main()
