"""Files and checkpoints that are whole or not there at all; checkpoints are safetensors and JSON alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write` makes the file under another name, which becomes `path` when it is done."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def other_settings(path: Path, settings: dict[str, Any], anew: bool = False) -> dict[str, tuple[Any, Any]]:
    """Notes settings beside the work they are of, unless some are there (`anew`: even then); returns those
    that differ from what is there, as name → (there, now)."""
    settings = json.loads(json.dumps(settings))
    if anew or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write_text(json.dumps(settings, indent=2) + "\n"))
    there = json.loads(path.read_bytes())
    pairs = {name: (there.get(name), settings.get(name)) for name in {**settings, **there}}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights, for `update_parameters(model)` after each step.

    The decay grows to its final value as (1 + n) / (10 + n): the first weights, which are random or zero,
    would otherwise stay in the average for 1 / (1 - decay) steps.
    """

    def update(average: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(average, current, weight)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update))


def save_checkpoint(
    folder: Path, step: int, modules: dict[str, nn.Module], *optimizers: torch.optim.Optimizer, keep: int
) -> None:
    """Writes `folder/checkpoint-STEP` whole or not at all, then deletes all but the newest `keep`.

    Safetensors only: weights under their module's name, the n-th optimiser's state under
    `optimizer/<n>/<index>/<name>`, one name more where it is nested, as bitsandbytes has it.
    """
    tensors = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for n, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                parts = {f"/{k}": v for k, v in value.items()} if isinstance(value, dict) else {"": value}
                tensors |= {f"optimizer/{n}/{i}/{name}{k}": torch.as_tensor(v) for k, v in parts.items()}
    temporary = folder / f".checkpoint.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "step.json").write_text(json.dumps({"step": step}))
    target = folder / f"checkpoint-{step:07d}"
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in sorted(folder.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, modules: dict[str, nn.Module], *optimizers: torch.optim.Optimizer) -> int:
    """Loads the newest checkpoint of `folder` in place; returns its step, 0 where there is none."""
    checkpoints = sorted(folder.glob("checkpoint-*"))
    if not checkpoints:
        return 0
    tensors = load_file(checkpoints[-1] / "state.safetensors")
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    states: dict[int, dict[int, dict]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, n, i, *above, name = key.split("/")
            state = states.setdefault(int(n), {}).setdefault(int(i), {})
            for group in above:
                state = state.setdefault(group, {})
            is_count = value.ndim == 0 and not value.is_floating_point()
            state[name] = value.item() if is_count else value
    for n, optimizer in enumerate(optimizers):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states.get(n, {}), "param_groups": groups})
    return json.loads((checkpoints[-1] / "step.json").read_text())["step"]
