"""11 · An edit of your own                                                      project, 2 hours

The dataset of InstructGIE is made of pairs that share an instruction: other scenes, the same edit. In the toy
world an edit is a rule from scene to scene, so a new family of edits gives any number of exact pairs. Add
this one, which the world does not have:

    "give the circle the colour of the star"      target: the circle; value: the star

for any two different shapes. Where the scene lacks one of them the edit cannot be made: the rule returns
None. Each edit has one canonical wording of its own. The family has at least five more sayings, which are
templates with {target} and {value}. The last third of them, two at least, is held out of the language model's
training.

Then check the pairs, as every maker of a dataset must: where do the two pictures differ by more than 8 levels
of 255 in any channel? That must be the target and nothing else.
Question: why 8 and not 0? What goes wrong if uint8 pictures are subtracted as they are?

Read: `Scene` and `Thing` in toy/world/scenes.py; `Family` and the rules above FAMILIES in toy/world/edits.py.
Test: pytest exercises -k 11
"""

import numpy as np
from PIL import Image

from toy.world import Family, Scene


def rule(scene: Scene, target: str, value: str) -> Scene | None:
    """The scene in which the shape `target` has the colour of the shape `value`."""
    raise NotImplementedError


def family() -> Family:
    """The rule with every (target, value) that it takes, its canonical wording and its sayings."""
    raise NotImplementedError


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Where two RGB pictures differ by more than 8 levels in any channel, (P, P) bool."""
    raise NotImplementedError
