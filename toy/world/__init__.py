"""The toy world: scenes that are rendered, edits that are exact, and a dataset folder of both.

An edit is a rule from scene to scene, so the right answer to any instruction on any scene is known to the
pixel.  That is what photographs cannot give, and why the project's numbers are measured here.

    python -m toy.world --out data/toy        # writes the splits in the public dataset format
    python -m toy.world --captions 40         # only prints captions, seeds for data_making.texts

    scenes.py     a background and things; their captions; scenes by chance
    drawing.py    a scene's picture, and the class of each pixel
    edits.py      the families of edits, each with its rule and its sayings; mixtures of two
    splits.py     pairs of scenes, in six splits; the dataset folder
"""

from toy.world.drawing import CLASSES, SUPERSAMPLING, render, render_classes
from toy.world.edits import (
    FAMILIES,
    MIXTURES,
    VISIBLE,
    Edit,
    Family,
    Mixture,
    candidates,
    edit_from_json,
    edits_of,
    every_edit,
    random_edit,
    random_picture,
    say,
)
from toy.world.scenes import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    PANEL,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    random_scene,
    scene_from_json,
)
from toy.world.splits import (
    HELD_OUT_FAMILIES,
    HELD_OUT_MIXTURES,
    PARAPHRASES,
    SPLITS,
    TRAINED_MIXTURES,
    Pair,
    draw_split,
    families_of,
    random_texts,
    write_dataset,
    write_split,
)
