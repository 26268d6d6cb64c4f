"""Checkpoints, safetensors and JSON alone, and a resume that goes on where they stood."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import backbone
from disk import atomic_folder

CHECKPOINT_NAMES = "checkpoint-" + 7 * "[0-9]"  # a user's copies have other names


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
        (new / "step.json").write_text(json.dumps({"step": step}))
    for old in sorted(folder.glob(CHECKPOINT_NAMES))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, modules: dict[str, Any], optimizer: torch.optim.Optimizer) -> int:
    """Loads the newest checkpoint of `folder`, in place; returns its step, 0 if there is none.

    Raises ValueError where it cannot be read, and where what it holds is of other modules.
    """
    checkpoint = max(folder.glob(CHECKPOINT_NAMES), default=None)
    if checkpoint is None:
        return 0
    try:
        step = json.loads((checkpoint / "step.json").read_text())["step"]
        tensors = load_file(checkpoint / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        way = "remove it, and the one before it is taken"
        raise ValueError(f"{checkpoint}: damaged ({error}); {way}") from None

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


def load_weights(model: nn.Module, editor: str) -> None:
    """Of an editor's folder or hub id, for `--init`. Raises ValueError for one of another architecture."""
    with backbone.clear_errors(f"--init {editor}", "an editor of this architecture", Path(editor)):
        model.load_state_dict(backbone.load_editor(editor)[0].state_dict())
