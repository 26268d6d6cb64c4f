"""Edits pictures that the toy world's renderer did not make, and shows them all.

    python -m toy.strangers --out docs/strangers.png

The inputs are in `strangers.txt`, where houses, fish and faces are set down by hand, shape by shape. The
example pairs are the renderer's, of scenes drawn by the seed. Nobody knows the right answers: look.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import backbone
from apps.pipeline import InstructGIEPipeline
from backbone import SAMPLING
from disk import atomic_write
from evaluation.evaluate import panel_rows
from pictures import image_to_tensor, tensor_to_image
from toy import world

PICTURES = Path(__file__).with_name("strangers.txt")


def strangers() -> Iterator[tuple[world.Edit, Image.Image]]:
    """Every picture of the file, PANEL × PANEL pixels, with the edit that it is to get."""
    for line in PICTURES.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            edit, background, shapes = (part.strip() for part in line.split("|"))
            yield world.Edit(*(word.strip() for word in edit.split("/"))), draw(background, shapes)


def draw(background: str, shapes: str) -> Image.Image:
    s = world.SUPERSAMPLING
    side = s * world.PANEL
    upper, lower = background.split()
    image = Image.new("RGB", (side, side), upper)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, side // 2, side, side), fill=lower)
    for shape in shapes.split(";"):
        kind, *numbers, colour = shape.split()
        numbers = [s * float(number) for number in numbers]
        if kind == "disc":
            x, y, r = numbers
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif kind == "line":
            pen.line(numbers[:-1], fill=colour, width=round(numbers[-1]))
        else:
            {"oval": pen.ellipse, "box": pen.rectangle, "poly": pen.polygon}[kind](numbers, fill=colour)
    return image.reduce(s)


def example(edit: world.Edit, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """A scene of the renderer's before and after the edit."""
    while True:
        scene = world.random_scene(rng)
        if (after := edit.apply(scene)) is not None:
            return world.render(scene), world.render(after)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.strangers", description="Edit pictures that the renderer did not make."
    )
    parser.add_argument("model", nargs="?", default=backbone.preset("toy").editor, help="an editor's folder")
    parser.add_argument("--out", type=Path, default=Path("out/strangers.png"))
    parser.add_argument("--pair-alone", action="store_true", help="without words")
    parser.add_argument("--seed", type=int, default=0, help="of the examples and the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    with backbone.one_line_errors("toy.strangers"):
        pipe = InstructGIEPipeline.from_pretrained(args.model).to(backbone.pick_device(args.device))
        rng = random.Random(args.seed)
        rows = [(edit, *example(edit, rng), picture) for edit, picture in strangers()]
        panels = torch.stack([torch.stack([image_to_tensor(p) for p in row[1:]]) for row in rows])
        words = ["" if args.pair_alone else edit.instruction for edit, *_ in rows]
        seeds = list(range(args.seed, args.seed + len(rows)))
        sampling = {name: pipe.settings[name] for name in SAMPLING}
        drawn = pipe.answer(panels[:, :2], None, panels[:, 2], words, seeds, **sampling)
        answers = [tensor_to_image(answer) for answer in drawn]
        lines = [(edit.instruction, [*shown, answer]) for (edit, *shown), answer in zip(rows, answers)]
        page = panel_rows(lines, (), side=80, columns=3)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.out, lambda file: page.save(file, format="PNG"))
        print(args.out)


if __name__ == "__main__":
    main()
