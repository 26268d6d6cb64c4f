"""The toy world: scenes that are rendered, edits that are exact, and a dataset folder of both.

A scene is a background and one to three things, each in its own quarter of a 64×64 picture; a thing is a
flat shape or a face.  An edit is a rule from scene to scene, so the right answer to any instruction on any
scene is known to the pixel.  That is what photographs cannot give, and why the project's numbers are
measured here.

    python toy/world.py --out data/toy        # writes the splits in the public dataset format
    python toy/world.py --captions 40         # only prints captions, seeds for data_making.texts

Splits.  `train`; `seen`: new scenes, trained instructions; `unseen_combination`: the edit makes or touches a
(colour, shape) combination that no training picture holds; `unseen_task`: families of edits never trained.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageDraw

PANEL = 64  # pixels along a side of a picture
SUPERSAMPLING = 4  # drawn larger by this factor, then averaged: smooth edges

COLOURS = {
    "red": (222, 40, 40),
    "yellow": (248, 222, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 225),
    "purple": (140, 50, 170),
    "pink": (255, 130, 190),
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
HAIR = {"brown": (120, 72, 36), "yellow": COLOURS["yellow"]}  # of heads, beards and moustaches
HORN = (250, 145, 20)
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
PLACES = {"top left": (17, 17), "top right": (47, 17), "bottom left": (17, 47), "bottom right": (47, 47)}
RADII = {"small": 7, "big": 12}
FEATURES = (
    "glasses",
    "a beard",
    "a moustache",
    "a red nose",
    "pink cheeks",
    "ears",
    "brown hair",
    "yellow hair",
    "a crown",
    "a blue cap",
    "a headband",
    "a bow",
    "horns",
    "a scarf",
)
HATS = ("a purple hat", "a green hat", "a red hat")
VISIBLE = 8  # levels of 255 by which a pixel must differ, in any channel, to count as edited
OUTLINES = {"white": (250, 250, 250), "black": (10, 10, 10)}
CLASSES = ("background", "face", *SHAPES)  # what the segment masks tell apart; the index is the class id

# No training picture holds one of these (every colour and every shape still occurs often).
HELD_OUT_COMBINATIONS = frozenset((colour, SHAPES[(5 * i + 1) % 6]) for i, colour in enumerate(COLOURS))
HELD_OUT_FAMILIES = frozenset({"sepia", "frame", "hat", "swap"})


# ----------------------------------------------------------------------------------------------------------
# Scenes


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.  `colour` is a key of COLOURS, or of SKINS for a face."""

    kind: str
    colour: str
    place: str
    size: str = "big"
    jitter: tuple[int, int] = (0, 0)  # pixels away from the middle of its quarter
    outline: str = ""  # of a shape: a key of OUTLINES
    mouth: str = "plain"  # of a face: plain, smile, frown, open
    features: tuple[str, ...] = ()  # of a face: of FEATURES and HATS

    def caption(self) -> str:
        parts = [*self.features, *([f"a {self.outline} outline"] if self.outline else [])]
        details = " with " + " and ".join(parts) if parts else ""
        if self.kind != "face":
            return f"a {self.size} {self.colour} {self.kind}{details} at the {self.place}"
        mood = {"plain": "", "smile": "smiling ", "frown": "frowning ", "open": "surprised "}[self.mouth]
        return f"a {self.colour} {mood}face{details} at the {self.place}"


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    overlay: what lies over everything, see `_draw_overlay`. look: what is done to its pixels at last, see
    `_apply_look`. Both are said in words.
    """

    background: str
    things: tuple[Thing, ...]
    overlay: str = ""
    look: str = ""

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
        extras = [f", {part}" for part in (self.overlay and f"with {self.overlay}", self.look) if part]
        return f"{' and '.join(things)}, on a {self.background} background{''.join(extras)}"

    def is_held_out(self) -> bool:
        return any((thing.colour, thing.kind) in HELD_OUT_COMBINATIONS for thing in self.things)


def scene_from_json(record: dict) -> Scene:
    lists = ("jitter", "features")
    things = tuple(Thing(**{**thing, **{k: tuple(thing[k]) for k in lists}}) for thing in record["things"])
    return Scene(**{**record, "things": things})


def random_thing(rng: random.Random, kind: str, place: str) -> Thing:
    jitter = (rng.randint(-2, 2), rng.randint(-2, 2))
    if kind == "face":
        mouth = rng.choice(("plain", "smile", "frown"))
        features = (rng.choice(FEATURES),) if rng.random() < 0.3 else ()
        return Thing(kind, rng.choice(list(SKINS)), place, "big", jitter, mouth=mouth, features=features)
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


def random_edit(scene: Scene, rng: random.Random) -> Scene:
    """The scene after some edit: all families are as likely, and in a family all its edits."""
    while True:
        name = rng.choice(list(FAMILIES))
        edited = Edit(name, *rng.choice(FAMILIES[name].arguments)).apply(scene)
        if edited is not None:
            return edited


def random_picture(rng: random.Random) -> Scene:
    """A scene as the toy *backbone* sees the world: half of them after one edit or two, of any family."""
    scene = random_scene(rng)
    for _ in range(rng.choice((0, 0, 1, 2))):
        scene = random_edit(scene, rng)
    return scene


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
    skin, pen = SKINS[thing.colour], round(0.17 * r)

    def disc(u: float, v: float, radius: float, **style: object) -> None:
        """Centred so many radii of the face away from its middle."""
        draw.ellipse(
            (x + (u - radius) * r, y + (v - radius) * r, x + (u + radius) * r, y + (v + radius) * r), **style
        )

    hair = next((f.split()[0] for f in thing.features if f.endswith("hair")), None)
    if hair:
        disc(0, -0.12, 1.12, fill=HAIR[hair])
    if "ears" in thing.features:
        disc(-1, 0, 0.32, fill=skin)
        disc(1, 0, 0.32, fill=skin)
    disc(0, 0, 1, fill=skin)
    if hair:
        draw.pieslice((x - r, y - r, x + r, y + r), 205, 335, fill=HAIR[hair])
    if "a beard" in thing.features:
        draw.chord((x - r, y - r, x + r, y + r), 15, 165, fill=HAIR["brown"])
    for side in (-0.4, 0.4):
        disc(side, -0.22, 0.15, fill=dark)
        if "glasses" in thing.features:
            disc(side, -0.22, 0.34, outline=(20, 60, 200), width=pen)
        if "pink cheeks" in thing.features:
            disc(1.4 * side, 0.2, 0.22, fill=COLOURS["pink"])
    if thing.mouth == "plain":
        draw.line((x - 0.4 * r, y + 0.5 * r, x + 0.4 * r, y + 0.5 * r), fill=dark, width=pen)
    elif thing.mouth == "smile":
        draw.arc((x - 0.5 * r, y - 0.15 * r, x + 0.5 * r, y + 0.72 * r), 20, 160, fill=dark, width=pen)
    elif thing.mouth == "frown":
        draw.arc((x - 0.5 * r, y + 0.38 * r, x + 0.5 * r, y + 1.2 * r), 205, 335, fill=dark, width=pen)
    else:
        disc(0, 0.52, 0.24, fill=dark)
    if "a moustache" in thing.features:
        draw.rectangle((x - 0.5 * r, y + 0.2 * r, x + 0.5 * r, y + 0.38 * r), fill=HAIR["brown"])
    if "a red nose" in thing.features:
        disc(0, 0.12, 0.22, fill=COLOURS["red"])
    _draw_clothes(draw, thing, x, y, r)
    for hat in set(HATS).intersection(thing.features):
        colour = (60, 20, 90) if "purple" in hat else COLOURS[hat.split()[1]]
        draw.rectangle((x - 0.62 * r, y - 1.3 * r, x + 0.62 * r, y - 0.62 * r), fill=colour)
        draw.rectangle((x - 1.0 * r, y - 0.8 * r, x + 1.0 * r, y - 0.58 * r), fill=colour)


def _draw_clothes(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    """What a face wears of these; corners in radii of the face away from its middle."""
    crown = (-0.7, -0.65), (-0.7, -1.3), (-0.35, -0.95), (0, -1.35), (0.35, -0.95), (0.7, -1.3), (0.7, -0.65)
    half_bow, horn = ((0, -0.95), (0.6, -1.3), (0.6, -0.6)), ((0.85, -0.5), (1.0, -1.3), (0.4, -0.85))
    polygons = {
        "a crown": ("yellow", [crown]),
        "a headband": ("red", [((-0.88, -0.7), (0.88, -0.7), (0.95, -0.42), (-0.95, -0.42))]),
        "a bow": ("pink", [half_bow, [(-u, v) for u, v in half_bow]]),
        "horns": ("horn", [horn, [(-u, v) for u, v in horn]]),
        "a scarf": (
            "green",
            [((-0.8, 0.75), (0.8, 0.75), (0.8, 1.4), (0.35, 1.4), (0.35, 1.1), (-0.8, 1.1))],
        ),
        "a blue cap": ("blue", [((-0.2, -0.7), (1.3, -0.7), (1.3, -0.5), (-0.2, -0.5))]),
    }
    if "a blue cap" in thing.features:
        draw.pieslice((x - 0.9 * r, y - 1.3 * r, x + 0.9 * r, y + 0.3 * r), 180, 360, fill=COLOURS["blue"])
    for feature in thing.features:
        colour, parts = polygons.get(feature, ("", []))
        for corners in parts:
            fill = HORN if colour == "horn" else COLOURS[colour]
            draw.polygon([(x + u * r, y + v * r) for u, v in corners], fill=fill)


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill: object) -> None:
    if kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        draw.polygon(_polygon(kind, x, y, r), fill=fill)


def _draw_thing(image: Image.Image, thing: Thing) -> None:
    s, draw = SUPERSAMPLING, ImageDraw.Draw(image)
    x, y = (s * (c + j) for c, j in zip(PLACES[thing.place], thing.jitter))
    r = s * RADII[thing.size]
    if thing.kind == "face":
        _draw_face(draw, thing, x, y, r)
        return
    if thing.outline:
        _draw_shape(draw, thing.kind, x, y, r, OUTLINES[thing.outline])
        r -= 2 * s
    _draw_shape(draw, thing.kind, x, y, r, COLOURS[thing.colour])


def _draw_overlay(image: Image.Image, overlay: str) -> None:
    """Something over everything, from a frame to stripes; its colour is a word of `overlay`."""
    words, side, draw = overlay.split(), image.width, ImageDraw.Draw(image)
    fill = next(COLOURS[word] for word in words if word in COLOURS)
    step, width = side // 4, side // 16
    if "frame" in words:
        draw.rectangle((0, 0, side, side), outline=fill, width=3 * width // 2)
    elif "bar" in words:
        bars = {"top": (0, 0, side, 3 * width), "bottom": (0, side - 3 * width, side, side)}
        bars |= {"left": (0, 0, 3 * width, side), "right": (side - 3 * width, 0, side, side)}
        draw.rectangle(bars[words[-1]], fill=fill)
    elif "dots" in words:
        for x in range(step // 2, side, step):
            for y in range(step // 2, side, step):
                draw.ellipse((x - width, y - width, x + width, y + width), fill=fill)
    elif "diagonal" in words:
        for i in range(-side, side, step):
            draw.polygon([(i, 0), (i + width, 0), (i + width + side, side), (i + side, side)], fill=fill)
    else:  # stripes that are horizontal or vertical
        for i in range(0, side, step):
            draw.rectangle(
                (0, i, side, i + width) if "horizontal" in words else (i, 0, i + width, side), fill=fill
            )


_GREY = np.array([[0.299], [0.587], [0.114]], np.float32)


def _mix(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """pixels @ weights, of three channels (H, W, 3): term by term, because what a matrix product rounds to
    differs from machine to machine, and a level may hang on it."""
    return sum(pixels[..., k, None] * weights[k] for k in range(3))


def _apply_look(image: Image.Image, look: str) -> Image.Image:
    what, _, value = look.partition(" ")
    pixels = np.asarray(image, np.float32)
    grey = _mix(pixels, _GREY)
    if what == "night":
        pixels = pixels * np.array([0.28, 0.32, 0.55], np.float32) + np.array([0, 0, 18], np.float32)
    elif what == "inverted":
        pixels = 255 - pixels
    elif what == "grey":
        pixels = np.repeat(grey, 3, axis=-1)
    elif what == "sepia":
        pixels = grey * np.array([1.05, 0.86, 0.62], np.float32)
    elif what == "tinted":
        pixels = 0.55 * pixels + 0.45 * np.array(COLOURS[value], np.float32)
    elif what == "toned":
        pixels = grey * np.array(COLOURS[value], np.float32) / max(COLOURS[value])
    else:
        raise ValueError(f"no look {look!r}")
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def render(scene: Scene) -> Image.Image:
    """Draws a scene: an RGB picture of PANEL × PANEL pixels."""
    side = SUPERSAMPLING * PANEL
    upper, lower = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (side, side), upper)
    if lower != upper:
        ImageDraw.Draw(image).rectangle((0, side // 2, side, side), fill=lower)
    for thing in scene.things:
        _draw_thing(image, thing)
    if scene.overlay:
        _draw_overlay(image, scene.overlay)
    image = image.reduce(SUPERSAMPLING)
    return _apply_look(image, scene.look) if scene.look else image


def render_classes(scene: Scene) -> np.ndarray:
    """Which class each pixel shows: (PANEL, PANEL) uint8 indices into CLASSES. An overlay is seen through."""
    classes = np.zeros((PANEL, PANEL), np.uint8)
    for thing in scene.things:
        shown = Image.new("RGB", (SUPERSAMPLING * PANEL,) * 2)
        _draw_thing(shown, thing)
        covered = np.asarray(shown.reduce(SUPERSAMPLING)).any(axis=-1)
        classes[covered] = CLASSES.index(thing.kind)
    return classes


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
        return template.format(target=self.target, value=self.value).strip()


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


def _swap_colours(scene: Scene, target: str, value: str) -> Scene | None:
    first, second = scene.find(target), scene.find(value)
    if not first or not second:
        return None
    return scene.put(first, colour=second.colour).put(second, colour=first.colour)


def _recolour_all(scene: Scene, target: str, value: str) -> Scene:
    things = (thing if thing.kind == "face" else replace(thing, colour=value) for thing in scene.things)
    return replace(scene, things=tuple(things))


def _wear(scene: Scene, target: str, value: str) -> Scene | None:
    face = scene.find("face")
    if not face or value in face.features:
        return None
    others = (worn for worn in face.features if not (worn.endswith(" hair") and value.endswith(" hair")))
    return _if_visible(scene, scene.put(face, features=(*others, value)))


def _if_visible(scene: Scene, edited: Scene) -> Scene | None:
    """The edited scene, unless it looks as before: red and grey do where green and blue are exchanged."""
    change = np.abs(np.asarray(render(edited), np.int16) - _levels(scene))
    return edited if change.max() > VISIBLE else None


@functools.lru_cache(maxsize=1)  # many edits of one scene are tried in a row
def _levels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene), np.int16)


def _change_picture(name: str, words: str) -> Callable[[Scene, str, str], Scene]:
    """A rule that sets a property of the scene to some words, `{value}` among them."""
    return lambda scene, target, value: replace(scene, **{name: words.format(value=value).strip()})


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


def _family(rule: Callable, arguments: Iterable, canonical: str, sayings: str) -> Family:
    """sayings: separated by "|"."""
    return Family(rule, tuple(arguments), canonical, tuple(saying.strip() for saying in sayings.split("|")))


def _product(targets: Iterable[str], values: Iterable[str]) -> list[tuple[str, str]]:
    return [(target, value) for target in targets for value in values if target != value]


_EVERY_KIND = ("face", *SHAPES)
_NONE = ("",)
# Choice: many families, most with parameters, so that a model learns to read the example.
FAMILIES = {
    # Edits of one thing.
    "recolour": _family(
        _change_thing(colour="value"),
        [*_product(SHAPES, COLOURS), *_product(["face"], SKINS)],
        "make the {target} {value}",
        "paint the {target} {value} | the {target} should be {value} | change the {target} to {value} | "
        "colour the {target} {value} | give the {target} a {value} colour | turn the {target} {value} | "
        "i want a {value} {target} instead | recolour the {target} in {value} | "
        "the {target} would look better in {value}",
    ),
    "reshape": _family(
        _reshape,
        _product(SHAPES, SHAPES),
        "turn the {target} into a {value}",
        "replace the {target} with a {value} | change the {target} into a {value} | "
        "the {target} should become a {value} | swap the {target} for a {value} | "
        "make a {value} out of the {target} | i want a {value} where the {target} is | "
        "transform the {target} into a {value} | let the {target} become a {value}",
    ),
    "remove": _family(
        _remove,
        _product(_EVERY_KIND, _NONE),
        "remove the {target}",
        "delete the {target} | take away the {target} | erase the {target} | get rid of the {target} | "
        "the {target} should disappear | the picture looks better without the {target} | "
        "take the {target} out | i do not want to see the {target}",
    ),
    "add": _family(
        _add,
        _product([f"{colour} {shape}" for shape in SHAPES for colour in COLOURS], PLACES),
        "add a {target} at the {value}",
        "put a {target} at the {value} | draw a {target} in the {value} corner | "
        "place a {target} in the {value} | there should be a {target} at the {value} | "
        "i want a {target} at the {value} | insert a {target} in the {value} | "
        "at the {value} add a {target} | show a {target} in the {value} corner",
    ),
    "move": _family(
        _move,
        _product(_EVERY_KIND, PLACES),
        "move the {target} to the {value}",
        "put the {target} at the {value} | shift the {target} to the {value} | "
        "the {target} should be at the {value} | bring the {target} to the {value} corner | "
        "the {target} belongs in the {value} | place the {target} in the {value} | "
        "let the {target} go to the {value}",
    ),
    "resize": _family(
        _change_thing(size="value"),
        _product(SHAPES, RADII),
        "make the {target} {value}",
        "the {target} should be {value} | i want a {value} {target} | let the {target} be {value} | "
        "change the size of the {target} to {value} | the {target} needs to be {value} | "
        "resize the {target} until it is {value}",
    ),
    "outline": _family(
        _change_thing(outline="value"),
        _product(SHAPES, OUTLINES),
        "give the {target} a {value} outline",
        "draw a {value} line around the {target} | put a {value} border around the {target} | "
        "outline the {target} in {value} | the {target} should have a {value} edge | "
        "surround the {target} with a {value} line | the {target} needs a {value} contour",
    ),
    "swap": _family(
        _swap_colours,
        itertools.combinations(SHAPES, 2),
        "swap the colours of the {target} and the {value}",
        "exchange the colours of the {target} and the {value} | "
        "give the {target} and the {value} each other's colour | "
        "the {target} and the {value} should trade colours | "
        "switch colours between the {target} and the {value} | "
        "let the {target} and the {value} change colours with each other | "
        "trade the colours of the {target} and the {value}",
    ),
    # Edits of the face.
    "smile": _family(
        _change_thing(mouth="smile"),
        [("face", "")],
        "make the face smile",
        "the face should look happy | give the face a smile | cheer the face up | let the face smile | "
        "i want a happy face | put a smile on the face",
    ),
    "frown": _family(
        _change_thing(mouth="frown"),
        [("face", "")],
        "make the face frown",
        "the face should look sad | give the face a frown | make the face unhappy | let the face frown | "
        "i want a sad face | put a frown on the face",
    ),
    "surprise": _family(
        _change_thing(mouth="open"),
        [("face", "")],
        "make the face look surprised",
        "open the mouth of the face | surprise the face | let the face say oh | "
        "the face should be astonished | i want a surprised face | give the face an open mouth",
    ),
    "wear": _family(
        _wear,
        _product(["face"], FEATURES),
        "give the face {value}",
        "add {value} to the face | the face should have {value} | the face needs {value} | "
        "draw {value} on the face | let the face have {value} | i want {value} on the face",
    ),
    "hat": _family(
        _wear,
        _product(["face"], HATS),
        "put {value} on the face",
        "the face should wear {value} | {value} for the face | the face needs {value} on its head | "
        "dress the face with {value} | let the face wear {value} | i want the face to wear {value}",
    ),
    # Edits of the whole scene.
    "repaint": _family(
        _recolour_all,
        _product(_NONE, COLOURS),
        "make all shapes {value}",
        "paint every shape {value} | all shapes should be {value} | colour all shapes {value} | "
        "turn all shapes {value} | every shape in {value} | i want nothing but {value} shapes",
    ),
    "background": _family(
        _change_picture("background", "{value}"),
        _product(_NONE, BACKGROUNDS),
        "make the background {value}",
        "change the background to {value} | put it on a {value} background | use a {value} background | "
        "the background should be {value} | set a {value} backdrop | replace the background by {value} | "
        "i prefer a {value} background",
    ),
    # Something over the picture.
    "stripes": _family(
        _change_picture("overlay", "{value} stripes"),
        _product(
            _NONE, [f"{colour} {way}" for way in ("horizontal", "vertical", "diagonal") for colour in COLOURS]
        ),
        "draw {value} stripes over it",
        "add {value} stripes | cover it with {value} stripes | put {value} stripes over the picture | "
        "i want {value} stripes | lay {value} stripes over everything | make it striped with {value} stripes",
    ),
    "bar": _family(
        _change_picture("overlay", "a {value}"),
        _product(
            _NONE,
            [
                f"{colour} bar at the {side}"
                for side in ("top", "bottom", "left", "right")
                for colour in COLOURS
            ],
        ),
        "draw a {value}",
        "add a {value} | put a {value} | i want a {value} | there should be a {value} | "
        "lay a {value} over it | it needs a {value}",
    ),
    "dots": _family(
        _change_picture("overlay", "{value} dots"),
        _product(_NONE, COLOURS),
        "draw {value} dots over it",
        "add {value} dots | cover it with {value} dots | sprinkle {value} dots over the picture | "
        "i want {value} dots | lay {value} dots over everything | make it dotted with {value} dots",
    ),
    "frame": _family(
        _change_picture("overlay", "a {value} frame"),
        _product(_NONE, COLOURS),
        "put a {value} frame around it",
        "frame it in {value} | add a {value} frame | the picture needs a {value} frame | "
        "i want a {value} frame | put a {value} border around the picture | surround it with a {value} frame",
    ),
    # The picture's colours.
    "night": _family(
        _change_picture("look", "night"),
        [("", "")],
        "make it night",
        "turn day into night | maybe night view looks better | it should be dark like at night | "
        "show it at night | let night fall | as it would look at night",
    ),
    "invert": _family(
        _change_picture("look", "inverted"),
        [("", "")],
        "invert the colours",
        "make it a negative | turn all colours into their opposites | show the photographic negative | "
        "invert everything | i want inverted colours | flip every colour to its opposite",
    ),
    "grey": _family(
        _change_picture("look", "grey"),
        [("", "")],
        "make it grey",
        "remove all colour | turn it into black and white | make it a black and white photo | "
        "i want it without colours | desaturate the picture | drain the colour from it",
    ),
    "sepia": _family(
        _change_picture("look", "sepia"),
        [("", "")],
        "make it sepia",
        "give it an old photo look | make it look like an old brown photo | tone it in sepia | "
        "i want a sepia picture | make it look antique | an aged sepia look please",
    ),
    "tint": _family(
        _change_picture("look", "tinted {value}"),
        _product(_NONE, COLOURS),
        "tint the picture {value}",
        "put a {value} glass over it | make everything look {value} | cast {value} light on it | "
        "give it a {value} tint | show it through a {value} filter | wash it with {value}",
    ),
    "tone": _family(
        _change_picture("look", "toned {value}"),
        _product(_NONE, COLOURS),
        "make everything a shade of {value}",
        "show it in shades of {value} | print it in {value} alone | only shades of {value} please | "
        "reduce it to {value} and black | tone the picture {value} | i want a picture all in {value}",
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


def random_texts(rng: random.Random, pairs: int = 5) -> dict:
    """An instruction and captions of scenes before and after it, as a line of `texts.jsonl`."""
    while True:
        scene = random_scene(rng)
        family = rng.choice([name for name in FAMILIES if name not in HELD_OUT_FAMILIES])
        edit = Edit(family, *rng.choice(FAMILIES[family].arguments))
        if (after := _applies(edit, scene, "train")) is not None:
            break
    found = [(scene, after)]
    while len(found) < pairs:
        scene = random_scene(rng)
        if (after := _applies(edit, scene, "train")) is not None:
            found.append((scene, after))
    said = [[before.caption(), after.caption()] for before, after in found]
    return {"instruction": say(edit, rng), "pairs": said}


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
    """The pairs of one split: every edit of a family in turn, in a new wording while one is found.

    Choice: families take turns, so that rare and common edits weigh about the same: one of many edits gets
    a larger share by the fourth root of their number, for a smile takes as many examples as colours do. The
    turns go in one order in all splits, and `train`, the largest, takes first what the others take.
    """
    rng = random.Random(f"{split} {seed}")  # a string seeds the same on every machine
    edits: dict[str, list[Edit]] = {}
    for edit in edits_of(split):
        edits.setdefault(edit.family, []).append(edit)
    for name, family in edits.items():
        random.Random(name).shuffle(family)
    shares = [len(family) ** (1 / 4) for family in edits.values()]
    pairs: list[Pair] = []
    said: set[str] = set()
    drawn = 0
    while drawn < instructions:
        family = edits[rng.choices(list(edits), shares)[0]]
        edit = family[0]
        family.append(family.pop(0))
        sayings = [say(edit, rng) for _ in range(20)]
        instruction = next((words for words in sayings if words not in said), sayings[0])
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
    and the scene before the edit together with the edit's arguments; and a paraphrase of the instruction that
    no model has seen.
    """
    folder.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        lines = pool.map(_write_pair, itertools.repeat(folder), itertools.count(), pairs, chunksize=64)
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_pair(folder: Path, i: int, pair: Pair) -> str:
    """Writes the pictures of pair number `i`; returns its line of the metadata."""
    names = f"{i:06d}_before.png", f"{i:06d}_after.png"
    for name, scene in zip(names, (pair.before, pair.after)):
        render(scene).save(folder / name, compress_level=1)
    return json.dumps(
        {
            "input_file_name": names[0],
            "output_file_name": names[1],
            "instruction": pair.instruction,
            "input_caption": pair.before.caption(),
            "output_caption": pair.after.caption(),
            "family": pair.edit.family,
            "canonical": pair.edit.instruction,
            "paraphrase": say(pair.edit, random.Random(f"{folder.name} {i}"), held_out=True),
            "edit": json.dumps(asdict(pair.edit)),
            "scene": json.dumps(asdict(pair.before)),
        }
    )


def write_dataset(out: Path, seed: int = 0, sizes: dict[str, tuple[int, int]] = SPLITS) -> None:
    """All splits below `out`; written beside it first, so that a killed run leaves nothing half-written.

    Where another process has made `out` meanwhile, that stays. Raises OSError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")  # a number that no other machine takes
    try:
        for split, (instructions, pairs_each) in sizes.items():
            write_split(temporary / split, draw_split(split, instructions, pairs_each, seed))
        try:
            temporary.rename(out)
        except OSError:
            if not out.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _end(reason: str) -> NoReturn:
    print(f"world.py: error: {reason}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy world as a dataset folder.")
    parser.add_argument("--out", type=Path, default=Path("data/toy"))
    parser.add_argument("--seed", type=int, default=0)
    instructions, pairs = SPLITS["train"]
    parser.add_argument("--pairs", type=int, default=pairs, help="of each instruction in train")
    parser.add_argument("--captions", type=int, help="print captions of so many scenes, and write nothing")
    args = parser.parse_args()
    if args.captions is not None:
        rng = random.Random(args.seed)
        print("\n".join(random_scene(rng).caption() for _ in range(args.captions)))
        return
    if args.out.exists():
        _end(f"{args.out} exists already; remove it or choose another --out")
    if args.pairs < 2:
        _end(f"--pairs {args.pairs}: give 2 or more, an example and a query")
    try:
        write_dataset(args.out, args.seed, SPLITS | {"train": (instructions, args.pairs)})
    except OSError as error:
        _end(str(error))
    for split in SPLITS:
        lines = (args.out / split / "metadata.jsonl").read_text().splitlines()
        print(
            f"{split:20} {len(lines):6} pairs, {len({json.loads(line)['canonical'] for line in lines})} edits"
        )


if __name__ == "__main__":
    main()
