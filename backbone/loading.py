"""The pretrained parts, loaded and frozen."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from backbone.folders import FOLDERS, clear_errors, find_folder, read_json


class StableDiffusion(NamedTuple):
    """The parts of a latent diffusion model in diffusers' layout, frozen."""

    vae: nn.Module
    unet: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    scheduler: Any


def load_stable_diffusion(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """A Stable Diffusion folder or hub id → its frozen parts in `dtype`. Raises BackboneError."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = find_folder(source, FOLDERS["stable_diffusion"])
    with clear_errors(source, "a Stable Diffusion folder in diffusers' layout", folder):
        options = {"torch_dtype": dtype, "use_safetensors": True}
        models = {
            "vae": AutoencoderKL.from_pretrained(folder / "vae", **options),
            "unet": UNet2DConditionModel.from_pretrained(folder / "unet", **options),
            "text_encoder": _transformer(CLIPTextModel, folder / "text_encoder", dtype),
        }
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        # Whatever sampler the folder names, its noise schedule is what training needs. Latents have no
        # bounds to clip to, and PNDM ends at the first noise level: so `StableDiffusionPipeline` reads it.
        config = DDIMScheduler.load_config(folder / "scheduler")
        config.setdefault("set_alpha_to_one", config.get("_class_name") != "PNDMScheduler")
        scheduler = DDIMScheduler.from_config(config | {"clip_sample": False, "steps_offset": 1})
        models = {name: freeze(model, device, folder / name) for name, model in models.items()}
    return StableDiffusion(**models, tokenizer=tokenizer, scheduler=scheduler)


def load_clip(source: str, device: torch.device | str = "cpu") -> nn.Module:
    """An open_clip model (a folder with `open_clip_config.json`, or a hub id of one), frozen."""
    import open_clip

    folder = find_folder(source, ["open_clip*"])
    with clear_errors(source, "an open_clip folder", folder):
        if not [*folder.glob("open_clip_*model.safetensors")]:  # of two usual names, open_clip reads either
            raise FileNotFoundError("open_clip_model.safetensors is missing")
        # A hub's snapshot has the tokenizer too, once that is asked for; it does not change the model.
        return freeze(open_clip.create_model(f"local-dir:{folder}"), device, folder, "open_clip*")


def load_clip_tokenizer(source: str) -> Any:
    """The tokenizer of an open_clip model: texts (list of str) → token ids (B, context length)."""
    import open_clip

    folder = find_folder(source, ["open_clip*", "tokenizer*", "vocab*", "merges*", "special_tokens*"])
    with clear_errors(source, "an open_clip folder", folder):
        config = read_json(folder / "open_clip_config.json")["model_cfg"]["text_cfg"]
        # Given here, this stands above the config's own, which could ask for the folder's code to be run.
        options = {"trust_remote_code": False} if config.get("hf_tokenizer_name") else {}
        return open_clip.get_tokenizer(f"local-dir:{folder}", **options)


def load_segmenter(source: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A Mask2Former for panoptic segmentation, frozen, and its image processor."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    folder = find_folder(source)
    with clear_errors(source, "a Mask2Former folder", folder):
        model = _transformer(Mask2FormerForUniversalSegmentation, folder, torch.float32)
        processor = Mask2FormerImageProcessor.from_pretrained(folder, local_files_only=True)
        return freeze(model, device, folder), processor


def load_llm(source: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A causal language model, frozen, and its tokenizer.

    In bfloat16 where its files are, else in float32, on every device: so an instruction has one form in
    training and in editing. In float16, a model of bfloat16 would overflow.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = find_folder(source)
    with clear_errors(source, "a causal language model's folder", folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        dtype = torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float32
        model = _transformer(AutoModelForCausalLM, folder, dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ValueError("its tokenizer has more words than it")
        return freeze(model, device, folder), tokenizer


def _transformer(kind: Any, folder: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A model of transformers. Raises ValueError where its files lack a weight, which would be made up."""
    options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    model, found = kind.from_pretrained(folder, dtype=dtype, **options)
    if lacking := sorted(set(found["missing_keys"]) & {name for name, _ in model.named_parameters()}):
        raise ValueError(f"its weights lack {lacking[0]}")
    return model


def check_model(model: nn.Module) -> None:
    """Raises ValueError where the files lack a weight, which diffusers leaves for later to stumble over."""
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"its weights lack {missing[0]}")


def freeze(model: nn.Module, device: torch.device | str, source: Path, files: str = "*") -> nn.Module:
    """source, files: its folder and its files there, by which the caches know it."""
    check_model(model)
    model.source, model.files = source, files
    return model.to(device).eval().requires_grad_(False)
