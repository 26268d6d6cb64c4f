"""A training step's networks as CUDA graphs: a GPU replays them without waiting for Python. [ours]

A small model's kernels take less time than their launches. RCLDM and U-Net launch some two thousand of them,
forwards and backwards, the same at each step. So the first step records them, and all others replay these.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Recorded(nn.Module):
    """`predict(model, *inputs)` as a module of the model's weights, with tensors of always the same shapes.

    predict: returns one tensor, and reads nothing that changes but its inputs and the weights.
    """

    def __init__(self, predict: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.predict, self.model, self.is_recorded = predict, model, False
        self.is_autocast, self.dtype = False, torch.float16  # as the first call finds them

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cuda", self.dtype, enabled=self.is_autocast, cache_enabled=False):
            return self.predict(self.model, *inputs)

    def replay(self, _model: nn.Module, *inputs: Tensor) -> Tensor:
        """In the place of `predict`; the first call records, with the autocast that it finds."""
        if not self.is_recorded:
            self.is_recorded, self.is_autocast = True, torch.is_autocast_enabled("cuda")
            self.dtype = torch.get_autocast_dtype("cuda")
            with torch.autocast("cuda", enabled=False):  # its cache of cast weights would be recorded, too
                copies = tuple(x.clone() for x in inputs)
                torch.cuda.make_graphed_callables(self, copies, allow_unused_input=True)
        return self(*inputs)


def recorded(
    predict: Callable[..., Tensor],
    model: nn.Module,
    device: torch.device,
    args: argparse.Namespace,
    processes: int,
) -> Callable[..., Tensor]:
    """`predict`, to be recorded and replayed where the device and the settings of the run allow it.

    Each replay writes its gradients into the same buffers: they cannot be summed over batches or processes.
    """
    alone = processes == 1 and args.accumulate == 1 and not args.gradient_checkpointing
    return Recorded(predict, model).replay if alone and device.type == "cuda" else predict
