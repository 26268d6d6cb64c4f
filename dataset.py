"""Contribution 5: the visual prompt dataset, as training reads and composes it.

The paper shows the model one finished edit and asks for the same edit of another picture. Both stand in one
image, a 2×2 grid of square panels. Its dataset figure calls the step "data processing" (phase 2): among the
image pairs of one instruction two are drawn at random; one becomes the example row, the other the query row.

        Img_train                              Img_VPcon, the condition
    +----------------+----------------+        +----------------+----------------+
    | example before | example after  |        | example before | example after  |  P rows
    +----------------+----------------+        +----------------+----------------+
    | query          | answer         |        | query          | flat grey      |  P rows
    +----------------+----------------+        +----------------+----------------+
        P columns        P columns

The module goes from the paper's matter to the plumbing: grids; the dataset that draws the two rows; the two
readers. `data_making/` holds phase 1, which makes the pairs.

Symbols: P panel size (pixels, or latent pixels); C channels. Images are RGB in [-1, 1], where grey is 0.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pictures import ImageError, TableImage, load_image, misfit, path_inside, to_panel

log = logging.getLogger(__name__)


# --- Grids --------------------------------------------------------------------------------------------------


def compose_grid(example_before: Tensor, example_after: Tensor, query: Tensor, answer: Tensor) -> Tensor:
    """Four panels (..., C, P, P) to one grid (..., C, 2P, 2P): images in [-1, 1] and latents alike.

    A batch of dataset items becomes a batch of grids by `compose_grid(*batch["panels"].unbind(1))`.
    Raises ValueError unless the four panels are square and of one shape. Source: the paper's dataset figure.
    """
    shapes = [tuple(panel.shape) for panel in (example_before, example_after, query, answer)]
    if len(set(shapes)) > 1 or len(shapes[0]) < 3 or shapes[0][-1] != shapes[0][-2]:
        raise ValueError(f"a grid needs four square panels of one shape (..., C, P, P), not {shapes}")
    top = torch.cat([example_before, example_after], dim=-1)  # (..., C, P, 2P)
    bottom = torch.cat([query, answer], dim=-1)
    return torch.cat([top, bottom], dim=-2)


def split_grid(grid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of `compose_grid`: views (..., C, P, P) of example before, example after, query and answer.

    Raises ValueError, as all the functions on grids do, for a grid that is not square or has odd sides.
    """
    p = _panel_size(grid)
    return grid[..., :p, :p], grid[..., :p, p:], grid[..., p:, :p], grid[..., p:, p:]


def answer_panel(grid: Tensor) -> Tensor:
    """The lower-right panel (..., C, P, P) of a grid (..., C, 2P, 2P), as a view: the answer to the query."""
    return split_grid(grid)[3]


def mask_query(grid: Tensor, fill: float = 0.0) -> Tensor:
    """Img_VPcon: a copy of the grid (..., C, 2P, 2P) whose answer panel is `fill`, 0 being grey in [-1, 1].

    Source: the paper's architecture figure. For images only: a latent of zeros is not the latent of grey.
    """
    masked = grid.clone()
    answer_panel(masked).fill_(fill)
    return masked


def drop_example(grid: Tensor, fill: float = 0.0) -> Tensor:
    """A copy of the grid (..., C, 2P, 2P) whose example row is `fill`, so that the instruction stands alone.

    [ours] An absent example looks like an absent answer, flat grey. Training drops examples at random to
    make possible guidance by the example, and edits by instruction alone.
    """
    dropped = grid.clone()
    dropped[..., : _panel_size(grid), :] = fill
    return dropped


def _panel_size(grid: Tensor) -> int:
    height, width = grid.shape[-2:] if grid.ndim >= 3 else (0, 0)
    if height != width or height % 2 or height == 0:
        raise ValueError(f"a grid is square with even sides (..., C, 2P, 2P), not {tuple(grid.shape)}")
    return height // 2


# --- The dataset --------------------------------------------------------------------------------------------


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


class VisualPromptDataset(Dataset):
    """Every pair in turn as the query, with another pair of its instruction as the example.

    pairs: edit pairs. An instruction with a single pair has no example to show: it is left out, logged, and
        kept in the list `left_out`. `self.pairs` holds the others; indices point into it.
    size: P, the panel size in pixels.
    seed: with the epoch and the index it determines an item entirely. Neither the number of workers, nor the
        order of the items, nor a resumed run changes one.

    Raises DatasetError when no instruction has two pairs. [figure] phase 2 draws two pairs of an instruction.
    [ours] Each pair is the query once an epoch, so an instruction with more pairs is seen more often.
    """

    def __init__(self, pairs: Sequence[EditPair], size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"a panel of {size} pixels is no panel")
        self.size, self.seed = size, seed
        count = Counter(pair.instruction for pair in pairs)
        self.left_out = [instruction for instruction, n in count.items() if n == 1]
        if len(self.left_out) == len(count):
            raise DatasetError(
                f"none of the {len(count)} instructions has a second edit pair to serve as the example; "
                f"give at least two pairs with the same instruction"
            )
        if self.left_out:
            which = "; ".join(self.left_out[:3]) + ("; …" if len(self.left_out) > 3 else "")
            log.warning("instructions left out, of a single pair: %d (%s)", len(self.left_out), which)
        self.pairs = [pair for pair in pairs if count[pair.instruction] > 1]
        self._group: dict[str, list[int]] = {}  # instruction -> its pairs, in their order
        for i, pair in enumerate(self.pairs):
            self._group.setdefault(pair.instruction, []).append(i)

    def __len__(self) -> int:
        return len(self.pairs)

    def draw(self, i: int, epoch: int = 0) -> int:
        """The index of the pair that is item `i`'s example in this epoch: any other of its group, with equal
        chance. Raises IndexError."""
        i = range(len(self))[i]
        group = self._group[self.pairs[i].instruction]
        onward = np.random.default_rng((self.seed, epoch, i)).integers(1, len(group))
        return group[(bisect_left(group, i) + onward) % len(group)]  # so many places on, round the group

    def load_pair(self, i: int) -> tuple[Tensor, Tensor]:
        """Before and after of pair `i`, each (3, P, P) in [-1, 1]. Raises ImageError, also for a `misfit`."""
        pair = self.pairs[i]
        before, after = load_image(pair.input), load_image(pair.output)
        if reason := misfit(before, after):
            raise ImageError(pair.output, reason)
        return to_panel(before, self.size), to_panel(after, self.size)

    def load_panels(self, example: int, query: int) -> Tensor:
        """Pair `example`, then pair `query`: (4, 3, P, P) as `load_pair`, in the order of `compose_grid`."""
        return torch.stack([*self.load_pair(example), *self.load_pair(query)])

    def __getitem__(self, i: int | tuple[int, int]) -> dict[str, Any]:
        """`panels` (4, 3, P, P) float32 in [-1, 1], in the order of `compose_grid`; `instruction`; `index`
        and `example_index` (into `pairs`). Raises ImageError, which names the broken picture.

        An index (epoch, i) asks for item `i` of that epoch, i alone for that of epoch 0. So a sampler may run
        on over epochs."""
        epoch, i = i if isinstance(i, tuple) else (0, i)
        example, query = self.draw(i, epoch), range(len(self))[i]
        panels, instruction = self.load_panels(example, query), self.pairs[query].instruction
        return {"panels": panels, "instruction": instruction, "index": query, "example_index": example}


# --- Readers: an ImageFolder, and a table of the `datasets` library -----------------------------------------

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
    - a folder `source` with such a file, which is itself a split, whatever `split` says;
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
        files = _metadata(folder) or _metadata(folder, "*/") or _metadata(root.resolve())
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

    Knows the columns of InstructPix2Pix, MagicBrush and our own; `columns` names others. Raises DatasetError,
    which names the columns or the row.
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
    pairs = []
    for row, (instruction, *captions) in enumerate(zip(*texts)):
        files = (TableImage(image, row) for image in images)
        try:
            pairs.append(EditPair(*files, clean_instruction(instruction), *map(_caption, captions)))
        except ValueError as error:
            raise DatasetError(f"row {row}: {error}") from None
    return pairs


def _load_table(source: str | Path, split: str) -> Any:
    """A split of a table, local or on the hub, by the `datasets` library, which runs no code from it."""
    import datasets

    root = Path(source)
    if root.is_dir() and not any(file.suffix in (".parquet", ".arrow") for file in root.rglob("*")):
        raise ValueError(f"has neither {split}/metadata.jsonl or .csv nor Parquet or Arrow files")
    try:
        if any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
            table = datasets.load_from_disk(str(root))
            return table[split] if isinstance(table, datasets.DatasetDict) else table
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
