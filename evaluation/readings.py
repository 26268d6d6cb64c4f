"""ESM and SAM, read otherwise than by default. The paper leaves open at which noise levels they act.

    python -m evaluation.readings --es-weight 0.05 --sam-weight 0.3 --output runs/reading
    python -m evaluation.evaluate runs/reading/editor --split train

The options are those of train.py. [ours] In this reading, both losses act on every grid, whatever its noise.
L_es is the plain distance of the two shifts, |ŝ − s|, whose gradient has nearly the same length for small and
large edits. It decodes four times as many answers.
"""

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from open_clip import CLIP
from torch import Tensor

import esm
import train
from rcldm import RCLDM

ES_EVERY = 8


def every_level(timestep: Tensor, scheduler: SchedulerMixin) -> Tensor:
    """In place of `esm.reliability`: (B,) → (B,), all 1."""
    return torch.ones(len(timestep), device=timestep.device)


def shift_distance(clip: CLIP, before: Tensor, predicted: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """In place of `esm.editing_shift_loss`, with its arguments. A scalar in [0, 2].

    `before` falls out of |ŝ − s|: both shifts begin there.
    """
    apart = esm.editing_shift(clip, after, predicted).norm(dim=-1)  # (B,)
    return (weight * apart).mean()


def new_model(unet: UNet2DConditionModel, **options) -> RCLDM:
    """Exchanges the losses too: `train.py` calls this in each of its processes, before the first step."""
    esm.reliability, esm.editing_shift_loss, train.ES_EVERY = every_level, shift_distance, ES_EVERY
    return RCLDM.from_unet(unet, **options)


if __name__ == "__main__":
    train.main(new_model=new_model)
