"""ESM and SAM, read otherwise than by default. The paper leaves open at which noise levels they act.

    python -m evaluation.readings esm-everywhere --es-weight 0.05 --output runs/reading
    python -m evaluation.readings sam-at-low-noise --sam-weight 1.8 --output runs/reading
    python -m evaluation.evaluate runs/reading/editor --split train

The other options are those of train.py. [ours] `esm-everywhere`: L_es acts on every grid, whatever its noise,
and is the plain distance of the two shifts, |ŝ − s|, whose gradient has nearly the same length for small and
large edits. It decodes four times as many answers. [ours] `sam-at-low-noise`: L_sam acts where L_es does by
default.
"""

import sys
from functools import partial

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from open_clip import CLIP
from torch import Tensor

import backbone
import esm
import sam_loss
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


READINGS = {
    "esm-everywhere": [
        (esm, "reliability", every_level),
        (esm, "editing_shift_loss", shift_distance),
        (train, "ES_EVERY", ES_EVERY),
    ],
    "sam-at-low-noise": [(sam_loss, "noise_weight", esm.reliability)],
}


def new_model(reading: str, unet: UNet2DConditionModel, **options) -> RCLDM:
    """Exchanges the losses too: `train.py` calls this in each of its processes, before the first step."""
    for module, name, other in READINGS[reading]:
        setattr(module, name, other)
    return RCLDM.from_unet(unet, **options)


@backbone.one_line_errors("evaluation.readings")
def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READINGS:
        raise ValueError(f"give a reading first: {' or '.join(READINGS)}; then options of train.py")
    train.main(new_model=partial(new_model, sys.argv.pop(1)))


if __name__ == "__main__":
    main()
