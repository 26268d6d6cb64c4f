"""The exponential moving average (EMA) of a model's weights, which is what an editor is saved from."""

import copy

import torch
from torch import nn


class EMA(nn.Module):
    """`module` is the average of a model's weights, once `update(model)` is called after each step; its
    buffers are the model's.

    The decay grows to its final value as (1 + n) / (10 + n): the first weights, which are random or zero,
    would otherwise stay in the average for 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))  # on the CPU: it is read each time

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        n = int(self.updates)
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        torch._foreach_lerp_([*self.module.parameters()], [*model.parameters()], weight)
        for mine, theirs in zip(self.module.buffers(), model.buffers()):
            mine.copy_(theirs)
        self.updates += 1
