"""The exponential moving average (EMA) of a model's weights, which is what an editor is saved from."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class EMA(AveragedModel):
    """`module` is the average of a model's weights, if `update_parameters(model)` is called after each step.
    Its buffers are the model's.

    The decay grows to its final value as (1 + n) / (10 + n): the first weights, which are random or zero,
    would otherwise stay in the average for 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        @torch.no_grad()
        def average(averages: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
            n = int(self.n_averaged)  # on the CPU: the argument's copy would wait for the GPU
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(model, multi_avg_fn=average)
        self.requires_grad_(False)
