"""Mostly the example wins: with stripes shown and inverted colours told, or with two backgrounds, the shown
edit is the nearest for 6 of 6 answers. The shares in training do not explain it: three samples in ten lack
the words, and four lack the example. Nobody has tested the cause.

With night shown and a white background told, the vote is "both 4, nothing 2 of 6". Look at the distance, too:
22.8 levels, where the editor is 4.1 levels away if shown and told agree. Such an answer is none of the four,
but a mixture for which nobody asked. The nearest candidate says little without its distance."""

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
