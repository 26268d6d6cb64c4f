"""Edit pairs as they lie on a disk or on the hub: an ImageFolder, or a table of the `datasets` library."""

import csv
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pictures.files import TableImage, path_inside

log = logging.getLogger(__name__)


class DatasetError(ValueError):
    """A dataset that cannot be used. The message is one line: where, what, and what to do."""

    def __init__(self, line: str) -> None:
        super().__init__(" ".join(line.split()))


@dataclass(slots=True)
class EditPair:
    """One edit: where its two pictures lie (nothing is decoded here), and its instruction."""

    input: str | TableImage
    output: str | TableImage
    instruction: str
    input_caption: str | None = None
    output_caption: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further keys of the metadata, untouched


_FOLDER_COLUMNS = ("input_file_name", "output_file_name", "instruction")
_TABLE_COLUMNS = (
    ("original_image", "input_image", "source_img"),  # InstructPix2Pix's names, ours, MagicBrush's
    ("edited_image", "target_img"),
    ("edit_prompt", "instruction"),
)
LONGEST_INSTRUCTION = 2000  # a language model's time and memory grow with the square of it


def read_pairs(
    source: str | Path, split: str = "train", columns: Sequence[str] | None = None
) -> list[EditPair]:
    """The edit pairs of one split of a dataset, of the first of these layouts that `source` has:

    - a folder `source/<split>` with `metadata.jsonl` or `metadata.csv`, or subfolders (shards) with one each;
    - a folder `source` with such a file, which is itself the split "train";
    - a table: a folder of Parquet or Arrow files or of `Dataset.save_to_disk`, or a hub id `owner/name`.

    A row of metadata has `input_file_name` and `output_file_name`, relative to its file, and `instruction`;
    `columns` gives them other names. `input_caption` and `output_caption` are optional; further keys go to
    `extra`. Raises DatasetError, one line, for a missing, malformed or empty dataset, or a path out of
    its folder.
    """
    root = Path(source)
    # A mistyped path must not be looked up on the hub: without a network that takes half a minute.
    if not root.is_dir() and (root.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source))):
        raise DatasetError(f"{source}: no such folder; give a dataset's folder or its hub id, owner/name")
    try:
        folder = Path(path_inside(root.resolve(), split))
        files = _metadata(folder) or _metadata(folder, "*/")
        if not files and (files := _metadata(root.resolve())) and split != "train":
            raise ValueError("not there; the folder is itself one split, train")
        if files:
            pairs = [pair for file in files for pair in _read_metadata(file, columns or _FOLDER_COLUMNS)]
        else:
            pairs = read_table(_load_table(source, split), columns)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{source}: split {split!r}: {error}") from None
    if not pairs:
        raise DatasetError(f"{source}: split {split!r} is empty; give two or more edit pairs an instruction")
    return pairs


def _metadata(folder: Path, shards: str = "") -> list[Path]:
    """The files of metadata in a folder, or in its subfolders ("*/"), in the order of their names."""
    files = sorted(file for kind in ("jsonl", "csv") for file in folder.glob(f"{shards}metadata.{kind}"))
    files = [file for file in files if not (shards and file.parent.name.startswith("."))]  # unfinished ones
    if len({file.parent for file in files}) < len(files):
        raise ValueError("metadata.jsonl and metadata.csv lie in one folder; keep one of the two")
    return [Path(path_inside(folder, str(file.relative_to(folder)))) for file in files]


def _read_metadata(metadata: Path, columns: Sequence[str]) -> Iterator[EditPair]:
    """The pairs of one metadata file. Raises DatasetError, which names file and line."""
    folder, is_csv, number = metadata.parent, metadata.suffix == ".csv", 0

    def lines() -> Iterator[str]:
        nonlocal number
        with open(metadata, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):  # noqa: B007  # the error below names it
                yield line

    try:
        objects = (json.loads(line) for line in lines() if not line.isspace())
        for row in csv.DictReader(lines(), strict=True) if is_csv else objects:
            if not isinstance(row, dict) or None in row:
                raise ValueError("more cells than columns" if is_csv else "not a JSON object")
            if is_csv:  # a cell is a text, and an empty one is none
                row = {key: cell for key, cell in row.items() if cell}
            if missing := [key for key in columns if key not in row]:
                raise ValueError(f"has no {missing[0]!r}, only {', '.join(map(repr, row))}")
            before, after, instruction = (row.pop(key) for key in columns)
            captions = [_caption(row.pop(key, None)) for key in ("input_caption", "output_caption")]
            files = path_inside(folder, before), path_inside(folder, after)
            yield EditPair(*files, clean_instruction(instruction), *captions, row)
    except (OSError, ValueError, csv.Error) as error:
        reason = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else error
        raise DatasetError(f"{metadata}:{number}: {reason}") from None


def read_table(table: Any, columns: Sequence[str] | None = None) -> list[EditPair]:
    """The rows of a `datasets.Dataset`; pictures stay encoded until they are loaded.

    Knows the columns of InstructPix2Pix, MagicBrush and our own; `columns` names others. A row whose texts
    cannot be used is left out, because nobody can mend a table of the hub. Raises DatasetError, which names
    the columns, or the first such row where they are more than one in twenty.
    """
    import datasets  # here, because it takes a second to import and only tables need it

    def find(*names: str) -> str | None:
        return next((name for name in names if name in table.column_names), None)

    named = [find(*names) for names in ([[name] for name in columns] if columns else _TABLE_COLUMNS)]
    if None in named:
        needed = ", ".join(columns or (" or ".join(names) for names in _TABLE_COLUMNS))
        has = ", ".join(table.column_names)
        raise DatasetError(f"needs columns {needed}; has {has}; name yours with --columns")
    before, after, told = named
    encoded = datasets.Image(decode=False)
    try:
        images = [table.select_columns(name).cast_column(name, encoded) for name in (before, after)]
    except Exception as error:  # of pyarrow and datasets, by the column's type
        raise DatasetError(f"{before} and {after} are not columns of images ({_first_line(error)})") from None
    texts = told, find("original_prompt", "input_caption"), find("edited_prompt", "output_caption")
    texts = [table[name][:] if name else [None] * len(table) for name in texts]
    pairs, faults = [], []
    for row, (instruction, *captions) in enumerate(zip(*texts)):
        files = (TableImage(image, row) for image in images)
        try:
            pairs.append(EditPair(*files, clean_instruction(instruction), *map(_caption, captions)))
        except ValueError as error:
            faults.append(f"row {row}: {error}")
    if too_many(len(faults), len(table)):
        raise DatasetError(f"{len(faults)} of {len(table)} rows cannot be used; the first, {faults[0]}")
    if faults:
        log.warning("rows left out: %d (the first, %s)", len(faults), faults[0])
    return pairs


def too_many(broken: int, of: int) -> bool:
    """More than one, and more than one in twenty: a fault of the copy, not of single rows or pictures."""
    return broken > max(1, 0.05 * of)


def _load_table(source: str | Path, split: str) -> Any:
    """A split of a table, local or on the hub, by the `datasets` library, which runs no code from it."""
    import datasets

    root = Path(source)
    if root.is_dir() and not any(file.suffix in (".parquet", ".arrow") for file in root.rglob("*")):
        raise ValueError(f"has neither {split}/metadata.jsonl or .csv nor Parquet or Arrow files")
    try:
        if any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
            table = datasets.load_from_disk(str(root))
            return table[split] if isinstance(table, datasets.DatasetDict) else {"train": table}[split]
        return datasets.load_dataset(str(source), split=split)
    except Exception as error:  # of the hub's client, of pyarrow and of datasets
        raise ValueError(f"cannot load it ({_first_line(error)})") from None


def clean_instruction(text: object) -> str:
    """[ours] Pairs share an instruction when its words are the same, whatever the blanks between them.

    Raises ValueError for what is no text, or too long.
    """
    if len(_text(text, "the instruction")) > LONGEST_INSTRUCTION:
        raise ValueError(f"an instruction of more than {LONGEST_INSTRUCTION} letters")
    return sys.intern(" ".join(text.split()))  # all pairs of an instruction hold one and the same string


def _caption(text: object) -> str | None:
    return _text(text, "a caption") if text else None


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is empty or not a text")
    value.encode()  # raises ValueError where it was no UTF-8
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
