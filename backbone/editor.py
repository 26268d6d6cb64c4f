"""A trained editor and the pretrained parts that it needs: found, loaded, and checked to fit each other."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from backbone.folders import BackboneError, clear_errors, find_folder, find_part, read_json
from backbone.latents import vae_factor
from backbone.loading import StableDiffusion, freeze, load_llm, load_stable_diffusion

# [ours] How an editor samples unless told otherwise; recorded with each. A scale of 1 is no guidance; another
# text scale doubles the cost of an edit that has words.
SAMPLING = {"steps": 20, "guidance_text": 1.5, "guidance_visual": 1.0}


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
    """An editor's folder or hub id → it and what it names.

    words: load the language model where it has one. Raises BackboneError, also for an editor that does not
    fit its Stable Diffusion.
    """
    rcldm, settings = load_editor(source, device, dtype)
    sd = load_stable_diffusion(find_part(settings, "stable_diffusion"), device, dtype)
    check_fit(sd.unet, sd.vae, rcldm, settings["panel"])
    llm = None
    if words and settings["llm"]:
        llm = load_llm(find_part(settings, "llm"), device)
    return Parts(sd, rcldm, llm, SAMPLING | settings)


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
        if lacking := {"stable_diffusion", "llm", "panel"} - settings.keys():
            raise ValueError(f"instructgie.json lacks {min(lacking)}")
        kinds = {kind.__name__: kind for kind in RCLDM.__subclasses__()}
        kind = kinds.get(RCLDM.load_config(folder).get("_class_name"), RCLDM)
        model = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
        return freeze(model, device, folder), settings


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
