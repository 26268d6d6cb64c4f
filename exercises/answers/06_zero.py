"""With the zero no bit of the output changes. The more noise is in its place, the further the picture is off.
Training would start by mending this damage. `-s` prints its size.

The gradient of a projection W x by W is dy xᵀ: it needs an x, and no W. So at the first step exactly the 7
links' projections learn, weight and bias, 14 of 355 parameters; what lies behind them would have to be
reached through W = 0. Without the zero 268 learn, all but what is behind the prompt encoder's own zero. If a
block gave zeros as well, it and its projection's weight would wait for each other for ever."""

from torch import Tensor, nn

from rcldm import RCLDM, ZeroVMamba


def steered(
    unet: nn.Module, rcldm: RCLDM, noisy: Tensor, timestep: int, text: Tensor, grid: Tensor
) -> Tensor:
    down, middle = rcldm(noisy, timestep, text, grid, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return unet(noisy, timestep, text, **residuals).sample


def break_zero(rcldm: RCLDM, deviation: float) -> None:
    for module in rcldm.modules():
        if isinstance(module, ZeroVMamba):
            nn.init.normal_(module.zero_proj.weight, std=deviation)


def learners(rcldm: RCLDM) -> set[str]:
    gradients = ((name, parameter.grad) for name, parameter in rcldm.named_parameters())
    return {name for name, gradient in gradients if gradient is not None and gradient.any()}
