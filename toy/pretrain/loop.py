"""What every stage has in common: its training loop, its pictures, and its folder."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from disk import atomic_folder
from pictures import from_bytes
from toy import world
from training.checkpoint import load_checkpoint, save_checkpoint
from training.ema import new_ema
from training.muon import Muon, parameter_groups


def fit(
    name: str,
    module: nn.Module,
    loss_of_step: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    runs: Path,
    weight_decay: float = 0.0,
    ema_decay: float = 0.999,
    warmup: int = 100,
    muon: bool = False,
) -> None:
    """Trains `module`, warm-up and cosine decay; leaves the averaged weights in it.

    muon: train by Muon, not AdamW.

    `loss_of_step(step)` draws its own data from the step's number and returns named losses, the first of
    which is minimised.  A checkpoint is written every minute; a stage that is started again goes on from it.
    """
    module.train()
    average = new_ema(module, ema_decay)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if muon:
        optimizer = Muon(parameter_groups(module, weight_decay), lr)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    folder = runs / name
    start = load_checkpoint(folder, {"model": module, "average": average}, optimizer)
    saved = time.monotonic()
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step in progress:
        schedule = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * max(schedule, 0.01)
        losses = loss_of_step(step)
        next(iter(losses.values())).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(module)
        if step % 20 == 0:
            progress.set_postfix({k: f"{v.item():.4f}" for k, v in losses.items()}, refresh=False)
        if time.monotonic() - saved > 60 or step + 1 == steps:
            save_checkpoint(folder, step + 1, {"model": module, "average": average}, optimizer, keep=2)
            saved = time.monotonic()
    module.load_state_dict(average.module.state_dict())
    module.eval()


def pictures(count: int, seed: int) -> tuple[Tensor, list[world.Scene]]:
    """Random pictures: (count, 3, 64, 64) uint8, and the scenes they show."""
    rng = random.Random(seed)
    scenes = [world.random_picture(rng) for _ in range(count)]
    pixels = np.stack([np.asarray(world.render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), scenes


def to_float(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 pixels -> floats in [-1, 1]."""
    return from_bytes(pixels.to(device))


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: a resumed run draws what an uninterrupted one would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save(write: Callable[..., object], folder: Path) -> None:
    """Writes a model folder in one piece: a killed run leaves the old one or the new one."""
    with atomic_folder(folder) as new:
        write(new)
