"""InstructPix2Pix's dataset as it was generated → a dataset folder, which `dataset.py` and `train.py` read.

    python -m data_making.convert SOURCE OUTPUT

`SOURCE/seeds.json` lists [folder, [seed, …]]. Each folder holds `prompt.json` with "edit", "input" and
"output", and the pictures `<seed>_0.jpg` (before) and `<seed>_1.jpg` (after). OUTPUT gets a folder for each
split with `metadata.jsonl` and hard links to the pictures, or copies where the file system has no links.
It appears whole or not at all.
"""

import json
import os
import shutil
from pathlib import Path

from tqdm import tqdm

import backbone
from disk import as_lines, atomic_folder
from pictures import path_inside
from pictures.pairs import clean_instruction

# As in `edit_dataset.py` of timothybrooks/instruct-pix2pix, parts of the list of folders. [ours] The cuts are
# rounded, so that a single folder is `train`.
SPLITS = {"train": (0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1)}


def convert(source: Path, output: Path) -> dict[str, int]:
    """Writes `output`; returns the pairs of each split. Pairs without a picture are named and left out.

    Raises ValueError, one line, for a source that is malformed or leads out of its folder, or an output that
    exists; OSError for an unreadable source or a full disk.
    """
    if output.exists():
        raise ValueError(f"{output}: exists already; give a new folder")
    source, counts, where = source.resolve(), {}, source / "seeds.json"
    with atomic_folder(output) as new:
        try:
            listing = [(str(folder), list(seeds)) for folder, seeds in json.loads(where.read_text("utf-8"))]
            for split, cuts in SPLITS.items():
                begin, end = (round(cut * len(listing)) for cut in cuts)
                rows = []
                for folder, seeds in tqdm(listing[begin:end], desc=split, unit="folder", mininterval=1):
                    where = Path(path_inside(source, f"{folder}/prompt.json"))
                    prompt = json.loads(where.read_text("utf-8"))
                    told = {"instruction": clean_instruction(prompt["edit"])}
                    told |= {f"{key}_caption": prompt[key] for key in ("input", "output") if key in prompt}
                    for seed in seeds:
                        names = [f"{folder}/{seed}_{k}.jpg" for k in (0, 1)]
                        if link_or_copy(source, new / split, names):
                            rows.append({"input_file_name": names[0], "output_file_name": names[1]} | told)
                if rows:
                    (new / split / "metadata.jsonl").write_text(as_lines(rows), "utf-8")
                counts[split] = len(rows)
        except (ValueError, TypeError, KeyError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{where}: {reason}") from None
        if not any(counts.values()):
            raise ValueError(f"{source}: no pairs")
    return counts


def link_or_copy(source: Path, folder: Path, names: list[str]) -> bool:
    """Links or copies files of these names from one folder to another; False where one is missing."""
    files = [path_inside(source, name) for name in names]
    if missing := [file for file in files if not os.path.isfile(file)]:
        print(f"left out: {missing[0]}: no such file")
        return False
    for file, name in zip(files, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, folder / name)
        except OSError:
            shutil.copyfile(file, folder / name)
    return True


@backbone.one_line_errors("data_making.convert")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("data_making.convert", __doc__)
    parser.add_argument("source", type=Path, help="InstructPix2Pix's folder, which has seeds.json")
    parser.add_argument("output", type=Path, help="the new dataset's folder")
    args = parser.parse_args(argv)
    for split, count in convert(args.source, args.output).items():
        print(f"{split}: {count} pairs")


if __name__ == "__main__":
    main()
