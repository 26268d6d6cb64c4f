"""Checkpoints, safetensors and JSON alone, and a resume that goes on where they stood."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from disk import atomic_folder


def save_checkpoint(
    folder: Path, step: int, modules: dict[str, Any], optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Writes `folder/checkpoint-STEP` whole or not at all, then deletes all but the newest `keep`.

    modules: by name, all that has a `state_dict` of tensors. Safetensors only: weights under their module's
    name, the optimiser's state under `optimizer/0/<index>/<name>`. Raises OSError where the disk takes no
    more, and ValueError for what is not finite; older checkpoints are then all there.
    """
    tensors = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/0/{i}/{name}": value for name, value in state.items()}
    for k, v in tensors.items():
        tensors[k] = v.detach().cpu().clone(memory_format=torch.contiguous_format)
    with atomic_folder(folder / f"checkpoint-{step:07d}") as new:
        save_file(tensors, new / "state.safetensors")
        record = {"step": step, "sha256": _digest(new / "state.safetensors")}
        (new / "step.json").write_text(json.dumps(record))
    for old in sorted(folder.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified(checkpoint: Path) -> tuple[int, dict[str, Tensor]] | None:
    """The step and the tensors of a checkpoint; None for one that is cut, damaged or empty."""
    try:
        record = json.loads((checkpoint / "step.json").read_text())
        path = checkpoint / "state.safetensors"
        return (record["step"], load_file(path)) if record["sha256"] == _digest(path) else None
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None


def load_checkpoint(folder: Path, modules: dict[str, Any], optimizer: torch.optim.Optimizer) -> int:
    """Loads the newest checkpoint of `folder` that verifies, in place; returns its step, 0 if there is none.

    One that does not verify is named, and the one before it taken. Raises ValueError where none does, and
    where what it holds is of other modules.
    """
    checkpoints = sorted(folder.glob("checkpoint-*"), reverse=True)
    for checkpoint in checkpoints:
        if found := verified(checkpoint):
            break
        print(f"{checkpoint} is damaged; the one before it is taken", flush=True)
    else:
        if checkpoints:
            raise ValueError(f"{folder}: every checkpoint is damaged; start anew in another folder")
        return 0
    step, tensors = found

    def below(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}

    try:
        for name, module in modules.items():
            module.load_state_dict(below(f"{name}/"))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in below("optimizer/0/").items():
            i, name = key.split("/")
            moments.setdefault(int(i), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (RuntimeError, ValueError, KeyError):
        raise ValueError(
            f"{checkpoint}: of another architecture; resume with the settings it began with"
        ) from None
    return step
