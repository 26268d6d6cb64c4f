"""Pictures and latents, texts and their embeddings, and the sampler of an edit."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import diffusers
import torch
from torch import nn

from backbone.loading import StableDiffusion

SAMPLERS = {  # diffusers' names
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


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
    return vae.encode(images.to(vae.dtype)).latent_dist.mean.float() * vae.config.scaling_factor


def decode_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Its inverse: latents (B, C, h, w) → images (B, 3, H, W), float32, clipped to [-1, 1].

    Where they are not finite they are NaN, also for infinity, of which the clip would make a picture.
    """
    images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()
    return images.clamp(-1, 1).where(images.isfinite(), math.nan)


def new_sampler(name: str, scheduler: Any) -> Any:
    """The sampler of `SAMPLERS` by this name, with another's noise levels and kind of prediction."""
    return getattr(diffusers, SAMPLERS[name]).from_config(scheduler.config)


def set_timesteps(scheduler: Any, steps: int, device: str | torch.device | None = None) -> None:
    """The timesteps of an edit, each within those of training and no two alike.

    Raises ValueError where there are too many steps for that.
    """
    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ValueError(f"the number of steps must be 1 … {most}, not {steps}")
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
    if timesteps.max() >= most or is_twice:
        raise ValueError(f"{steps} steps are more than this sampler has timesteps for: take fewer")


def sampler_step(
    scheduler: Any, prediction: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor, generator: Any
):
    """The output of the scheduler's `step`, x_t → x_(t-1). generator: for those that add fresh noise."""
    takes_one = "generator" in inspect.signature(scheduler.step).parameters
    return scheduler.step(prediction, t, x_t, **({"generator": generator} if takes_one else {}))


def vae_factor(vae: nn.Module) -> int:
    """Pixels along the side of a latent pixel: every block of an AutoencoderKL but the last halves a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def prediction_target(x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, scheduler) -> torch.Tensor:
    """What this scheduler's U-Net is to answer for x_t, from which `esm.predict_x0` tells x_0."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(x_0, noise, t)
    return x_0 if kind == "sample" else noise
