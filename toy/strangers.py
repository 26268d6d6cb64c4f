"""Edits pictures that the toy world's renderer did not make, and shows them all.

    python -m toy.strangers --out docs/strangers.png

The inputs are in `strangers.txt`, where houses, fish and faces are set down by hand, shape by shape. The
example pairs are the renderer's, of random scenes. Nobody knows the right answers: look.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

import backbone
from apps.pipeline import InstructGIEPipeline, seeded
from pictures.answers import panel_rows, save_png
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


@backbone.one_line_errors("toy.strangers")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("toy.strangers", __doc__)
    parser.add_argument("model", nargs="?", default=backbone.preset("toy").editor, help="an editor's folder")
    parser.add_argument("--out", type=Path, default=Path("out/strangers.png"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    pipe = InstructGIEPipeline.from_pretrained(args.model).to(backbone.pick_device(args.device))
    rng = random.Random(0)
    edits, pictures = map(list, zip(*strangers()))
    examples = [example(edit, rng) for edit in edits]
    words = [edit.instruction for edit in edits]
    noise = seeded(list(range(len(edits))))
    answers = pipe(words, pictures, examples, generator=noise, unify=False).images
    panels = [[*pair, picture, answer] for pair, picture, answer in zip(examples, pictures, answers)]
    save_png(panel_rows(list(zip(words, panels)), (), side=80, columns=3), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
