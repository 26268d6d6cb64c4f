"""The edit reads one thing and writes another, so the colour alone does not tell it: two pairs that share
this instruction may have nothing in common but the relation. For a model that learns from examples it is a
hard one.

8 levels, because an edit that no eye can see is an example of nothing, and because pictures that were drawn
by a model or saved as JPEG are nowhere exactly equal. uint8 wraps round: 0 - 255 is 1, and the largest change
of all would be missed."""

import itertools

import numpy as np
from PIL import Image

from toy.world import SHAPES, VISIBLE, Family, Scene


def rule(scene: Scene, target: str, value: str) -> Scene | None:
    ours, theirs = scene.find(target), scene.find(value)
    return scene.put(ours, colour=theirs.colour) if ours and theirs else None


def family() -> Family:
    sayings = (
        "paint the {target} like the {value}",
        "the {target} should be as colourful as the {value}",
        "let the {target} have the colour of the {value}",
        "take the colour of the {value} for the {target} too",
        "match the {target} to the {value}",
        "colour the {target} as the {value} is",
    )
    pairs = tuple(itertools.permutations(SHAPES, 2))
    return Family(rule, pairs, "give the {target} the colour of the {value}", sayings)


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    ours, theirs = (np.asarray(picture, np.int16) for picture in (before, after))
    return np.abs(ours - theirs).max(axis=-1) > VISIBLE
