"""Names and folders of the pretrained parts: Stable Diffusion, CLIP, Mask2Former and the language model.

Every part is a preset's, a Hugging Face hub id or a local folder, and all three are read by the same code.
Weights are read from safetensors alone, and no code that comes with them is run.

    sd = load_stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5", device)
    clip = load_clip(preset("sd15").clip, device)
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

HERE = Path(__file__).resolve().parent


class BackboneError(ValueError):
    """A part that cannot be loaded. The message is one line: which, why, and what to do."""


@dataclass(frozen=True)
class Preset:
    """Where the parts lie, and what goes with them.

    writer: the language model that writes a dataset's texts. picture: pixels along the side of the pictures
    drawn for one. panel: P, pixels along a panel's side. classes: of the segmenter, for selective-area
    matching. lr: peak learning rate that suits the U-Net's size. licence: of the Stable Diffusion. data: the
    dataset to train on, None where there is no default. editor: a trained editor's folder, likewise.
    """

    stable_diffusion: str
    clip: str
    clip_eval: str
    segmenter: str
    llm: str
    writer: str
    picture: int
    panel: int
    classes: tuple[str, ...]
    lr: float
    licence: str
    data: str | None = None
    editor: str | None = None


PRESETS = {
    "toy": Preset(
        stable_diffusion="toy/weights/stable-diffusion",
        clip="toy/weights/clip",
        clip_eval="toy/weights/clip-eval",
        segmenter="toy/weights/segmenter",
        llm="toy/weights/llm",
        writer="toy/weights/writer",
        picture=64,
        panel=64,
        classes=("face",),
        lr=6e-3,
        licence="mit",
        data="data/toy",
        editor="toy/weights/editor",
    ),
    # Choice: panels of 256 pixels, so that the grid has the 512 that Stable Diffusion 1.5 was trained at. A
    # language model small enough to stand beside it on one GPU.
    "sd15": Preset(
        stable_diffusion="stable-diffusion-v1-5/stable-diffusion-v1-5",
        clip="timm/vit_large_patch14_clip_224.openai",
        clip_eval="laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        segmenter="facebook/mask2former-swin-large-coco-panoptic",
        llm="Qwen/Qwen2.5-1.5B-Instruct",
        writer="Qwen/Qwen2.5-7B-Instruct",
        picture=512,
        panel=256,
        classes=("person",),
        lr=1e-5,  # Choice: ControlNet's
        licence="creativeml-openrail-m",
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises BackboneError, which lists the names."""
    if name not in PRESETS:
        raise BackboneError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def data_folder(source: str) -> str:
    """A dataset's folder or hub id as it is; the toy world's folder is written first where it is missing."""
    if source != PRESETS["toy"].data:
        return source
    folder = HERE / source
    if not folder.exists():
        print(f"writing the toy world to {folder}, once", flush=True)
        subprocess.run([sys.executable, HERE / "toy" / "world.py", "--out", folder], check=True)
    return str(folder)


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, else MPS, else the CPU. Raises BackboneError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, is_there in there.items() if is_there))
    if not there.get(name.split(":")[0], False):
        raise BackboneError(f"--device {name}: no such device here; use --device auto or cpu")
    return torch.device(name)


# --- Loading ------------------------------------------------------------------------------------------------


class StableDiffusion(NamedTuple):
    """The parts of a latent diffusion model in diffusers' layout, frozen."""

    vae: nn.Module
    unet: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    scheduler: Any


def load_stable_diffusion(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """A Stable Diffusion folder or hub id → its frozen parts in `dtype`. Raises BackboneError."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    parts = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    folder = find_folder(source, [f"{part}/*" for part in parts])
    with clear_errors(source, "a Stable Diffusion folder in diffusers' layout"):
        vae, unet = (
            kind.from_pretrained(folder / part, torch_dtype=dtype, use_safetensors=True)
            for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
        )
        text_encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        # Whatever sampler the folder names, its noise schedule is what training needs.
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    models = (_freeze(model, device) for model in (vae, unet, text_encoder))
    return StableDiffusion(*models, tokenizer, scheduler)


@torch.no_grad()
def encode_text(sd: StableDiffusion, texts: list[str], device: torch.device | None = None) -> torch.Tensor:
    """Texts → their embeddings (B, T, D) for cross-attention, T the tokenizer's full length.

    device: where the text encoder works, should that not be where it is.
    """
    inputs = sd.tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=sd.tokenizer.model_max_length,
        return_tensors="pt",
    )
    return sd.text_encoder(inputs.input_ids.to(device or sd.text_encoder.device)).last_hidden_state


def encode_images(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] → latents (B, C, h, w) of about unit variance, float32."""
    latents = vae.encode(images.to(vae.dtype)).latent_dist.mean.float()
    return (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def decode_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Its inverse: latents (B, C, h, w) → images (B, 3, H, W), float32, clipped to [-1, 1]."""
    z = latents.to(vae.dtype) / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    return vae.decode(z).sample.float().clamp(-1, 1)


def vae_factor(vae: nn.Module) -> int:
    """Pixels along the side of a latent pixel."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def load_tiny_decoder(source: str, vae: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """An AutoencoderTiny for latents such as `vae`'s (TAESD for Stable Diffusion), frozen.

    Raises BackboneError.
    """
    from diffusers import AutoencoderTiny

    folder = find_folder(source, ["*"])
    with clear_errors(source, "an AutoencoderTiny's folder in diffusers' layout"):
        decoder = AutoencoderTiny.from_pretrained(folder, use_safetensors=True)
    if decoder.config.latent_channels != vae.config.latent_channels:
        mine, theirs = decoder.config.latent_channels, vae.config.latent_channels
        raise BackboneError(f"{source}: decodes latents of {mine} channels; this VAE's have {theirs}")
    return _freeze(decoder, device)


def load_clip(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """An open_clip model (a folder with `open_clip_config.json`, or a hub id of one), frozen."""
    import open_clip

    folder = find_folder(source, ["open_clip*"])
    with clear_errors(source, "an open_clip folder"):
        if not (folder / "open_clip_model.safetensors").is_file():
            raise FileNotFoundError("open_clip_model.safetensors is missing")
        clip = open_clip.create_model(f"local-dir:{folder}")
    return _freeze(clip.to(dtype), device)


def load_clip_tokenizer(source: str) -> Any:
    """The tokenizer of an open_clip model: texts (list of str) → token ids (B, context length)."""
    import open_clip

    with clear_errors(source, "an open_clip folder"):
        return open_clip.get_tokenizer(f"local-dir:{find_folder(source, ['*'])}")


def load_segmenter(source: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A Mask2Former for panoptic segmentation, frozen, and its image processor."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    folder = find_folder(source)
    with clear_errors(source, "a Mask2Former folder"):
        options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
        model = Mask2FormerForUniversalSegmentation.from_pretrained(folder, **options)
        processor = Mask2FormerImageProcessor.from_pretrained(folder, local_files_only=True)
    return _freeze(model, device), processor


def load_llm(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """A causal language model, frozen, and its tokenizer. dtype: None is bf16 on a GPU, float32 elsewhere."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    folder = find_folder(source)
    with clear_errors(source, "a causal language model's folder"):
        options = {"local_files_only": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return _freeze(model, device), tokenizer


def load_editor(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """An editor that `train.py` has saved: its RCLDM, frozen, and its settings. Raises BackboneError."""
    from rcldm import RCLDM

    source, folder = folder, find_folder(folder)
    with clear_errors(source, "an editor's folder as train.py saves it"):
        settings = json.loads((folder / "instructgie.json").read_text(encoding="utf-8"))
        model = RCLDM.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    return _freeze(model, device), settings


def _freeze(model: nn.Module, device: torch.device | str) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


# What a model folder may consist of: weights as safetensors, and texts.
_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")
_VARIANTS = ("*.fp16.*", "*.non_ema.*", "*.bf16.*")


def local_folder(source: str | Path) -> Path | None:
    """The folder of that path, seen from here or from this repository; None where there is none."""
    return next((folder.resolve() for folder in (Path(source), HERE / source) if folder.is_dir()), None)


def find_folder(source: str | Path, patterns: list[str] | None = None) -> Path:
    """A local folder, also relative to this repository; or a hub id's snapshot, of which only safe files."""
    if folder := local_folder(source):
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise BackboneError(f"{source}: no such folder; give a model's folder or a hub id, owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = [p.replace("*", "") + f for p in patterns or [""] for f in _FILES]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns=list(_VARIANTS)))
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = f"the hub cannot be reached or has no such model ({type(error).__name__})"
        raise BackboneError(f"{source}: {reason}; check the id and the network, or give a folder") from None


@contextlib.contextmanager
def clear_errors(source: object, what: str) -> Iterator[None]:
    """Whatever a library makes of a broken model folder becomes one line."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise BackboneError(f"{source}: not {what} ({reason})") from None


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """What the user can mend, a ValueError or OSError, ends the program with one line and exit code 2; Ctrl-C
    ends it without more words and with a shell's code for that, 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from (error if os.environ.get("DEBUG") else None)
