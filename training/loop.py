"""The loop that trains everything but InstructGIE itself, whose loop stands in train.py."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.checkpoint import load_checkpoint, save_checkpoint
from training.ema import EMA
from training.monitor import LossMonitor
from training.muon import Muon, parameter_groups

SAVE_EVERY = 60.0  # seconds between checkpoints,
SAVE_AFTER = 20.0  # or so many times what the last one took: a model of gigabytes writes them seldom


def fit(
    name: str,
    module: nn.Module,
    losses_of: Callable[[range], Iterable[dict[str, Tensor]]],
    folder: Path,
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    ema_decay: float = 0.999,
    warmup: int = 100,
    muon: bool = False,
) -> None:
    """Trains `module` with warm-up and cosine decay, and leaves the EMA of its weights in it.

    losses_of: for the steps that are left, one after the other, named losses; the first is minimised. What it
        draws must depend on the step's number alone.
    folder: of the log, and of checkpoints, one a minute and one at the end. A run that was stopped goes on
        from the newest.
    ema_decay: 0 for no average. muon: train by Muon, not AdamW.
    """
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    if muon:
        optimizer = Muon(parameter_groups(module, weight_decay), lr)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    modules, ema = {"model": module, "monitor": (monitor := LossMonitor())}, None
    if ema_decay:
        modules["average"] = ema = EMA(module, ema_decay)
    start = load_checkpoint(folder, modules, optimizer)
    saved, cost = time.monotonic(), 0.0
    log = SummaryWriter(folder / "tensorboard")
    progress = tqdm(total=steps, initial=start, desc=name, mininterval=10)
    for step, losses in enumerate(losses_of(range(start, steps)), start):
        schedule = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * max(schedule, 0.01)
        next(iter(losses.values())).backward()
        monitor.add(losses)
        if monitor.is_sound(nn.utils.clip_grad_norm_(parameters, 1.0)):
            optimizer.step()
            if ema:
                ema.update_parameters(module)
        optimizer.zero_grad()
        monitor.check(f"start again with a lower learning rate; it goes on from {folder}")
        if (step + 1) % 20 == 0 or step + 1 == steps:
            progress.set_postfix(monitor.text(), refresh=False)
            monitor.write(log, step + 1)
        progress.update()
        begun = time.monotonic()
        if begun - saved >= max(SAVE_EVERY, SAVE_AFTER * cost) or step + 1 == steps:
            save_checkpoint(folder, step + 1, modules, optimizer, keep=2)
            saved = time.monotonic()
            cost = saved - begun
    progress.close()
    log.close()
    if ema:
        module.load_state_dict(ema.module.state_dict())
    module.eval()
