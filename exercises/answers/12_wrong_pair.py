"""It depends on the edits. Shown a mirrored picture and told to invert the colours, the editor does as it is
told, 6 times of 6, and as well as where both ask for the mirror (3.8 and 3.5 levels from the nearest
picture).

Shown night and told a white background, it is nearest to both, 5 times of 6, but at 16.4 levels, where it has
1.5 when the two agree: the pictures are of a murky blue. Shown navy and told meadow, "shown" wins 5 times of
6, at 43.3 levels, too far to mean it: they are dark meadows, a mixture for which neither asked. The vote
alone would have hidden that. The nearest candidate says little without its distance."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from toy.world import Edit, Scene, render


def verdict(answer: Image.Image, query: Scene, shown: Edit, told: Edit) -> tuple[str, float]:
    after_shown = shown.apply(query)
    scenes = {"nothing": query, "shown": after_shown, "told": told.apply(query)}
    scenes["both"] = after_shown and told.apply(after_shown)
    distances = {name: distance(answer, render(scene)) for name, scene in scenes.items() if scene}
    nearest = min(distances, key=distances.get)
    return nearest, distances[nearest]


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def survey(
    pipe: Callable, example: Scene, queries: list[Scene], shown: Edit, told: Edit, steps: int = 20
) -> list[tuple[str, float]]:
    answers = pipe(
        prompt=told.instruction,
        image=[render(query) for query in queries],
        prompt_pair=(render(example), render(shown.apply(example))),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
    ).images
    return [verdict(answer, query, shown, told) for answer, query in zip(answers, queries)]
