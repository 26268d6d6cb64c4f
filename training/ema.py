"""The exponential moving average (EMA) of a model's weights, which is what an editor is saved from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def new_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights, for `update_parameters(model)` after each step.

    The decay grows to its final value as (1 + n) / (10 + n): the first weights, which are random or zero,
    would otherwise stay in the average for 1 / (1 - decay) steps.
    """

    def update(average: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(average, current, weight)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update))
