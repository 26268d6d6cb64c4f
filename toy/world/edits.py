"""The edits of the toy world: rules from scene to scene, in 25 families, and mixtures of two of them.

How people say them: sayings.txt.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toy.world.drawing import render
from toy.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    FEATURES,
    HATS,
    OUTLINES,
    PLACES,
    RADII,
    SHAPES,
    SKINS,
    Scene,
    Thing,
    random_scene,
)

VISIBLE = 8  # levels of 255 by which a pixel must differ, in any channel, to count as edited


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


@dataclass(frozen=True)
class Mixture:
    """Two edits at once, of families that `MIXTURES` pairs: a family of its own, such as "remove + bar"."""

    first: Edit
    second: Edit

    @property
    def family(self) -> str:
        return f"{self.first.family} + {self.second.family}"

    def apply(self, scene: Scene) -> Scene | None:
        """The scene after both edits, or None where one of them cannot be made or does not show."""
        alone = self.first.apply(scene), self.second.apply(scene)
        both = None if None in alone else self.second.apply(alone[0])
        return both if both and all(_differ(both, scene) for scene in alone) else None

    @property
    def instruction(self) -> str:
        return f"{self.first.instruction} and {self.second.instruction}"


def _differ(scene: Scene, other: Scene) -> bool:
    """Whether one sees a difference between the two pictures."""
    return np.abs(_pixels(scene) - _pixels(other)).max() > VISIBLE


@functools.lru_cache(maxsize=1024)  # a mixture's edits meet the same scenes again and again
def _pixels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene), np.int16)


def edit_from_json(record: dict) -> Edit | Mixture:
    if "first" not in record:
        return Edit(**record)
    return Mixture(**{name: Edit(**arguments) for name, arguments in record.items()})


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
    edited = scene.put(face, features=(*others, value))
    return edited if _differ(edited, scene) else None  # what is put on may lie hidden


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


def _product(targets: Iterable[str], values: Iterable[str]) -> list[tuple[str, str]]:
    return [(target, value) for target in targets for value in values if target != value]


_KINDS = ("face", *SHAPES)
_FACE, _PICTURE = [("face", "")], [("", "")]  # of families without a value
_COLOUR = _product([""], COLOURS)
_STRIPES = [f"{colour} {way}" for way in ("horizontal", "vertical", "diagonal") for colour in COLOURS]
_BARS = [f"{colour} bar at the {side}" for side in ("top", "bottom", "left", "right") for colour in COLOURS]
_RULES = {
    # Edits of one thing.
    "recolour": (_change_thing(colour="value"), [*_product(SHAPES, COLOURS), *_product(["face"], SKINS)]),
    "reshape": (_reshape, _product(SHAPES, SHAPES)),
    "remove": (_remove, _product(_KINDS, [""])),
    "add": (_add, _product([f"{colour} {shape}" for shape in SHAPES for colour in COLOURS], PLACES)),
    "move": (_move, _product(_KINDS, PLACES)),
    "resize": (_change_thing(size="value"), _product(SHAPES, RADII)),
    "outline": (_change_thing(outline="value"), _product(SHAPES, OUTLINES)),
    "swap": (_swap_colours, itertools.combinations(SHAPES, 2)),
    # Edits of the face.
    "smile": (_change_thing(mouth="smile"), _FACE),
    "frown": (_change_thing(mouth="frown"), _FACE),
    "surprise": (_change_thing(mouth="open"), _FACE),
    "wear": (_wear, _product(["face"], FEATURES)),
    "hat": (_wear, _product(["face"], HATS)),
    # Edits of the whole scene.
    "repaint": (_recolour_all, _COLOUR),
    "background": (_change_picture("background", "{value}"), _product([""], BACKGROUNDS)),
    # Something over the picture.
    "stripes": (_change_picture("overlay", "{value} stripes"), _product([""], _STRIPES)),
    "bar": (_change_picture("overlay", "a {value}"), _product([""], _BARS)),
    "dots": (_change_picture("overlay", "{value} dots"), _COLOUR),
    "frame": (_change_picture("overlay", "a {value} frame"), _COLOUR),
    # The picture's colours.
    "night": (_change_picture("look", "night"), _PICTURE),
    "invert": (_change_picture("look", "inverted"), _PICTURE),
    "grey": (_change_picture("look", "grey"), _PICTURE),
    "sepia": (_change_picture("look", "sepia"), _PICTURE),
    "tint": (_change_picture("look", "tinted {value}"), _COLOUR),
    "tone": (_change_picture("look", "toned {value}"), _COLOUR),
}


def _read_sayings() -> dict[str, list[str]]:
    """By family, the canonical wording and the sayings of `sayings.txt`."""
    text = Path(__file__).with_name("sayings.txt").read_text(encoding="utf-8")
    blocks = (block.splitlines() for block in text.split("\n\n")[1:])
    return {name: wordings for name, *wordings in blocks}


_SAYINGS = _read_sayings()
# [ours] Many families, most with parameters, so that a model learns to read the example.
FAMILIES = {
    name: Family(rule, tuple(arguments), _SAYINGS[name][0], tuple(_SAYINGS[name][1:]))
    for name, (rule, arguments) in _RULES.items()
}

# [ours] Mixtures are of edits that change different things, so that both can be seen, in any order. An edit
# of the whole picture's colours would hide much of the other one.
_MIXED = (
    ("recolour", "outline", "resize", "reshape", "remove", "add", "move"),
    ("smile", "frown", "surprise", "wear"),
    ("background",),
    ("stripes", "bar", "dots"),
)
MIXTURES = tuple(
    f"{first} + {second}"
    for kinds in itertools.combinations(_MIXED, 2)
    for first, second in itertools.product(*kinds)
)

_OPENINGS = ("", "", "", "please ", "could you ", "maybe ", "now ")
# Between the sayings of a mixture's edits. The last two are held out of the toy language model's training.
_JOINTS = (" and ", " and ", ", then ", " and also ", " and after that ", "; also ")


def edits_of(family: str) -> list[Edit | Mixture]:
    """All edits of a family, or of a mixture of two."""
    if family in MIXTURES:
        return [Mixture(*both) for both in itertools.product(*map(edits_of, family.split(" + ")))]
    return [Edit(family, target, value) for target, value in FAMILIES[family].arguments]


def every_edit() -> list[Edit]:
    return [edit for family in FAMILIES for edit in edits_of(family)]


def candidates(scene: Scene, family: str = "") -> list[tuple[Edit | Mixture, Scene]]:
    """Every single edit that the renderer can make of this scene, with its result; 100 or more for a plain
    scene. family: where it is one of `MIXTURES`, all its edits are candidates too."""
    edits = every_edit() + (edits_of(family) if family in MIXTURES else [])
    made = ((edit, edit.apply(scene)) for edit in edits)
    return [(edit, result) for edit, result in made if result is not None]


def say(edit: Edit | Mixture, rng: random.Random, held_out: bool = False) -> str:
    """The edit in one of the ways in which people say it."""

    def saying(part: Edit) -> str:
        family = FAMILIES[part.family]
        return part.worded(rng.choice(family.held_out_sayings if held_out else family.trained_sayings))

    opening = rng.choice(_OPENINGS)
    if isinstance(edit, Edit):
        said = saying(edit)
    else:
        joint = rng.choice(_JOINTS[-2:] if held_out else _JOINTS[:-2])
        said = saying(edit.first) + joint + saying(edit.second)
    return said if said.startswith("maybe ") else opening + said


def random_edit(scene: Scene, rng: random.Random) -> Scene:
    """The scene after some edit: all families are as likely, and in a family all its edits."""
    while True:
        edited = rng.choice(edits_of(rng.choice(list(FAMILIES)))).apply(scene)
        if edited is not None:
            return edited


def random_picture(rng: random.Random) -> Scene:
    """A scene as the toy *backbone* sees the world: half of them after one edit or two, of any family."""
    scene = random_scene(rng)
    for _ in range(rng.choice((0, 0, 1, 2))):
        scene = random_edit(scene, rng)
    return scene
