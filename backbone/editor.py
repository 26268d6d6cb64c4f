"""A trained editor and the pretrained parts that it needs: found, loaded, and checked to fit each other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from backbone.folders import BackboneError, clear_errors, find_folder, find_part, read_json
from backbone.latents import vae_factor
from backbone.loading import StableDiffusion, freeze, load_llm, load_stable_diffusion

# [ours] How an editor samples unless told otherwise; recorded with each. A scale of 1 is no guidance:
# one branch instead of three.
SAMPLING = {"steps": 20, "guidance_text": 1.0, "guidance_visual": 1.0}


class Parts(NamedTuple):
    """All that an edit needs. llm: model and tokenizer of the unification module; None leaves it out."""

    sd: StableDiffusion
    rcldm: nn.Module
    llm: tuple[nn.Module, Any] | None
    settings: dict[str, Any]


def load_parts(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    words: bool = True,
) -> Parts:
    """An editor's folder or hub id → it and what it names. words: load the language model where it has one.

    Raises BackboneError for an editor that lacks a setting, or does not fit its Stable Diffusion.
    """
    folder = find_folder(source)
    rcldm, settings = load_editor(folder, device, dtype)
    if missing := {"stable_diffusion", "llm", "panel"} - set(settings):
        raise BackboneError(f"{source}: instructgie.json lacks {', '.join(sorted(missing))}")
    check_settings(f"{source}: instructgie.json", settings)
    wanted = ["stable_diffusion", *(["llm"] if words and settings["llm"] else [])]
    found = {name: find_part(folder, settings, name) for name in wanted}
    sd = load_stable_diffusion(found["stable_diffusion"], device, dtype)
    check_fit(sd.unet, sd.vae, rcldm, settings["panel"])
    return Parts(
        sd, rcldm, load_llm(found["llm"], device, dtype) if "llm" in found else None, SAMPLING | settings
    )


def load_editor(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """An editor that `train.py` has saved: its RCLDM, frozen, and its settings. Raises BackboneError.

    Where its config names a subclass of RCLDM that has been imported, it is one (evaluation/vit.py).
    """
    from rcldm import RCLDM

    source, folder = folder, find_folder(folder)
    with clear_errors(source, "an editor's folder as train.py saves it", folder):
        settings = read_json(folder / "instructgie.json")
        kinds = {kind.__name__: kind for kind in RCLDM.__subclasses__()}
        kind = kinds.get(read_json(folder / "config.json").get("_class_name"), RCLDM)
        model = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
        return freeze(model, device), settings


def check_settings(where: str, settings: dict[str, Any]) -> None:
    """Raises BackboneError for an editor's settings that nothing can be drawn with."""
    kinds = {"stable_diffusion": str, "llm": str | None, "panel": int, "steps": int}
    kinds |= dict.fromkeys(("guidance_text", "guidance_visual"), int | float)
    for name in kinds.keys() & settings.keys():
        value = settings[name]
        endless = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, kinds[name]) or endless or (name == "panel" and not 0 < value <= 4096):
            raise BackboneError(f"{where} has {name} {repr(value)[:80]}")


def check_fit(unet: nn.Module, vae: nn.Module, rcldm: nn.Module, panel: int) -> None:
    """Raises BackboneError where an RCLDM was not trained for such a U-Net, autoencoder or panel."""
    mine, theirs = ({**model.config} for model in (rcldm.trainable_copy, unet))
    for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        if json.dumps(mine[name]) != json.dumps(theirs[name]):  # tuples and lists alike
            reason = f"its U-Net has {name} {theirs[name]}, the editor's {mine[name]}"
            raise BackboneError(f"the editor does not fit this Stable Diffusion: {reason}")
    factor = vae_factor(vae)
    if rcldm.config.factor != factor or panel % factor:
        reason = f"the autoencoder's factor is {factor}, the editor's {rcldm.config.factor}"
        raise BackboneError(f"panels of {panel} pixels do not fit: {reason}")
