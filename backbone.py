"""Names and folders of the pretrained parts: Stable Diffusion, CLIP, Mask2Former and the language model.

Every part is a preset's, a Hugging Face hub id or a local folder, and all three are read by the same code.
Weights are read from safetensors alone, and no code that comes with them is run.

    sd = load_stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5", device)
    clip = load_clip(preset("sd15").clip, device)
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

HERE = Path(__file__).resolve().parent
# Of processes for each other: one looks at all the pictures while the others wait, on GPUs for ten minutes if
# PyTorch is not told. Should that one fail, the launcher ends all.
PATIENCE = timedelta(days=7)


class BackboneError(ValueError):
    """A part that cannot be loaded. The message is one line: which, why, and what to do."""

    def __init__(self, line: str) -> None:
        super().__init__(" ".join(line.split()))


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
    """A dataset's folder or hub id as it is; the toy world's folder is written first where it is missing.

    Raises BackboneError where it cannot be written.
    """
    if source != PRESETS["toy"].data:
        return source
    folder = HERE / source
    if not folder.exists():
        print(f"writing the toy world to {folder}, once", flush=True)
        command = [sys.executable, HERE / "toy" / "world.py", "--out", folder]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if not folder.is_dir():  # where another process was faster, its folder is as good
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            way = "python toy/world.py --out FOLDER writes it elsewhere, for --data FOLDER"
            raise BackboneError(f"the toy world cannot be written ({reason}); {way}")
    return str(folder)


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, else MPS, else the CPU. Raises BackboneError for a device that is not there."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(device for device, count in there.items() if count))
    kind = name.split(":")[0]
    count = there.get(kind, 0)
    if not count or name not in (kind, *(f"{kind}:{k}" for k in range(count))):
        raise BackboneError(f"--device {name[:80]}: no such device here; use --device auto or cpu")
    return torch.device(name)


def choose_attention(device: torch.device, precision: str) -> None:
    """Which of its attentions PyTorch takes in training from here on.

    On a CPU in bf16, and at the toy's sizes, the way back through the fused one takes several times as long
    as in float32. Switched for the whole process: what gradient checkpointing computes again, it must compute
    as before.
    """
    fused = device.type != "cpu" or precision == "no"
    torch.backends.cuda.enable_flash_sdp(fused)  # not of CUDA alone


# --- Loading ------------------------------------------------------------------------------------------------


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

    folder = find_folder(source, _FOLDERS["stable_diffusion"])
    with clear_errors(source, "a Stable Diffusion folder in diffusers' layout", folder):
        vae, unet = (
            kind.from_pretrained(folder / part, torch_dtype=dtype, use_safetensors=True)
            for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
        )
        text_encoder = _transformer(CLIPTextModel, folder / "text_encoder", dtype)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        # Whatever sampler the folder names, its noise schedule is what training needs. Latents have no
        # bounds to clip to, and PNDM ends at the first noise level: so `StableDiffusionPipeline` reads it.
        config = DDIMScheduler.load_config(folder / "scheduler")
        config.setdefault("set_alpha_to_one", config.get("_class_name") != "PNDMScheduler")
        scheduler = DDIMScheduler.from_config(config | {"clip_sample": False, "steps_offset": 1})
        check_tokenizer(tokenizer, text_encoder)
        models = [_freeze(model, device) for model in (vae, unet, text_encoder)]
    return StableDiffusion(*models, tokenizer, scheduler)


def check_tokenizer(tokenizer: Any, text_encoder: nn.Module) -> None:
    """Raises ValueError for a tokenizer whose texts are longer than this encoder reads, or of other words."""
    config = text_encoder.config
    too_long = tokenizer.model_max_length > config.max_position_embeddings
    if too_long or words_of(tokenizer) > config.vocab_size:
        raise ValueError("its tokenizer does not fit its text encoder")


def words_of(tokenizer: Any) -> int:
    """How many words a model must know to read what this tokenizer of transformers writes: its ids may have
    gaps, and those that it puts around a text be of no word."""
    return 1 + max(*tokenizer.get_vocab().values(), *tokenizer("a cat")["input_ids"])


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


def cut_off(tokenizer: Any, texts: Iterable[str]) -> dict[str, str]:
    """Those of the texts that `encode_text` does not read to their end, each with a line that shows it."""
    longest, distinct, cut = tokenizer.model_max_length, list(dict.fromkeys(texts)), {}
    whole = tokenizer(distinct, return_offsets_mapping=True, verbose=False) if distinct else {}
    for text, places in zip(distinct, whole.get("offset_mapping", ())):
        if len(places) > longest:  # the last of its tokens is the end's
            end = " ".join(text[places[longest - 1][0] :].split())[:200]
            cut[text] = f'the text encoder reads {longest} tokens of an instruction; cut off: "{end}"'
    return cut


def encode_images(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] → latents (B, C, h, w) of about unit variance, float32."""
    latents = vae.encode(images.to(vae.dtype)).latent_dist.mean.float()
    return (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def decode_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Its inverse: latents (B, C, h, w) → images (B, 3, H, W), float32, clipped to [-1, 1].

    Where they are not finite they are NaN, also for infinity, of which the clip would make a picture.
    """
    z = latents.to(vae.dtype) / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    images = vae.decode(z).sample.float()
    return images.clamp(-1, 1).where(images.isfinite(), math.nan)


def set_timesteps(scheduler: Any, steps: int, device: str | torch.device | None = None) -> None:
    """The timesteps of an edit, each within those of training and no two alike.

    Raises ValueError where there are too many steps for that.
    """
    scheduler.set_timesteps(steps, device=device)
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    inside = timesteps >= 0
    if not inside.all():
        # Spaced "trailing", so many steps of T / steps come short of T by a rounding for some numbers, and
        # diffusers takes one more, at -1: it would index the noise levels from their end.
        scheduler.timesteps = timesteps[inside]
        if sigmas is not None:
            scheduler.sigmas = sigmas = torch.cat([sigmas[:-1][inside.cpu()], sigmas[-1:]])
    is_twice = sigmas is not None and scheduler.order == 1 and (sigmas.diff() == 0).any()
    if timesteps.max() >= scheduler.config.num_train_timesteps or is_twice:
        raise ValueError(f"{steps} steps are more than this sampler has timesteps for: take fewer")


def vae_factor(vae: nn.Module) -> int:
    """Pixels along the side of a latent pixel.

    Raises BackboneError where its two halves do not agree, and for an autoencoder of another class.
    """
    try:
        down = sum(block.downsamplers is not None for block in vae.encoder.down_blocks)
        up = sum(block.upsamplers is not None for block in vae.decoder.up_blocks)
    except AttributeError:
        raise BackboneError(
            f"the autoencoder is of class {type(vae).__name__}: give one of class AutoencoderKL"
        ) from None
    if down != up:
        raise BackboneError(
            f"the autoencoder makes pictures {2**down} times smaller and {2**up} times larger"
        )
    return 2**down


def load_tiny_decoder(source: str, vae: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """An AutoencoderTiny for latents such as `vae`'s (TAESD for Stable Diffusion), frozen.

    Raises BackboneError.
    """
    from diffusers import AutoencoderTiny

    folder = find_folder(source, ["*"])
    with clear_errors(source, "an AutoencoderTiny's folder in diffusers' layout", folder):
        decoder = _freeze(AutoencoderTiny.from_pretrained(folder, use_safetensors=True), device)
    if decoder.config.latent_channels != vae.config.latent_channels:
        mine, theirs = decoder.config.latent_channels, vae.config.latent_channels
        raise BackboneError(f"{source}: decodes latents of {mine} channels; this VAE's have {theirs}")
    return decoder


def load_clip(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """An open_clip model (a folder with `open_clip_config.json`, or a hub id of one), frozen."""
    import open_clip

    folder = find_folder(source, ["open_clip*"])
    with clear_errors(source, "an open_clip folder", folder):
        if not (folder / "open_clip_model.safetensors").is_file():
            raise FileNotFoundError("open_clip_model.safetensors is missing")
        return _freeze(open_clip.create_model(f"local-dir:{folder}").to(dtype), device)


def load_clip_tokenizer(source: str) -> Any:
    """The tokenizer of an open_clip model: texts (list of str) → token ids (B, context length)."""
    import open_clip

    folder = find_folder(source, ["*"])
    with clear_errors(source, "an open_clip folder", folder):
        config = _read_json(folder / "open_clip_config.json")["model_cfg"]["text_cfg"]
        # What is given here stands above the config's own, which could ask for the folder's code to be run.
        own = config.get("hf_tokenizer_name")
        options = {"trust_remote_code": False} if own else {}
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", **options)
        words = words_of(tokenizer.tokenizer) if own else tokenizer.vocab_size
        if words > config.get("vocab_size", words):
            raise ValueError("its tokenizer has more words than it")
        tokenizer([""])
    return tokenizer


def load_segmenter(source: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A Mask2Former for panoptic segmentation, frozen, and its image processor."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    folder = find_folder(source)
    with clear_errors(source, "a Mask2Former folder", folder):
        model = _transformer(Mask2FormerForUniversalSegmentation, folder, torch.float32)
        processor = Mask2FormerImageProcessor.from_pretrained(folder, local_files_only=True)
        return _freeze(model, device), processor


def load_llm(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """A causal language model, frozen, and its tokenizer. dtype: None is bf16 on a GPU, float32 elsewhere."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    folder = find_folder(source)
    with clear_errors(source, "a causal language model's folder", folder):
        model = _transformer(AutoModelForCausalLM, folder, dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_llm(model, tokenizer)
        return _freeze(model, device), tokenizer


def load_editor(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """An editor that `train.py` has saved: its RCLDM, frozen, and its settings. Raises BackboneError."""
    from rcldm import RCLDM

    source, folder = folder, find_folder(folder)
    with clear_errors(source, "an editor's folder as train.py saves it", folder):
        settings = _read_json(folder / "instructgie.json")
        model = RCLDM.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
        return _freeze(model, device), settings


def _transformer(kind: Any, folder: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A model of transformers. Raises ValueError where its files lack a weight, which would be made up."""
    options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    model, found = kind.from_pretrained(folder, dtype=dtype, **options)
    if lacking := sorted(set(found["missing_keys"]) & {name for name, _ in model.named_parameters()}):
        raise ValueError(f"its weights lack {lacking[0]}")
    return model


def check_llm(model: nn.Module, tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer of more words than its language model."""
    if words_of(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError("its tokenizer has more words than it")


def check_model(model: nn.Module) -> None:
    """Raises ValueError where the files lack a weight, which diffusers leaves for later to stumble over."""
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"its weights lack {missing[0]}")


def check_weights(model: nn.Module, folder: Path) -> None:
    """Raises ValueError where its files hold fewer numbers than it, so that some must have been made up."""
    held = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            held += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    if held < sum(parameter.numel() for parameter in model.parameters()):
        raise ValueError(f"the weights in {folder.name} lack some of it")


def _freeze(model: nn.Module, device: torch.device | str) -> nn.Module:
    check_model(model)
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


# Subfolders of each part that an edit needs besides the editor.
_FOLDERS = {
    "stable_diffusion": [f"{name}/*" for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")],
    "llm": ["*"],
}


def lasting_name(source: str) -> str:
    """A source by which it is found from any folder: a local one by its full path, or as this repository
    names it; a hub id as it is."""
    folder = local_folder(source)
    if folder is None:
        return source
    return folder.relative_to(HERE).as_posix() if folder.is_relative_to(HERE) else str(folder)


def fingerprint(source: str | Path, part: str) -> str:
    """Of the weights of a part, "stable_diffusion" or "llm", to know them again wherever they lie.

    A file of up to 64 MiB counts whole; a larger one by its size and 256 evenly spread blocks, which takes a
    fraction of a second. Training moves every block; a change of single weights may fall between two. Raises
    BackboneError.
    """
    folder, digest = find_folder(source, _FOLDERS[part]), hashlib.sha256()
    files = sorted(file for pattern in _FOLDERS[part] for file in folder.glob(f"{pattern}.safetensors"))
    for file in (file for file in files if not any(map(file.match, _VARIANTS))):
        size, block = file.stat().st_size, 1 << 18
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as weights:
            for start in range(0, size, max(block, math.ceil(size / 256))):
                weights.seek(start)
                digest.update(weights.read(block))
    return digest.hexdigest()[:16]


def find_part(editor: Path, settings: dict[str, Any], part: str) -> Path:
    """The folder of a part that an editor needs, "stable_diffusion" or "llm".

    It is looked for by its name, from here and from this repository; then beside the editor, as when both
    were moved; then on the hub. Raises BackboneError where there is none, or only one of another fingerprint
    than the editor's settings have. Settings without a fingerprint take the first.
    """
    source, wanted = settings[part], settings.get("fingerprints", {}).get(part)
    beside = settings.get("relative", {}).get(part)
    names = [Path(source), HERE / source, *([editor / beside] if beside else [])]
    folders = [name for name in names if name.is_dir()] or [find_folder(source, _FOLDERS[part])]
    for folder in folders:
        if wanted in (None, fingerprint(folder, part)):
            return folder.resolve()
    raise BackboneError(
        f"{folders[0]}: not the weights that the editor was trained with; put those there, "
        'or remove "fingerprints" from its instructgie.json'
    )


@contextlib.contextmanager
def clear_errors(source: object, what: str, folder: Path) -> Iterator[None]:
    """Whatever a library makes of a broken model folder becomes one line."""
    try:
        for names in ("*config.json", "*.safetensors.index*.json"):
            for path in (*folder.glob(names), *folder.glob(f"*/{names}")):
                _read_json(path)
        yield
    except BackboneError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise BackboneError(f"{source}: not {what} ({reason})") from None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), object_hook=_refuse_code)


def _refuse_code(config: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for shards that are no safetensors of the folder, and so may be read as pickles, and
    for attention that is code from the hub."""
    for key, value in config.items():
        if key == "weight_map":
            for name in value.values():
                if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                    raise ValueError(f"{name[:80]!r} is no safetensors file of the folder")
        if key.endswith("_implementation") and "/" in str(value):
            raise ValueError(f"{key} {str(value)[:80]!r} is code from elsewhere")
    return config


def check_parts(folder: Path) -> None:
    """Raises ValueError where a pipeline's `model_index.json` names a class of its own, or of a library that
    has no business there: to import one is to run it."""
    for name, part in _read_json(folder / "model_index.json").items():
        if isinstance(part, list):
            library, kind = part
            known = library in (None, "diffusers", "transformers", "rcldm")
            automatic = library == "transformers" and str(kind).startswith("Auto")  # as a config has it
            if not known or automatic or (folder / name / f"{library}.py").exists():
                raise ValueError(f"{name} would be code from elsewhere, {str(part)[:80]}")


# --- The programs -------------------------------------------------------------------------------------------


def check_numbers(args: argparse.Namespace, bounds: dict[tuple[float, float], str]) -> None:
    """Raises ValueError for an option that is no finite number, or beyond its bounds.

    bounds: (least, most) → the names of the options that they hold for, with spaces between.
    """
    of = {name: pair for pair, names in bounds.items() for name in names.split()}
    for name, value in vars(args).items():
        if isinstance(value, float | int):
            option, (least, most) = f"--{name.replace('_', '-')}", of.get(name, (-math.inf, math.inf))
            wanted = f"{least} … {most}" if most < math.inf else f"at least {least}"
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option} must be a finite number, not {value}")
            if not least <= value <= most:
                raise ValueError(f"{option} must be {wanted}, not {str(value)[:40]}")


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """What the user can mend, a ValueError or OSError or too little memory, ends the program with one line
    and exit code 2; Ctrl-C ends it without more words and with a shell's code for that, 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in line:
            line = f"the memory does not suffice ({line[-200:]}); ask for less at a time, or smaller pictures"
        elif isinstance(error, RuntimeError):
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        raise SystemExit(2) from (error if os.environ.get("DEBUG") else None)
