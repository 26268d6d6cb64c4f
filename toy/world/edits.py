"""The edits of the toy world: rules from scene to scene, in 25 families, and how people say them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

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
    change = np.asarray(render(edited), np.int16) - np.asarray(render(scene), np.int16)
    return edited if np.abs(change).max() > VISIBLE else None  # what is put on may lie hidden


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
# [ours] Many families, most with parameters, so that a model learns to read the example.
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


def edits_of(family: str) -> list[Edit]:
    """All edits of a family."""
    return [Edit(family, target, value) for target, value in FAMILIES[family].arguments]


def every_edit() -> list[Edit]:
    """All edits of the world, family by family."""
    return [edit for family in FAMILIES for edit in edits_of(family)]


def candidates(scene: Scene) -> list[tuple[Edit, Scene]]:
    """Every edit that the renderer can make of this scene, with its result; 100 or more for a plain scene."""
    made = ((edit, edit.apply(scene)) for edit in every_edit())
    return [(edit, result) for edit, result in made if result is not None]


def say(edit: Edit, rng: random.Random, held_out: bool = False) -> str:
    """The edit in one of the ways in which people say it."""
    family = FAMILIES[edit.family]
    sayings = family.held_out_sayings if held_out else family.trained_sayings
    return rng.choice(_OPENINGS) + edit.worded(rng.choice(sayings))


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
