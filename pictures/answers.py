"""Answers as files: which pictures are edited, where each answer goes, and sheets of labelled pictures."""

import json
import math
import os
import sys
import textwrap
from collections.abc import Iterable
from itertools import chain
from itertools import count as count_from
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from disk import atomic_write
from pictures.files import ImageError, load_image


def plan_answers(
    sources: list[Path], output: Path, count: int, pair: list[Path]
) -> tuple[list[Path], list[list[Path]]]:
    """The pictures to edit, and where the `count` answers to each go.

    Raises ValueError as `find_pictures` does; where `output` is a file and cannot take all answers; and where
    an answer, or its grid, would overwrite a picture that is read or left out.
    """
    inputs, left_out = find_pictures(sources)
    read = same_files(inputs, left_out, pair)
    is_file = output.suffix.lower() in Image.registered_extensions() and not output.is_dir()
    if is_file and (output.suffix.lower() != ".png" or len(inputs) * count > 1):
        raise ValueError(f"--output {output}: one answer goes to a .png file, several go to a folder")
    taken, targets = set(), []
    for path in inputs:
        for again in chain([""], (f"-{n}" for n in count_from(2))):  # two pictures may have one stem
            stems = [path.stem + again] if count == 1 else [f"{path.stem}{again}_{k}" for k in range(count)]
            paths = [output] if is_file else [output / f"{stem}.png" for stem in stems]
            written = same_files(paths, map(grid_path, paths))
            if written & read:
                raise ValueError(f"--output {output}: an answer would overwrite a picture that is read")
            if not written & taken:
                break
        above = next(folder for folder in paths[0].parents if folder.exists())
        if not above.is_dir():
            raise ValueError(f"--output {output}: {above} is a file; give a folder's name")
        if folders := [path for path in paths if path.is_dir()]:
            raise ValueError(f"--output {output}: {folders[0]} cannot be written, a folder is there")
        taken |= written
        targets.append(paths)
    return inputs, targets


def same_files(*paths: Iterable[Path]) -> set[str]:
    """Equal names for equal files, also where capitals do not count, as on macOS."""
    return {os.path.realpath(path).casefold() for path in chain(*paths)}


def find_pictures(sources: list[Path]) -> tuple[list[Path], list[Path]]:
    """What is edited: the files as they are, and of a folder all that are pictures, sorted; and what is left
    out of the folders, each named on stderr. Of hidden files nothing is said.

    Raises ValueError for a file that is no picture, and for a folder without one.
    """
    inputs: list[Path] = []
    left_out: list[Path] = []
    for source in sources:
        is_folder = source.is_dir()
        found = sorted(path for path in source.iterdir() if path.name[0] != ".") if is_folder else [source]
        before = len(inputs)
        for path in found:
            try:
                load_image(path)  # a broken picture should show before models are loaded
                inputs.append(path)
            except ImageError as error:
                if not is_folder:
                    raise
                left_out.append(path)
                print(f"left out: {error}", file=sys.stderr, flush=True)
        if len(inputs) == before:
            raise ValueError(f"{source}: no picture in this folder")
    return inputs, left_out


def grid_path(path: Path) -> Path:
    return path.with_stem(f"{path.stem}_grid")


def labelled_grid(
    pair: tuple[Image.Image, Image.Image] | None,
    query: Image.Image,
    answer: Image.Image,
    instruction: str,
    panel: int,
) -> Image.Image:
    """Example before and after, input and answer, as the model has them, but enlarged and labelled.

    pair: None is grey, as the model has that, too. panel: P; shown are squares of a multiple of it, of 192
    pixels or more, each picture as large as fits.
    """
    side, line, font = panel * math.ceil(192 / panel), 20, ImageFont.load_default(14)
    words = textwrap.wrap(instruction, width=side // 4)  # a letter is about 7 pixels wide
    sheet = Image.new("RGB", (2 * side, 2 * (side + line) + len(words) * line), "white")
    draw = ImageDraw.Draw(sheet)
    pictures = *(pair or [Image.new("RGB", (panel, panel), "grey")] * 2), query, answer
    for i, label in enumerate(("example before", "example after", "input", "answer")):
        x, y = i % 2 * side, i // 2 * (side + line)
        draw.text((x + 4, y + 2), label, "black", font)
        seen = ImageOps.contain(pictures[i], (panel, panel), Image.Resampling.LANCZOS)
        shown = ImageOps.contain(seen, (side, side), Image.Resampling.NEAREST)
        sheet.paste(shown, (x + (side - shown.width) // 2, y + line + (side - shown.height) // 2))
    for i, text in enumerate(words):
        draw.text((4, 2 * (side + line) + i * line + 2), text, "black", font)
    return sheet


def panel_rows(
    rows: list[tuple[str, list[Image.Image]]], names: tuple[str, ...], side: int, columns: int
) -> Image.Image:
    """Words above panels of `side` pixels for each row, `columns` rows side by side; `names` heads them."""
    line, gap, font = 16, 12, ImageFont.load_default(size=11)
    head = line if names else 0
    width, height = max(len(panels) for _, panels in rows) * side + gap, side + line
    size = columns * width + gap, -(-len(rows) // columns) * height + head + gap
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for k, (words, panels) in enumerate(rows):
        x, y = gap + k % columns * width, head + k // columns * height
        for j, name in enumerate(names if k < columns else ()):
            draw.text((x + j * side + 2, 1), name, "grey", font)
        draw.text((x + 2, y + 1), words, "black", font)
        for j, panel in enumerate(panels):
            sheet.paste(panel.resize((side, side), Image.Resampling.BICUBIC), (x + j * side, y + line))
    return sheet


def save_png(image: Image.Image, path: Path, record: dict[str, Any] | None = None) -> None:
    """Writes the PNG whole or not at all, with `record` as JSON in its text chunk "instructgie"."""
    info = PngInfo()
    if record:
        info.add_text("instructgie", json.dumps(record, default=str))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: image.save(file, format="PNG", pnginfo=info))
