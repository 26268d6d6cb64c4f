"""The toy world: scenes that are rendered, edits that are exact, and a dataset folder of both.

A scene is a background and one to three things, each in its own quarter of a 64×64 picture; a thing is a
flat shape or a face.  An edit is a rule from scene to scene, so the right answer to any instruction on any
scene is known to the pixel.  That is what photographs cannot give, and why the project's numbers are
measured here.

    python toy/world.py --out data/toy        # writes the splits in the public dataset format

Splits.  `train`; `seen`: new scenes, trained instructions; `unseen_combination`: the edit makes or touches a
(colour, shape) combination that no training picture holds; `unseen_task`: families of edits never trained.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

PANEL = 64  # pixels along a side of a picture
SUPERSAMPLING = 4  # drawn larger by this factor, then averaged: smooth edges

COLOURS = {
    "red": (222, 40, 40),
    "orange": (250, 145, 20),
    "yellow": (248, 222, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 225),
    "purple": (140, 50, 170),
    "pink": (255, 130, 190),
    "brown": (120, 72, 36),
}
BACKGROUNDS = {  # colour of the upper half, of the lower half
    "white": ((245, 245, 245), (245, 245, 245)),
    "grey": ((150, 150, 150), (150, 150, 150)),
    "black": ((25, 25, 25), (25, 25, 25)),
    "cream": ((250, 232, 190), (250, 232, 190)),
    "turquoise": ((80, 205, 200), (80, 205, 200)),
    "navy": ((25, 35, 95), (25, 35, 95)),
    "meadow": ((150, 205, 250), (115, 185, 95)),
    "desert": ((190, 220, 240), (225, 190, 130)),
}
SKINS = {"pale": (250, 222, 196), "tan": (224, 172, 105), "dark": (110, 70, 45)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
PLACES = {"top left": (17, 17), "top right": (47, 17), "bottom left": (17, 47), "bottom right": (47, 47)}
RADII = {"small": 7, "big": 12}
LOOKS = ("plain", "night", "inverted", "grey", "sepia", "blurred")
CLASSES = ("background", "face", *SHAPES)  # what the segment masks tell apart; the index is the class id

# No training picture holds one of these (every colour and every shape still occurs often).
HELD_OUT_COMBINATIONS = frozenset((colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS))
HELD_OUT_FAMILIES = frozenset({"sepia", "hat", "swap"})


# ----------------------------------------------------------------------------------------------------------
# Scenes


def _with_articles(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.  `colour` is a key of COLOURS, or of SKINS for a face."""

    kind: str
    colour: str
    place: str
    size: str = "big"
    jitter: tuple[int, int] = (0, 0)  # pixels away from the middle of its quarter
    mouth: str = "plain"  # of a face: plain, smile, frown
    glasses: bool = False
    hat: bool = False

    def caption(self) -> str:
        if self.kind != "face":
            return f"a {self.size} {self.colour} {self.kind} at the {self.place}"
        mood = {"plain": "", "smile": "smiling ", "frown": "frowning "}[self.mouth]
        extras = [name for name, on in (("glasses", self.glasses), ("a hat", self.hat)) if on]
        wearing = " with " + " and ".join(extras) if extras else ""
        return f"a {self.colour} {mood}face{wearing} at the {self.place}"


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.  `mirrored` flips the finished picture left to right."""

    background: str
    things: tuple[Thing, ...]
    look: str = "plain"
    mirrored: bool = False

    def find(self, kind: str) -> Thing | None:
        return next((thing for thing in self.things if thing.kind == kind), None)

    def put(self, old: Thing, **changes: object) -> Scene:
        """The scene with some properties of one thing changed."""
        things = (replace(thing, **changes) if thing is old else thing for thing in self.things)
        return replace(self, things=tuple(things))

    def empty_places(self) -> list[str]:
        taken = {thing.place for thing in self.things}
        return [place for place in PLACES if place not in taken]

    def caption(self) -> str:
        things = [thing.caption() for thing in self.things] or ["nothing"]
        look = {"plain": "", "night": ", at night", "inverted": ", inverted", "grey": ", in grey"}
        look |= {"sepia": ", in sepia", "blurred": ", blurred"}
        mirrored = ", mirrored" if self.mirrored else ""
        caption = f"{' and '.join(things)}, on a {self.background} background{look[self.look]}{mirrored}"
        return _with_articles(caption)

    def is_held_out(self) -> bool:
        return any((thing.colour, thing.kind) in HELD_OUT_COMBINATIONS for thing in self.things)


def scene_from_json(record: dict) -> Scene:
    things = tuple(Thing(**{**thing, "jitter": tuple(thing["jitter"])}) for thing in record["things"])
    return Scene(**{**record, "things": things})


def random_thing(rng: random.Random, kind: str, place: str) -> Thing:
    jitter = (rng.randint(-2, 2), rng.randint(-2, 2))
    if kind == "face":
        mouth = rng.choice(("plain", "smile", "frown"))
        return Thing(kind, rng.choice(list(SKINS)), place, "big", jitter, mouth, rng.random() < 0.3)
    return Thing(kind, rng.choice(list(COLOURS)), place, rng.choice(list(RADII)), jitter)


def random_scene(rng: random.Random) -> Scene:
    """One to three things of different kinds in different places; a face in about half of the scenes."""
    count = rng.choice((1, 2, 2, 3))
    kinds = rng.sample(SHAPES, count)
    if rng.random() < 0.45:
        kinds[0] = "face"
    places = rng.sample(list(PLACES), count)
    things = tuple(random_thing(rng, kind, place) for kind, place in zip(kinds, places))
    return Scene(rng.choice(list(BACKGROUNDS)), things)


def random_picture(rng: random.Random) -> Scene:
    """A scene as the toy *backbone* sees the world: in every look, hats included."""
    scene = random_scene(rng)
    face = scene.find("face")
    if face and rng.random() < 0.25:
        scene = scene.put(face, hat=True)
    return replace(scene, look=rng.choice(LOOKS) if rng.random() < 0.35 else "plain")


# ----------------------------------------------------------------------------------------------------------
# Drawing


def _polygon(kind: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape around (x, y) with radius r."""

    def star(points: int, inner: float, turn: float) -> list[tuple[float, float]]:
        angles = [turn + math.pi * k / points for k in range(2 * points)]
        radii = [r if k % 2 == 0 else inner * r for k in range(2 * points)]
        return [(x + q * math.sin(a), y - q * math.cos(a)) for a, q in zip(angles, radii)]

    if kind == "square":
        s = 0.86 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if kind == "triangle":
        return [(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)]
    if kind == "star":
        return star(5, 0.42, 0.0)
    if kind == "diamond":
        return [(x, y - 1.1 * r), (x + 0.7 * r, y), (x, y + 1.1 * r), (x - 0.7 * r, y)]
    if kind == "cross":
        a, b = 0.33 * r, 0.95 * r
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
        return [(x + u, y + v) for u, v in [*corners, (-b, -a), (-a, -a)]]
    if kind == "heart":
        turns = [2 * math.pi * k / 40 for k in range(40)]
        heart = [
            (
                16 * math.sin(t) ** 3,
                13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t),
            )
            for t in turns
        ]
        return [(x + r * u / 16, y - r * v / 15) for u, v in heart]
    raise ValueError(f"no polygon for {kind}")


def _draw_face(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    dark = (250, 250, 250) if thing.colour == "dark" else (30, 20, 20)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=SKINS[thing.colour])
    eye, pen = 0.15 * r, round(0.17 * r)
    for side in (-1, 1):
        ex, ey = x + side * 0.4 * r, y - 0.22 * r
        draw.ellipse((ex - eye, ey - eye, ex + eye, ey + eye), fill=dark)
        if thing.glasses:
            g = 0.34 * r
            draw.ellipse((ex - g, ey - g, ex + g, ey + g), outline=(20, 60, 200), width=pen)
    if thing.mouth == "plain":
        draw.line((x - 0.4 * r, y + 0.5 * r, x + 0.4 * r, y + 0.5 * r), fill=dark, width=pen)
    elif thing.mouth == "smile":
        draw.arc((x - 0.5 * r, y - 0.15 * r, x + 0.5 * r, y + 0.72 * r), 20, 160, fill=dark, width=pen)
    else:
        draw.arc((x - 0.5 * r, y + 0.38 * r, x + 0.5 * r, y + 1.2 * r), 205, 335, fill=dark, width=pen)
    if thing.hat:
        draw.rectangle((x - 0.62 * r, y - 1.3 * r, x + 0.62 * r, y - 0.62 * r), fill=(60, 20, 90))
        draw.rectangle((x - 1.0 * r, y - 0.8 * r, x + 1.0 * r, y - 0.58 * r), fill=(60, 20, 90))


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    s = SUPERSAMPLING
    x, y = (s * (c + j) for c, j in zip(PLACES[thing.place], thing.jitter))
    r = s * RADII[thing.size]
    if thing.kind == "face":
        _draw_face(draw, thing, x, y, r)
    elif thing.kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[thing.colour])
    elif thing.kind == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=COLOURS[thing.colour], width=round(0.38 * r))
    else:
        draw.polygon(_polygon(thing.kind, x, y, r), fill=COLOURS[thing.colour])


def _apply_look(image: Image.Image, look: str) -> Image.Image:
    if look == "blurred":
        return image.filter(ImageFilter.GaussianBlur(2.0))
    pixels = np.asarray(image, np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    if look == "night":
        pixels = pixels * np.array([0.28, 0.32, 0.55], np.float32) + np.array([0, 0, 18], np.float32)
    elif look == "inverted":
        pixels = 255 - pixels
    elif look == "grey":
        pixels = np.repeat(grey[..., None], 3, axis=-1)
    elif look == "sepia":
        pixels = grey[..., None] * np.array([1.05, 0.86, 0.62], np.float32)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def render(scene: Scene) -> Image.Image:
    """Draws a scene: an RGB picture of PANEL × PANEL pixels."""
    side = SUPERSAMPLING * PANEL
    upper, lower = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (side, side), upper)
    draw = ImageDraw.Draw(image)
    if lower != upper:
        draw.rectangle((0, side // 2, side, side), fill=lower)
    for thing in scene.things:
        _draw_thing(draw, thing)
    image = image.reduce(SUPERSAMPLING)
    if scene.look != "plain":
        image = _apply_look(image, scene.look)
    return ImageOps.mirror(image) if scene.mirrored else image


def render_classes(scene: Scene) -> np.ndarray:
    """Which class each pixel shows: (PANEL, PANEL) uint8 indices into CLASSES."""
    classes = np.zeros((PANEL, PANEL), np.uint8)
    for thing in scene.things:
        mask = Image.new("RGB", (SUPERSAMPLING * PANEL,) * 2)
        _draw_thing(ImageDraw.Draw(mask), thing)
        covered = np.asarray(mask.reduce(SUPERSAMPLING)).any(axis=-1)
        classes[covered] = CLASSES.index(thing.kind)
    return classes[:, ::-1].copy() if scene.mirrored else classes


# ----------------------------------------------------------------------------------------------------------
# Edits


@dataclass(frozen=True)
class Edit:
    """One edit.  What `target` and `value` mean depends on the family; see FAMILIES."""

    family: str
    target: str = ""
    value: str = ""

    def apply(self, scene: Scene) -> Scene | None:
        """The edited scene, or None where the edit cannot be made or would change nothing."""
        edited = FAMILIES[self.family].rule(scene, self.target, self.value)
        return None if edited == scene else edited

    @property
    def instruction(self) -> str:
        """The canonical wording, the standard form that language instruction unification aims at."""
        return self.worded(FAMILIES[self.family].canonical)

    def worded(self, template: str) -> str:
        return _with_articles(template.format(target=self.target, value=self.value))


def _change_thing(**changes: object) -> Callable[[Scene, str, str], Scene | None]:
    """A rule that sets properties of the target; the word "value" stands for the edit's value."""

    def rule(scene: Scene, target: str, value: str) -> Scene | None:
        thing = scene.find(target)
        if thing is None:
            return None
        return scene.put(thing, **{k: value if v == "value" else v for k, v in changes.items()})

    return rule


def _reshape(scene: Scene, target: str, value: str) -> Scene | None:
    thing = scene.find(target)
    return scene.put(thing, kind=value) if thing and not scene.find(value) else None


def _remove(scene: Scene, target: str, value: str) -> Scene | None:
    thing = scene.find(target)
    return replace(scene, things=tuple(t for t in scene.things if t is not thing)) if thing else None


def _add(scene: Scene, target: str, value: str) -> Scene | None:
    colour, kind = target.split()
    if scene.find(kind) or value not in scene.empty_places():
        return None
    return replace(scene, things=(*scene.things, Thing(kind, colour, value)))


def _move(scene: Scene, target: str, value: str) -> Scene | None:
    thing = scene.find(target)
    return scene.put(thing, place=value) if thing and value in scene.empty_places() else None


def _swap(scene: Scene, target: str, value: str) -> Scene | None:
    first, second = scene.find(target), scene.find(value)
    if not first or not second:
        return None
    return scene.put(first, colour=second.colour).put(second, colour=first.colour)


def _background(scene: Scene, target: str, value: str) -> Scene:
    return replace(scene, background=value)


def _look(scene: Scene, target: str, value: str) -> Scene:
    return replace(scene, look=value)


def _mirror(scene: Scene, target: str, value: str) -> Scene:
    return replace(scene, mirrored=not scene.mirrored)


@dataclass(frozen=True)
class Family:
    """A kind of edit: its rule, every (target, value) it takes, its canonical wording and how people say it.

    The last third of `sayings` (two at least) is held out of the toy language model's training.
    """

    rule: Callable[[Scene, str, str], Scene | None]
    arguments: tuple[tuple[str, str], ...]
    canonical: str
    sayings: tuple[str, ...]

    @property
    def trained_sayings(self) -> tuple[str, ...]:
        return self.sayings[: -max(2, len(self.sayings) // 3)]

    @property
    def held_out_sayings(self) -> tuple[str, ...]:
        return self.sayings[len(self.trained_sayings) :]


def _product(targets: tuple[str, ...] | list[str], values: tuple[str, ...] | list[str]) -> tuple:
    return tuple((target, value) for target in targets for value in values if target != value)


_EVERY_KIND = ("face", *SHAPES)
FAMILIES = {
    "recolour": Family(
        _change_thing(colour="value"),
        _product(SHAPES, list(COLOURS)),
        "make the {target} {value}",
        (
            "paint the {target} {value}",
            "the {target} should be {value}",
            "change the {target} to {value}",
            "colour the {target} {value}",
            "give the {target} a {value} colour",
            "i want a {value} {target} instead",
            "turn the {target} {value}",
            "recolour the {target} in {value}",
            "the {target} would look better in {value}",
        ),
    ),
    "reshape": Family(
        _reshape,
        _product(SHAPES, SHAPES),
        "turn the {target} into a {value}",
        (
            "replace the {target} with a {value}",
            "change the {target} into a {value}",
            "the {target} should become a {value}",
            "swap the {target} for a {value}",
            "make a {value} out of the {target}",
            "i want a {value} where the {target} is",
            "transform the {target} into a {value}",
            "let the {target} become a {value}",
        ),
    ),
    "remove": Family(
        _remove,
        _product(_EVERY_KIND, [""]),
        "remove the {target}",
        (
            "delete the {target}",
            "take away the {target}",
            "erase the {target}",
            "get rid of the {target}",
            "the {target} should disappear",
            "the picture looks better without the {target}",
            "take the {target} out",
            "i do not want to see the {target}",
        ),
    ),
    "add": Family(
        _add,
        _product([f"{colour} {shape}" for shape in SHAPES for colour in COLOURS], list(PLACES)),
        "add a {target} at the {value}",
        (
            "put a {target} at the {value}",
            "draw a {target} in the {value} corner",
            "place a {target} in the {value}",
            "there should be a {target} at the {value}",
            "i want a {target} at the {value}",
            "insert a {target} in the {value}",
            "at the {value} add a {target}",
            "show a {target} in the {value} corner",
        ),
    ),
    "move": Family(
        _move,
        _product(_EVERY_KIND, list(PLACES)),
        "move the {target} to the {value}",
        (
            "put the {target} at the {value}",
            "shift the {target} to the {value}",
            "the {target} should be at the {value}",
            "bring the {target} to the {value} corner",
            "the {target} belongs in the {value}",
            "place the {target} in the {value}",
            "let the {target} go to the {value}",
        ),
    ),
    "resize": Family(
        _change_thing(size="value"),
        _product(SHAPES, list(RADII)),
        "make the {target} {value}",
        (
            "the {target} should be {value}",
            "i want a {value} {target}",
            "let the {target} be {value}",
            "change the size of the {target} to {value}",
            "the {target} needs to be {value}",
            "resize the {target} until it is {value}",
        ),
    ),
    "background": Family(
        _background,
        _product([""], list(BACKGROUNDS)),
        "make the background {value}",
        (
            "change the background to {value}",
            "put it on a {value} background",
            "use a {value} background",
            "the background should be {value}",
            "set a {value} backdrop",
            "replace the background by {value}",
            "i prefer a {value} background",
        ),
    ),
    "night": Family(
        _look,
        (("", "night"),),
        "make it night",
        (
            "turn day into night",
            "maybe night view looks better",
            "it should be dark like at night",
            "show it at night",
            "let night fall",
            "as it would look at night",
        ),
    ),
    "invert": Family(
        _look,
        (("", "inverted"),),
        "invert the colours",
        (
            "make it a negative",
            "turn all colours into their opposites",
            "show the photographic negative",
            "invert everything",
            "i want inverted colours",
            "flip every colour to its opposite",
        ),
    ),
    "grey": Family(
        _look,
        (("", "grey"),),
        "make it grey",
        (
            "remove all colour",
            "turn it into black and white",
            "make it a black and white photo",
            "i want it without colours",
            "desaturate the picture",
            "drain the colour from it",
        ),
    ),
    "sepia": Family(
        _look,
        (("", "sepia"),),
        "make it sepia",
        (
            "give it an old photo look",
            "make it look like an old brown photo",
            "tone it in sepia",
            "i want a sepia picture",
            "make it look antique",
            "an aged sepia look please",
        ),
    ),
    "blur": Family(
        _look,
        (("", "blurred"),),
        "blur the picture",
        (
            "make it blurry",
            "make it out of focus",
            "soften everything",
            "i want a blurred picture",
            "defocus the picture",
            "let it look blurred",
        ),
    ),
    "mirror": Family(
        _mirror,
        (("", ""),),
        "mirror the picture",
        (
            "flip it horizontally",
            "reflect the picture",
            "show it in a mirror",
            "turn it the other way round",
            "mirror it",
            "flip the picture left to right",
        ),
    ),
    "smile": Family(
        _change_thing(mouth="smile"),
        (("face", ""),),
        "make the face smile",
        (
            "the face should look happy",
            "give the face a smile",
            "cheer the face up",
            "let the face smile",
            "i want a happy face",
            "put a smile on the face",
        ),
    ),
    "frown": Family(
        _change_thing(mouth="frown"),
        (("face", ""),),
        "make the face frown",
        (
            "the face should look sad",
            "give the face a frown",
            "make the face unhappy",
            "let the face frown",
            "i want a sad face",
            "put a frown on the face",
        ),
    ),
    "glasses": Family(
        _change_thing(glasses=True),
        (("face", ""),),
        "put glasses on the face",
        (
            "give the face glasses",
            "add glasses to the face",
            "the face should wear glasses",
            "the face needs glasses",
            "let the face wear spectacles",
            "i want glasses on the face",
        ),
    ),
    "hat": Family(
        _change_thing(hat=True),
        (("face", ""),),
        "put a hat on the face",
        (
            "give the face a hat",
            "add a hat to the face",
            "the face should wear a hat",
            "the face needs a hat",
            "let the face wear a hat",
            "i want a hat on the face",
        ),
    ),
    "swap": Family(
        _swap,
        tuple((a, b) for i, a in enumerate(SHAPES) for b in SHAPES[i + 1 :]),
        "swap the colours of the {target} and the {value}",
        (
            "exchange the colours of the {target} and the {value}",
            "give the {target} and the {value} each other's colour",
            "the {target} and the {value} should trade colours",
            "switch colours between the {target} and the {value}",
            "let the {target} and the {value} change colours with each other",
            "trade the colours of the {target} and the {value}",
        ),
    ),
}

_OPENINGS = ("", "", "", "please ", "could you ", "maybe ", "now ")


def every_edit() -> Iterator[Edit]:
    """All edits of the world, family by family."""
    for name, family in FAMILIES.items():
        for target, value in family.arguments:
            yield Edit(name, target, value)


@functools.cache
def _all_edits() -> tuple[Edit, ...]:
    return tuple(every_edit())


def candidates(scene: Scene) -> list[tuple[Edit, Scene]]:
    """Every edit that the renderer can make of this scene, with its result; 100 or more for a plain scene."""
    made = ((edit, edit.apply(scene)) for edit in _all_edits())
    return [(edit, result) for edit, result in made if result is not None]


def say(edit: Edit, rng: random.Random, held_out: bool = False) -> str:
    """The edit in one of the ways in which people say it."""
    family = FAMILIES[edit.family]
    sayings = family.held_out_sayings if held_out else family.trained_sayings
    return rng.choice(_OPENINGS) + edit.worded(rng.choice(sayings))


# ----------------------------------------------------------------------------------------------------------
# The dataset folder


@dataclass(frozen=True)
class Pair:
    before: Scene
    after: Scene
    edit: Edit
    instruction: str


def _applies(edit: Edit, scene: Scene, split: str) -> Scene | None:
    """The edited scene if this edit of this scene belongs to the split, else None."""
    after = edit.apply(scene)
    if after is None:
        return None
    held_out = scene.is_held_out() or after.is_held_out()
    return after if held_out == (split == "unseen_combination") else None


def edits_of(split: str) -> list[Edit]:
    """The edits a split is made of: held-out families in `unseen_task`, all others elsewhere."""
    return [edit for edit in _all_edits() if (edit.family in HELD_OUT_FAMILIES) == (split == "unseen_task")]


def _draw_pairs(edit: Edit, instruction: str, count: int, split: str, rng: random.Random) -> list[Pair]:
    """`count` pairs of one instruction, or [] where this split has no scene for it."""
    pairs: list[Pair] = []
    for _ in range(4000):
        if len(pairs) == count:
            break
        scene = random_scene(rng)
        after = _applies(edit, scene, split)
        if after is not None:
            pairs.append(Pair(scene, after, edit, instruction))
    return pairs if len(pairs) >= 2 else []


def draw_split(split: str, instructions: int, pairs_each: int, seed: int) -> list[Pair]:
    """The pairs of one split.  Families take turns, so that rare and common edits weigh about the same.

    A family of many edits gets a larger share than one of a single edit: by the square root of their number,
    and in `train` by its fourth root, for a smile takes as many examples to learn as colours do.
    """
    rng = random.Random(f"{split} {seed}")  # a string seeds the same on every machine
    edits: dict[str, list[Edit]] = {}
    for edit in edits_of(split):
        edits.setdefault(edit.family, []).append(edit)
    root = 4 if split == "train" else 2
    shares = [len(family) ** (1 / root) for family in edits.values()]
    pairs: list[Pair] = []
    said: set[str] = set()
    drawn = 0
    while drawn < instructions:
        family = edits[rng.choices(list(edits), shares)[0]]
        if split == "train":  # every edit in turn, and in a new wording while one is found
            edit = family[0]
            family.append(family.pop(0))
            sayings = [say(edit, rng) for _ in range(20)]
            instruction = next((words for words in sayings if words not in said), sayings[0])
        else:
            edit = rng.choice(family)
            instruction = say(edit, rng)
        group = _draw_pairs(edit, instruction, pairs_each, split, rng)
        if group:
            said.add(instruction)
            pairs += group
            drawn += 1
    return pairs


# Instructions and pairs of each. The paper has about 2,000, and 12,000 images; of ours in train some repeat,
# since there are only so many ways to ask for a smile.
SPLITS = {"train": (2000, 6), "seen": (300, 2), "unseen_combination": (300, 2), "unseen_task": (300, 2)}


def write_split(folder: Path, pairs: list[Pair]) -> None:
    """One folder with `metadata.jsonl` and pictures, in the public dataset format.

    Beyond the format's own keys each line keeps what `toy/score.py` needs: the family, the canonical wording,
    and the scene before the edit together with the edit's arguments. The segment masks are pictures whose
    grey levels are indices into CLASSES.
    """
    folder.mkdir(parents=True)
    lines = []
    for i, pair in enumerate(pairs):
        names = f"{i:06d}_before.png", f"{i:06d}_after.png"
        masks = f"{i:06d}_before_classes.png", f"{i:06d}_after_classes.png"
        for name, mask, scene in zip(names, masks, (pair.before, pair.after)):
            render(scene).save(folder / name, compress_level=1)
            Image.fromarray(render_classes(scene)).save(folder / mask, compress_level=1)
        record = {
            "input_file_name": names[0],
            "output_file_name": names[1],
            "input_classes_file_name": masks[0],
            "output_classes_file_name": masks[1],
            "instruction": pair.instruction,
            "input_caption": pair.before.caption(),
            "output_caption": pair.after.caption(),
            "family": pair.edit.family,
            "canonical": pair.edit.instruction,
            "edit": json.dumps(asdict(pair.edit)),
            "scene": json.dumps(asdict(pair.before)),
        }
        lines.append(json.dumps(record))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_dataset(out: Path, seed: int = 0, sizes: dict[str, tuple[int, int]] = SPLITS) -> None:
    """All splits below `out`; written beside it first, so that a killed run leaves nothing half-written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        for split, (instructions, pairs_each) in sizes.items():
            write_split(temporary / split, draw_split(split, instructions, pairs_each, seed))
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy world as a dataset folder.")
    parser.add_argument("--out", type=Path, default=Path("data/toy"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"world.py: error: {args.out} exists already; remove it or choose another --out")
    write_dataset(args.out, args.seed)
    for split in SPLITS:
        lines = (args.out / split / "metadata.jsonl").read_text().splitlines()
        print(
            f"{split:20} {len(lines):6} pairs, {len({json.loads(line)['canonical'] for line in lines})} edits"
        )


if __name__ == "__main__":
    main()
