"""toy.strangers: fifty pictures by hand, each with an edit of the toy world, and what became of them."""

import random
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageOps

from toy import strangers, world


def test_every_picture_is_drawn_and_its_edit_exists():
    pictures = list(strangers.strangers())
    assert len(pictures) == 50
    assert {edit for edit, _ in pictures} <= set(world.every_edit())
    assert len({picture.tobytes() for _, picture in pictures}) == 50
    for _, picture in pictures:
        assert picture.size == (64, 64) and len(picture.getcolors(4096)) >= 3


def test_shapes_lie_where_they_are_set_down():
    picture = strangers.draw(
        "#ffffff #000000", "box 8 8 15 15 #ff0000; line 0 40 64 40 4 #00ff00; disc 50 12 4 #0000ff"
    )
    shown = np.asarray(picture)
    assert shown[12, 12].tolist() == [255, 0, 0] and shown[40, 30].tolist() == [0, 255, 0]
    assert shown[12, 50].tolist() == [0, 0, 255] and shown[12, 58].tolist() == [255, 255, 255]
    assert shown[31, 2].tolist() == [255, 255, 255] and shown[60, 2].tolist() == [0, 0, 0]


def test_an_example_shows_the_edit():
    edit = world.Edit("invert")
    before, after = (np.asarray(picture) for picture in strangers.example(edit, random.Random(0)))
    assert np.array_equal(255 - before, after)


def test_the_sheet_shows_example_input_and_answer(tmp_path, monkeypatch):
    asked = []

    class Inverter:
        def to(self, device):
            return self

        def __call__(self, instructions, queries, examples, generator, unify):
            asked.extend(instructions)
            assert len(queries) == len(examples) == len(generator) == 50
            return SimpleNamespace(images=[ImageOps.invert(query) for query in queries])

    monkeypatch.setattr(strangers.InstructGIEPipeline, "from_pretrained", lambda folder: Inverter())
    out = tmp_path / "new" / "sheet.png"
    strangers.main(["model", "--out", str(out)])
    assert len(asked) == 50 and all(asked)
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet).astype(int)
    query, answer = (pixels[16:96, 12 + 80 * k : 92 + 80 * k] for k in (2, 3))
    assert np.abs(255 - query - answer).max() <= 1
