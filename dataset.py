"""Contribution 5: the visual prompt dataset, as it is read and composed for training.

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

The module goes from the paper's matter to the plumbing: grids; the dataset that draws the two rows;
pictures; the three readers. `make_dataset.py` holds phase 1, which makes the pairs. `python dataset.py`
prints an example.

Symbols: P panel size (pixels, or latent pixels); C channels. Images are RGB in [-1, 1], where grey is 0.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from struct import unpack_from
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

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


def repeat_query(grid: Tensor) -> Tensor:
    """A copy of the grid (..., C, 2P, 2P) whose answer is the query itself: what is known before the edit."""
    _, _, query, _ = split_grid(grid)
    repeated = grid.clone()
    answer_panel(repeated).copy_(query)
    return repeated


def drop_example(grid: Tensor, fill: float = 0.0) -> Tensor:
    """A copy of the grid (..., C, 2P, 2P) whose example row is `fill`, so that the instruction stands alone.

    Choice: an absent example looks like an absent answer, flat grey. Training drops examples at random to
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
    """One edit: where its two pictures lie (nothing is decoded here), and what was asked for."""

    input: str | TableImage
    output: str | TableImage
    instruction: str
    input_caption: str | None = None
    output_caption: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # the metadata's further keys, untouched
    classes: tuple[str, str] | None = None  # two pictures more, whose grey levels are classes: `load_classes`


class Draw(NamedTuple):
    """What one item shows: two pairs of one instruction, by index, and whether all panels are mirrored."""

    query: int
    example: int
    flip: bool


# Choice: an edit that names a side, a sense of turning or writing is not its own mirror image.
_SIDED = re.compile(
    r"\b((left|right)(most|wards?)?|(north|south)?(west|east)(ern|wards?)?|(anti|counter-?)?clockwise|sides?|"
    r"sideways|(flip|mirror|revers|rotat|tilt|lean)(p?ed|p?ing|s|es?|ion)?|"
    r"text|words?|letters?|numbers?|writing|written|signs?|logos?|captions?)\b",
    re.IGNORECASE,
)


def names_side(instruction: str) -> bool:
    """Whether an instruction has a word for a side or for writing (left, east, clockwise, mirror, letters …):
    pictures flipped left to right would no longer show what it says."""
    return _SIDED.search(instruction) is not None


class VisualPromptDataset(Dataset):
    """Every pair in turn as the query, with another pair of its instruction as the example.

    pairs: edit pairs. An instruction with a single pair has no example to show: it is left out, logged, and
        kept in the list `left_out`. `self.pairs` holds the others; indices point into it.
    size: P, the panel size in pixels.
    flip: mirror half of the items left to right, unless the instruction `names_side`. All four panels are
        mirrored alike, so that the two rows keep showing one and the same edit.
    seed: with the epoch and the index it determines an item entirely. Neither the number of workers, nor the
        order of the items, nor a resumed run changes one.

    Raises DatasetError when no instruction has two pairs. Source: the paper's dataset figure, phase 2.
    Choice: each pair is the query once an epoch, so an instruction with more pairs is seen more often.
    """

    def __init__(self, pairs: Sequence[EditPair], size: int, flip: bool = True, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"a panel of {size} pixels is no panel")
        self.size, self.flip, self.seed = size, flip, seed
        number: dict[str, int] = {}  # instruction -> its group
        group = np.array([number.setdefault(pair.instruction, len(number)) for pair in pairs], dtype=np.int64)
        count = np.bincount(group, minlength=len(number))  # group -> its pairs
        self.left_out = [instruction for instruction, n in zip(number, count) if n == 1]
        if len(self.left_out) == len(number):
            raise DatasetError(
                f"none of the {len(number)} instructions has a second edit pair to serve as the example; "
                f"give at least two pairs with the same instruction"
            )
        if self.left_out:
            which = "; ".join(self.left_out[:3]) + ("; …" if len(self.left_out) > 3 else "")
            log.warning("instructions left out, of a single pair: %d (%s)", len(self.left_out), which)

        usable = count[group] > 1
        self.pairs = [pair for pair, keep in zip(pairs, usable) if keep]
        group = group[usable]
        # In `_order` the pairs lie sorted by group, so a group is a slice; all this is 16 bytes a pair.
        self._order = np.argsort(group, kind="stable").astype(np.int32)  # place -> pair
        self._place = np.argsort(self._order).astype(np.int32)  # pair -> place
        self._first = np.searchsorted(group[self._order], group).astype(
            np.int32
        )  # pair -> its group's first place
        self._count = count[group].astype(np.int32)  # pair -> its group's size
        # In shared memory, so that workers who outlive an epoch (persistent_workers) learn of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Makes every item draw its example and flip anew. Call it before each pass over a DataLoader."""
        self._epoch.fill_(epoch)

    def draw(self, i: int, epoch: int | None = None) -> Draw:
        """Indices and flip of item `i` without its pictures, which is all a loop over cached latents needs.

        The example is any other pair of the group with equal chance, never the query itself. `epoch`
        defaults to the one set by `set_epoch`. Raises IndexError.
        """
        i = range(len(self))[i]
        rng = np.random.default_rng((self.seed, int(self._epoch) if epoch is None else epoch, i))
        first, count = int(self._first[i]), int(self._count[i])
        onward = int(rng.integers(1, count))  # 1 … count - 1 places further round the group's circle
        example = self._order[first + (int(self._place[i]) - first + onward) % count]
        mirrored = bool(rng.random() < 0.5)
        return Draw(i, int(example), self.flip and mirrored and not names_side(self.pairs[i].instruction))

    def load_pair(self, i: int) -> tuple[Tensor, Tensor]:
        """Before and after of pair `i`, unflipped, each (3, P, P) in [-1, 1]. Raises ImageError, also where
        the two are a `misfit`."""
        pair = self.pairs[i]
        before, after = load_image(pair.input), load_image(pair.output)
        if reason := misfit(before, after):
            raise ImageError(pair.output, reason)
        return to_panel(before, self.size), to_panel(after, self.size)

    def load_classes(self, i: int) -> Tensor | None:
        """What each pixel of before and after of pair `i` shows, as numbers of classes (2, P, P) uint8, 0 for
        none of them; None where the dataset does not tell. Raises ImageError."""
        if self.pairs[i].classes is None:
            return None
        levels = (load_image(file, managed=False).getchannel(0) for file in self.pairs[i].classes)
        maps = (ImageOps.fit(one, (self.size, self.size), Image.Resampling.NEAREST) for one in levels)
        return torch.stack([torch.from_numpy(np.array(one)) for one in maps])

    def load_panels(self, example: int, query: int) -> Tensor:
        """Pair `example`, then pair `query`, unflipped: (4, 3, P, P) as `load_pair`, ordered as a grid."""
        return torch.stack([*self.load_pair(example), *self.load_pair(query)])

    def __getitem__(self, i: int | tuple[int, int]) -> dict[str, Any]:
        """`panels` (4, 3, P, P) float32 in [-1, 1], in the order of `compose_grid`; `instruction`; `index`
        and `example_index` (into `pairs`); `flipped`. Raises ImageError, which names the broken picture.

        An index (epoch, i) asks for item `i` of that epoch, so that a sampler may run on over epochs."""
        epoch, i = i if isinstance(i, tuple) else (None, i)
        query, example, flip = self.draw(i, epoch)
        panels = self.load_panels(example, query)
        return {
            "panels": panels.flip(-1) if flip else panels,
            "instruction": self.pairs[query].instruction,
            "index": query,
            "example_index": example,
            "flipped": flip,
        }


# --- Pictures -----------------------------------------------------------------------------------------------


class ImageError(ValueError):
    """A picture that cannot be read. The message is one line: `path: reason`."""

    def __init__(self, path: object, reason: str = "") -> None:
        # A DataLoader raises a worker's error again as ImageError(traceback), whose last line is the message.
        line = f"{path}: {reason}" if reason else str(path).strip().split("\n")[-1].split("ImageError: ")[-1]
        super().__init__(" ".join(line.split()))


class TableImage(NamedTuple):
    """Where a picture lies in a `datasets` table."""

    column: Any  # a datasets.Dataset of one column, its images still encoded
    row: int

    def __str__(self) -> str:
        return f"column {self.column.column_names[0]}, row {self.row}"


_one_at_a_time = threading.Lock()

# Of Pillow's. Of the others EPS, say, would start Ghostscript, and JPEG 2000 takes several times its pixels.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def load_image(source: str | Path | TableImage, managed: bool = True) -> Image.Image:
    """A picture in one of `FORMATS`, the first frame of several, as `to_rgb` has it.

    Raises ImageError, one line naming the file, for a missing, corrupt or truncated picture; for more pixels
    than Pillow's `Image.MAX_IMAGE_PIXELS` (89 million), where Pillow alone would only warn; and for one whose
    many parts or scans would take long to go through.
    """
    try:
        with _Parts(_image_file(source)) as file:
            with _one_at_a_time, warnings.catch_warnings():  # which threads would spoil for each other
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file, formats=FORMATS)  # looks at the header alone
            with image:
                if image.format in ("JPEG", "MPO") and file.scans() > 100:  # libtiff's limit, too
                    raise ImageError(source, "more than 100 scans")
                return to_rgb(image, managed)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(source, f"not a picture that is read here ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(source, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them stumble over
        raise ImageError(source, f"corrupt or truncated picture ({error})") from None


class _Parts(io.BufferedReader):
    """A picture's file that can be read a limited number of times.

    Pillow reads every part by itself, and what follows is sometimes copied for each: 5 MB of comments in a
    GIF took it 22 s.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self.left = 2**14 + self.seek(0, io.SEEK_END) // 2**10
        self.seek(0)

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError("too many parts for its size")
        return super().read(size)

    def scans(self) -> int:
        """How often a JPEG goes through all its pixels; 560 kB of nothing but scans took 15 s."""
        self.seek(0)
        return self.read().count(b"\xff\xda")  # which compressed data cannot hold


def _image_file(source: str | Path | TableImage) -> io.RawIOBase:
    if isinstance(source, TableImage):
        (cell,) = source.column[source.row].values()
        if not (cell and cell["bytes"]):  # a mere path is not followed: a stranger's table may name any file
            raise ImageError(source, "the row holds no image bytes")
        return io.BytesIO(cell["bytes"])
    if not os.path.isfile(source):  # nor is a pipe or a device a picture
        raise ImageError(source, "is a folder" if os.path.isdir(source) else "no such file")
    return io.FileIO(source)


def picture_digest(source: str | Path | TableImage) -> str:
    """SHA-256 of a picture's bytes as they lie there; "" for one that cannot be read."""
    try:
        with _image_file(source) as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (ImageError, OSError):
        return ""


def to_rgb(image: Image.Image, managed: bool = True) -> Image.Image:
    """A PIL image of any mode as upright 8-bit sRGB, of mode "RGB": the one way in which a picture is seen.

    EXIF orientation is applied. A colour profile is converted, unless not `managed`: class maps hold numbers,
    not colours. Transparency shows white (Choice: as on a page). The result's `info` has the orientation that
    it was stored with, and no more: a second pass changes nothing. Raises ValueError for grey values outside
    0 … 65,535.
    """
    stored = image.getexif().get(ExifTags.Base.Orientation, 1)
    if stored != 1:
        image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")  # of its colours alone
    opacity = None
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        opacity = image.getchannel("A")
    if managed and profile and (to_srgb := _to_srgb(profile, mode)):
        image = to_srgb.apply(image.convert(mode))
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=opacity)
    page.info = {"orientation": stored}
    return page


@lru_cache(maxsize=16)  # a dataset's pictures share a few
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns pixels of a mode, by their ICC profile, into sRGB; None where they stay as they are.

    Choice: a profile that is broken, or is another mode's, is passed over, as browsers do. One by which no
    colour moves by more than two levels is sRGB under another name.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    cube = 17 * np.indices((16, 16, 16), np.uint8).reshape(3, -1, 1).T  # (1, 4096, 3)
    colours = Image.fromarray(cube).convert(mode)
    before, after = (np.asarray(x, np.int16) for x in (colours.convert("RGB"), to_srgb.apply(colours)))
    return to_srgb if np.abs(after - before).max() > 2 else None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats to 8 bits; Pillow's own conversion clips all above 255 to white.

    Choice: 16-bit files span 0 … 65,535. The wider modes do not say what white is, so it is the first of
    1 (floats only), 255 and 65,535 that no pixel exceeds.
    """
    values = np.asarray(image).astype(np.float32)
    if not (values.min() >= 0 and values.max() <= 65535):  # false for NaN, too
        raise ValueError("grey values outside 0 … 65,535")
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    clear = values == image.info.get("transparency")
    values *= 255 / next(white for white in whites if values.max() <= white)
    grey = Image.fromarray(values.round(out=values).astype(np.uint8))
    if np.any(clear):
        grey.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return grey


def image_to_tensor(image: Image.Image) -> Tensor:
    """PIL image of (H, W), of any mode, to float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))  # (H, W, 3) uint8
    return from_bytes(pixels.permute(2, 0, 1).contiguous())


def tensor_to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], of any float type on any device, to a PIL image; what lies beyond is clipped.

    The exact inverse of `image_to_tensor`. Raises ValueError for another shape, and for NaN or infinity.
    """
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"an image is (3, H, W), not {tuple(tensor.shape)}")
    return Image.fromarray(to_bytes(tensor.detach()).permute(1, 2, 0).cpu().numpy())


def from_bytes(pixels: Tensor) -> Tensor:
    """Levels 0 … 255 of any shape, uint8, to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_bytes(tensor: Tensor) -> Tensor:
    """The exact inverse of `from_bytes`, for any float type; what lies beyond [-1, 1] is clipped.

    Raises ValueError for NaN, which would become black, and for infinity.
    """
    return ((check_finite(tensor, "a picture").float().clamp(-1, 1) + 1) * 127.5).round().byte()


def check_finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself. Raises ValueError where it holds NaN or infinity; `what` names it in the message.

    Everything that is written passes here: pictures, weights, checkpoints, embeddings, metrics.
    """
    if not tensor.isfinite().all():
        raise ValueError(f"NaN or infinity in {what}")
    return tensor


def to_panel(image: Image.Image, size: int) -> Tensor:
    """The training crop: the largest centred square, resized to (3, P, P) in [-1, 1], P = `size` pixels.

    Choice: Lanczos, which antialiases, and no random crop: before and after, which have one size, keep one
    frame, and a panel's latent can be cached.
    """
    return image_to_tensor(ImageOps.fit(to_rgb(image), (size, size), method=Image.Resampling.LANCZOS))


def misfit(before: Image.Image, after: Image.Image) -> str:
    """Why two pictures of `load_image` cannot be one frame before and after an edit; "" where they can.

    Choice: they may differ by a uniform scale, and by a pixel of rounding. Where their files have different
    EXIF orientations, a program may have lost one: then none of the other seven may fit twice as well.
    """
    (width, height), (w, h) = before.size, after.size
    if abs(width * h - height * w) > max(width, height, w, h):
        return f"{w} × {h} pixels, where the picture before has {width} × {height}: not one frame"
    if before.info.get("orientation") != after.info.get("orientation"):
        before, after = (image.convert("L").resize((32, 32)) for image in (before, after))
        upright, *turned = (
            np.abs(np.subtract(before, image, dtype=np.float32)).mean()
            for image in (after, *map(after.transpose, Image.Transpose))
        )
        if 2 * min(turned) < upright:
            return "shows the picture before turned or mirrored, as one of the two lacks its EXIF orientation"
    return ""


# --- Readers ------------------------------------------------------------------------------------------------


# `--columns` of every program that reads datasets.
COLUMNS: dict[str, Any] = {
    "nargs": 3,
    "metavar": ("BEFORE", "AFTER", "INSTRUCTION"),
    "help": "the dataset's names of these columns, or keys of its metadata (default: those it is known by)",
}


def read_pairs(
    source: str | Path, split: str = "train", columns: Sequence[str] | None = None
) -> list[EditPair]:
    """The edit pairs of one split of a dataset, in the first of these layouts that `source` has:

    - `read_folder`: `source/<split>/metadata.jsonl` (or `.csv`), or one in each of the split's subfolders, as
      `make_dataset.py` writes; or `source/metadata.jsonl` (a folder that is itself a split, whatever `split`
      says);
    - `read_instruct_pix2pix`: `source/seeds.json`;
    - `read_table`: a folder of `Dataset.save_to_disk`, one with Parquet or Arrow files, whose names tell
      their splits, or a hub id `owner/name`.

    columns: names of the columns of pictures before, pictures after and instructions; None for those that
    each layout is known by.

    Raises DatasetError, one line, for a dataset that is missing, malformed or empty, or leads out of its
    folder: it may come from a stranger.
    """
    root = Path(source)
    # A mistyped path must not be looked up on the hub: without a network that takes half a minute.
    if not root.is_dir() and (root.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source))):
        raise DatasetError(f"{source}: no such folder; give a dataset's folder or its hub id, owner/name")
    try:
        folder = Path(_Inside(root).path(split))
    except ValueError as error:
        raise DatasetError(f"{source}: split {error}") from None
    if any(_metadata(folder, shards) for shards in ("", "*/")):
        pairs = read_folder(folder, columns)
    elif _metadata(root):
        pairs = read_folder(root, columns)
    elif (root / "seeds.json").is_file():
        if columns:
            raise DatasetError(f"{source}: seeds.json has no columns; leave --columns out")
        pairs = read_instruct_pix2pix(root, split)
    else:
        try:
            pairs = read_table(_load_table(source, split), columns)
        except DatasetError as error:
            raise DatasetError(f"{source}: {error}") from None
    if not pairs:
        raise DatasetError(f"{source}: split {split!r} is empty; give two or more edit pairs an instruction")
    return pairs


_KEYS = ("input_file_name", "output_file_name", "instruction", "input_caption", "output_caption")
_CLASSES = ("input_classes_file_name", "output_classes_file_name")


def _metadata(folder: Path, shards: str = "") -> list[Path]:
    """The files of metadata in a folder, or in its subfolders ("*/"), in the order of these."""
    return sorted(path for kind in ("jsonl", "csv") for path in folder.glob(f"{shards}metadata.{kind}"))


def read_folder(folder: str | Path, columns: Sequence[str] | None = None) -> list[EditPair]:
    """One split in the ImageFolder convention: `metadata.jsonl` has one JSON object a line, an edit pair.
    Of a key that is there twice the last counts. A line has less than 1 MiB. `metadata.csv` has the same in a
    table whose first row names the keys.

    Where the folder has no such file, its subfolders are shards, each with its own, read in the order of
    their names. The keys are `input_file_name` and `output_file_name` (relative, inside the folder that holds
    the file), `instruction`, or the three of `columns`; at will `input_caption`, `output_caption` and others.
    `input_classes_file_name`, `output_classes_file_name` are grey pictures of 8 bits, of the pictures' size,
    whose levels tell what each pixel shows. Raises DatasetError, which names file and line.
    """
    root = Path(folder)
    files = _metadata(root) or _metadata(root, "*/") or [root / "metadata.jsonl"]
    if len({file.parent for file in files}) < len(files):
        raise DatasetError(f"{root}: metadata.jsonl and metadata.csv lie in one folder; keep one of the two")
    return [pair for file in files for pair in _read_metadata(root, file, tuple(columns or _KEYS[:3]))]


def _read_metadata(root: Path, metadata: Path, columns: tuple[str, ...]) -> Iterator[EditPair]:
    where, is_csv = str(metadata), metadata.suffix == ".csv"
    try:
        _Inside(root).path(metadata.relative_to(root).as_posix())
        inside, known = _Inside(metadata.parent), {*columns, *_KEYS[3:], *_CLASSES}
        lines = csv_rows(metadata) if is_csv else lines_of(metadata)
        for where, line in lines:  # noqa: B007  # what stumbles names it
            row = _object(line if is_csv else parse_json(line), *columns)
            before, after, instruction = (row[key] for key in columns)
            captions = _caption(row.get("input_caption")), _caption(row.get("output_caption"))
            extra = {key: value for key, value in row.items() if key not in known}
            if is_csv:
                extra = {key: _number(text) for key, text in extra.items()}
            told = all(row.get(key) for key in _CLASSES)
            classes = tuple(inside.path(row[key]) for key in _CLASSES) if told else None
            files = inside.path(before), inside.path(after)
            yield EditPair(*files, _instruction(instruction), *captions, extra, classes)
    except DatasetError:
        raise
    except (OSError, ValueError) as error:
        raise DatasetError(f"{where}: {_reason(error)}") from None


def read_instruct_pix2pix(root: str | Path, split: str = "train") -> list[EditPair]:
    """The dataset of InstructPix2Pix as it was generated, with several pairs (seeds) of an instruction.

    `seeds.json` lists [folder, [seed, …]]; each folder holds `prompt.json` with "edit", "input" and
    "output", and the pictures `<seed>_0.jpg` (before) and `<seed>_1.jpg` (after). No split lies on disk: as
    in the file `edit_dataset.py` of timothybrooks/instruct-pix2pix, the first 90 % of the folders are
    `train`, the next 5 % `val`, the last 5 % `test` (Choice: rounded, so that a single folder is `train`).
    Raises DatasetError, which names the file.
    """
    cuts = {"train": (0, 0.9), "val": (0.9, 0.95), "validation": (0.9, 0.95), "test": (0.95, 1)}
    if split not in cuts:
        raise DatasetError(f"{root}: no split {split!r}; this layout has train, val and test")
    inside, pairs, where = _Inside(root), [], Path(root) / "seeds.json"
    try:
        listing = read_json(where, _LONGEST_FILE)
        if not isinstance(listing, list):
            raise ValueError("not a list of [folder, [seed, …]]")
        begin, end = (round(cut * len(listing)) for cut in cuts[split])
        for entry in listing[begin:end]:
            where = Path(root) / "seeds.json"
            match entry:
                case [str(folder), [*seeds]]:
                    where = Path(inside.path(f"{folder}/prompt.json"))
                case _:
                    raise ValueError(f"{str(entry)[:80]} is not [folder, [seed, …]]")
            prompt = _object(read_json(where), "edit")
            captions = _caption(prompt.get("input")), _caption(prompt.get("output"))
            for seed in seeds:
                files = (inside.path(f"{folder}/{seed}_{k}.jpg") for k in (0, 1))
                pairs.append(EditPair(*files, _instruction(prompt["edit"]), *captions))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{where}: {_reason(error)}") from None
    return pairs


def read_table(table: Any, columns: Sequence[str] | None = None) -> list[EditPair]:
    """The rows of a `datasets.Dataset`; pictures stay encoded until they are asked for.

    Columns: `original_image`, `input_image` or `source_img`; `edited_image` or `target_img`; `edit_prompt` or
    `instruction`; or the three of `columns`, in this order. At will captions, in `original_prompt` or
    `input_caption`, and `edited_prompt` or `output_caption`. Other columns of texts and numbers go to
    `extra`. Raises DatasetError, which names the columns or the row.
    """
    import datasets  # here, because it takes a second to import and only tables need it

    def find(*names: str) -> str | None:
        return next((name for name in names if name in table.column_names), None)

    known = ("original_image", "input_image", "source_img"), ("edited_image", "target_img")
    known = *known, ("edit_prompt", "instruction")
    before, after, told = (find(*names) for names in ([[name] for name in columns] if columns else known))
    texts = [told, find("original_prompt", "input_caption"), find("edited_prompt", "output_caption")]
    if not (before and after and told):
        needed = columns or [" or ".join(names) for names in known]
        has = ", ".join(table.column_names)
        raise DatasetError(f"needs columns {', '.join(needed)}; has {has}; name yours with --columns")
    encoded = datasets.Image(decode=False)
    try:
        images = [table.select_columns(name).cast_column(name, encoded) for name in (before, after)]
    except Exception as error:  # the classes of pyarrow and datasets, by the column's type
        raise DatasetError(f"{before} and {after} are not columns of images ({_reason(error)})") from None
    plain = [
        name
        for name, kind in table.features.items()
        if isinstance(kind, datasets.Value) and kind.dtype != "binary" and name not in (before, after)
    ]
    values = table.select_columns(plain)[:]  # column -> list, much faster than row by row
    texts = [values.pop(name, [None] * len(table)) for name in texts]
    pairs = []
    for row, (instruction, *captions) in enumerate(zip(*texts)):
        files = (TableImage(image, row) for image in images)
        extra = {name: column[row] for name, column in values.items()}
        try:
            pairs.append(EditPair(*files, _instruction(instruction), *map(_caption, captions), extra))
        except ValueError as error:
            raise DatasetError(f"row {row}: {error}") from None
    return pairs


def _load_table(source: str | Path, split: str) -> Any:
    """A split of a table, local or on the hub, by the `datasets` library, which runs no code from it."""
    import datasets

    root = Path(source)
    try:
        if not root.is_dir():
            return datasets.load_dataset(str(source), split=split)
        files = _table_files(root)
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            return _load_saved(root, split)
        if not files:
            raise DatasetError(
                f"has neither {split}/metadata.jsonl or .csv nor seeds.json, Parquet or Arrow files"
            )
        # Told its files, the library reads neither a card, which may name others, nor another format.
        kind, files = files[0].suffix[1:], [file for file in files if file.suffix == files[0].suffix]
        files = [str(file) for file in _of_split(files, root, split)]
        for file in files:
            _check_table(file)
        return datasets.load_dataset(kind, data_files={split: files}, split=split)
    except DatasetError:
        raise
    except Exception as error:  # the classes of the hub's client, of pyarrow and of datasets
        raise DatasetError(f"cannot load split {split!r} ({_reason(error)})") from None


def _table_files(root: Path) -> list[Path]:
    """The Parquet files, then the Arrow files of a folder, three levels deep. Raises DatasetError where
    something is no file, or lies outside."""
    paths = [path for depth in ("*", "*/*", "*/*/*") for path in sorted(root.glob(depth))]
    tables = [path for kind in (".parquet", ".arrow") for path in paths if path.suffix == kind]
    for path in paths if tables else ():
        is_one = path.is_file() or path.is_dir()
        if not is_one or not path.resolve().is_relative_to(root.resolve()):
            raise DatasetError(f"{path.relative_to(root)} is no file inside the folder")
    return tables


def _of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """Those with the split's name in theirs, as a word; `train` has all where no name tells another split."""

    def named(words: str) -> list[Path]:
        word = re.compile(rf"(?<![^\W_])({words})(?![^\W_])")
        return [file for file in files if word.search(str(file.relative_to(root)))]

    chosen = named(re.escape(split))
    if not chosen and split == "train" and not named("val|valid|validation|dev|test|testing|eval|evaluation"):
        chosen = files
    if not chosen:
        raise DatasetError(f"no file of split {split!r}")
    if strange := [file.name for file in chosen if re.search(r"[*?\[\]:]", str(file.relative_to(root)))]:
        raise DatasetError(f"{strange[0]}: a name that could mean other files")
    return chosen


def _check_table(file: str | Path) -> None:
    """Raises ValueError for a Parquet or Arrow file that would fill memory or disk. Small ones can: pages are
    compressed, one value of a dictionary stands in any number of rows, a class label is a list of names."""
    from pyarrow import ipc, parquet

    if not os.path.isfile(file):
        raise ValueError(f"{file}: not a file")
    if Path(file).suffix == ".parquet":
        table = parquet.ParquetFile(file)
        schema, rows = table.schema_arrow, table.metadata.num_rows
    else:
        messages = _messages(str(file))
        schema = ipc.read_schema(next(messages))
        batches = [_record_batch(message.metadata.to_pybytes()) for message in messages]
        if any(is_packed for _, is_packed in batches):
            raise ValueError(f"{Path(file).name} is compressed; save it without, or as Parquet")
        rows = sum(length for length, _ in batches)
    if rows * 64 > os.path.getsize(file):
        raise ValueError("more rows than pictures can lie in the files")
    if Path(file).suffix == ".parquet" and _is_bomb(table, 2**20 + 100 * os.path.getsize(file)):
        raise ValueError(f"{Path(file).name} would unpack to more than a hundred times its size")
    _check_features(parse_json((schema.metadata or {}).get(b"huggingface", b"null")))


def _is_bomb(table: Any, most: int) -> bool:
    """Whether a ParquetFile holds more than `most` bytes, unpacked."""
    groups = [table.metadata.row_group(k) for k in range(table.num_row_groups)]
    columns = [group.column(k) for group in groups for k in range(group.num_columns)]
    repeated = 0
    for column in columns:
        if column.has_dictionary_page:  # of so many bytes at most, any of which may be in every row
            pages = column.total_compressed_size - (column.data_page_offset - column.dictionary_page_offset)
            repeated += column.num_values * max(0, column.total_uncompressed_size - pages)
    if repeated > most:  # it may be less by far: so it is looked at
        repeated = 0
        for batch in table.iter_batches(16):
            repeated += batch.nbytes
            if repeated > most:
                break
    return max(repeated, sum(column.total_uncompressed_size for column in columns)) > most


def _messages(file: str) -> Iterator[Any]:
    """Those of an Arrow file or stream; their bodies are not read."""
    from pyarrow import ipc, memory_map

    with memory_map(file) as source:
        source.seek(8 if source.read(6) == b"ARROW1" else 0)
        with contextlib.suppress(EOFError):
            while True:
                yield ipc.read_message(source)


def _record_batch(data: bytes) -> tuple[int, bool]:
    """How many rows an Arrow message has, and whether it is compressed, or a dictionary. Its metadata is a
    flatbuffer: a table Message, whose second and third fields are the kind and a table RecordBatch, of which
    the first and the fourth are the length and the compression."""

    def field(table: int, k: int) -> int:
        vtable = table - unpack_from("<i", data, table)[0]
        is_there = 2 * k + 4 < unpack_from("<H", data, vtable)[0]
        at = unpack_from("<H", data, vtable + 2 * k + 4)[0] if is_there else 0
        return at and table + at

    message = unpack_from("<I", data)[0]
    header = field(message, 2)
    header += unpack_from("<I", data, header)[0]
    length = field(header, 0)
    is_batch = data[field(message, 1)] == 3
    return unpack_from("<q", data, length)[0] if length else 0, not is_batch or field(header, 3) > 0


def _check_features(value: Any) -> None:
    """Raises ValueError for a class label of very many names, of which the library makes a list."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and isinstance(value.get("num_classes"), int) and value["num_classes"] > 2**16:
        raise ValueError(f"num_classes of {value['num_classes']:.0e} is too large")
    for each in inner:
        _check_features(each)


def _load_saved(root: Path, split: str) -> Any:
    """What `save_to_disk` has written, by names that lead out of no folder."""
    import datasets

    if (root / "dataset_dict.json").is_file():
        splits = _object(read_json(root / "dataset_dict.json"), "splits")["splits"]
        if split not in splits:
            raise DatasetError(f"no split {split!r}, only {', '.join(splits)}")
        root = Path(_Inside(root).path(split))
    state, info = (read_json(root / name) for name in ("state.json", "dataset_info.json"))
    _check_features(info)
    for file in _object(state, "_data_files")["_data_files"]:
        _check_table(_Inside(root).path(file["filename"]))
    table = datasets.load_from_disk(str(root))
    table.data.validate(full=True)  # a damaged file could have it read anywhere in memory
    return table


class _Inside:
    """Joins the names in metadata to their folder and lets none lead out of it: data may come from strangers.

    Absolute names and `..` are known by their spelling. For symbolic links each subfolder is listed once,
    which is faster by far than resolving every name of 450,000 pairs.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.realpath(root)
        self.folders = {"": self.root}  # a name's folders, as in "a/b/" -> their verified full path
        self.links: dict[str, frozenset[str]] = {}  # full path of a folder -> the symbolic links in it

    def path(self, name: object) -> str:
        """The full path of `name`, whether it exists or not. Raises ValueError with the reason."""
        name = name.replace("\\", "/") if isinstance(name, str) else str(name) + "/"
        cut = name.rfind("/") + 1
        if name[:cut] not in self.folders:
            path = self.root
            for part in name[: cut - 1].split("/"):
                path = self._step(path, part, name)
            self.folders[name[:cut]] = path
        return self._step(self.folders[name[:cut]], name[cut:], name)

    def _step(self, folder: str, part: str, name: str) -> str:
        if part in ("", "..") or part[1:2] == ":" or "\0" in part:
            raise ValueError(f"{name[:80]!r} is not a relative path inside the folder")
        if folder not in self.links:
            try:
                with os.scandir(folder) as entries:
                    self.links[folder] = frozenset(entry.name for entry in entries if entry.is_symlink())
            except (OSError, ValueError):  # no such folder, as opening the picture will say
                self.links[folder] = frozenset()
        path = f"{folder}/{part}"
        if part in self.links[folder] and not Path(os.path.realpath(path)).is_relative_to(self.root):
            raise ValueError(f"{name[:80]!r} is a symbolic link out of the folder")
        return path


# Bytes of a line of JSON, and of a file: real lines have some hundred, InstructPix2Pix's seeds.json has some
# ten million. What a hostile one says can take twenty times as much memory.
_LONGEST, _LONGEST_FILE = 1 << 20, 1 << 26


def lines_of(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Where each line of a file is, `path:number`, and its bytes; blank ones are left out.

    Raises OSError, and DatasetError for a line of 1 MiB or more and for what is no file.
    """
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if len(line) == _LONGEST:
                raise DatasetError(f"{path}:{number}: a line of {_LONGEST:,} bytes or more")
            if not line.isspace():
                yield f"{path}:{number}", line


def csv_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a CSV file ends, `path:number`, and its cells by their columns' names, without empty
    ones.

    Raises OSError, and DatasetError as `lines_of` and for a row of more cells than columns.
    """
    where = str(path)

    def lines() -> Iterator[str]:
        nonlocal where
        for where, line in lines_of(path):  # noqa: B007  # what stumbles names it
            yield line.decode("utf-8-sig")

    try:
        for row in csv.DictReader(lines(), strict=True):
            if None in row:
                raise DatasetError(f"{where}: more cells than columns")
            yield where, {name: cell for name, cell in row.items() if cell}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"{where}: {error}") from None


def read_json(path: str | Path, most: int = _LONGEST) -> Any:
    """What a file says in JSON. Raises OSError, and ValueError for a file of `most` bytes or more too."""
    with _open(path) as file:
        text = file.read(most)
    if len(text) == most:
        raise ValueError(f"{most:,} bytes or more")
    return parse_json(text)


def _open(path: str | Path) -> io.BufferedReader:
    """A file: no pipe, which could keep one waiting, and no device, which could have no end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DatasetError(f"{path}: not a file")
    return open(path, "rb")


def parse_json(text: bytes) -> Any:
    """What a text says in JSON. Raises ValueError, whose message is one line, for whatever it may be."""
    try:
        return json.loads(text.removeprefix(b"\xef\xbb\xbf").decode())  # without a byte order mark
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _object(value: Any, *needed: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    for key in needed:
        if key not in value:
            raise ValueError(f"has no {key!r}, only {', '.join(map(repr, value)) or 'an empty object'}"[:400])
    return value


LONGEST_INSTRUCTION = 2000  # a language model's time and memory grow with the square of it


def _instruction(text: object) -> str:
    """Choice: pairs share an instruction when its words are the same, whatever the blanks between them."""
    words = text.split() if isinstance(text, str) else []
    if not words:
        raise ValueError("the instruction is empty or not a text")
    if len(text) > LONGEST_INSTRUCTION:
        raise ValueError(f"an instruction of more than {LONGEST_INSTRUCTION} letters")
    text.encode()  # raises ValueError for half a surrogate pair, which no tokenizer reads
    return sys.intern(" ".join(words))  # all pairs of an instruction hold one and the same string


def _number(text: str) -> Any:
    """The number that a cell of a CSV file spells, or the text itself."""
    with contextlib.suppress(ValueError):
        value = parse_json(text.encode())
        return value if isinstance(value, int | float) else text
    return text


def _caption(text: object) -> str | None:
    if text is not None and not isinstance(text, str):
        raise ValueError(f"a caption is a text, not {str(text)[:80]}")
    (text or "").encode()  # as an instruction
    return text


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.split("\n")[0]


# --- A worked example ---------------------------------------------------------------------------------------


def _demo() -> None:
    torch.manual_seed(0)
    panels = [torch.rand(1, 2, 2) * 2 - 1 for _ in range(4)]
    grid = compose_grid(*panels)
    condition = mask_query(grid)
    for name, image in {
        "Img_train": grid,
        "Img_VPcon = mask_query(Img_train)": condition,
        "drop_example(Img_VPcon)": drop_example(condition),
    }.items():
        print(f"{name}, four panels of (1, 2, 2) in {tuple(image.shape)}:")
        print("\n".join("".join(f"{value:8.2f}" for value in row) for row in image[0].tolist()))
    same = all(torch.equal(panel, back) for panel, back in zip(panels, split_grid(grid)))
    print(f"split_grid gives the four panels back: {same}\n")

    instructions = ["make it night"] * 3 + ["move the cup to the left"] * 2 + ["add a hat"]
    pairs = [EditPair(f"{k}_before.png", f"{k}_after.png", text) for k, text in enumerate(instructions)]
    dataset = VisualPromptDataset(pairs, size=64)
    print(f"{len(pairs)} pairs, {len(dataset)} usable; the example row in epochs 0 to 3 of")
    for i, pair in enumerate(dataset.pairs):
        draws = [dataset.draw(i, epoch) for epoch in range(4)]
        rows = ", ".join(f"{draw.example}{' flipped' if draw.flip else ''}" for draw in draws)
        print(f"    query {i} ({pair.instruction}): {rows}")


if __name__ == "__main__":
    _demo()
