"""What the stages have in common."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disk import atomic_folder, other_settings, version
from toy import world
from training import loop


def fit(name: str, module: nn.Module, loss_of_step: Callable[[int], dict], *, runs: Path, **options) -> None:
    """`training.loop.fit`, for losses that draw their own data from the step's number.

    Raises ValueError where `runs` holds a run of this name that began with another seed, world or option.
    """
    began = {"seed": torch.initial_seed(), "world": version(Path(world.__file__).parent), **options}
    for what, (there, now) in other_settings(runs / name / "settings.json", began).items():
        raise ValueError(f"{runs / name}: its {what} is {there}, not {now}; remove it or give other --runs")
    loop.fit(name, module, lambda steps: map(loss_of_step, steps), runs / name, **options)


def pictures(count: int, seed: int) -> tuple[Tensor, list[world.Scene]]:
    """Random pictures: (count, 3, 64, 64) uint8, and the scenes they show."""
    rng = random.Random(seed)
    scenes = [world.random_picture(rng) for _ in range(count)]
    return rendered(scenes).contiguous(), scenes


def rendered(scenes: Iterable[world.Scene]) -> Tensor:
    """The scenes' pictures, (N, 3, 64, 64) uint8, channels last in memory."""
    pixels = np.stack([np.asarray(world.render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def save(folder: Path, *parts: Any) -> None:
    """Writes a model folder in one piece: a killed run leaves the old one or the new one."""
    with atomic_folder(folder) as new:
        for part in parts:
            part.save_pretrained(new)
