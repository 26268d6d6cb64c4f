"""06 · Why the links start at zero                                              core, 45 minutes

RCLDM is a trainable copy of the U-Net's encoder whose outputs, the residuals, are added to the frozen U-Net's
features. They pass through links, `ZeroVMamba`: a VMamba block, and behind it a linear projection,
`zero_proj`, that starts at exactly zero. "Exactly" can be tested: no bit of the output may change.

Pass the residuals to the U-Net; then break the zero, and see what it was good for.
Question: before any training, how does the error of the U-Net's picture grow with the noise in the
projections? (This U-Net predicts x_0 itself. PyTorch's default initialisation of layers of these sizes has a
deviation of 0.06 to 0.10.) Which parameters have a gradient at the first step, with the zero and without? Why
does a projection of zeros learn at all, and would it still learn if the block before it returned zeros too?

Read: `ZeroVMamba` and `RCLDM.forward` in rcldm.py; the arguments `down_block_additional_residuals` and
`mid_block_additional_residual` of diffusers' U-Net.
Test: pytest exercises -k 06, and with -s to see what is measured
"""

from torch import Tensor, nn

from rcldm import RCLDM


def steered(
    unet: nn.Module, rcldm: RCLDM, noisy: Tensor, timestep: int, text: Tensor, grid: Tensor
) -> Tensor:
    """The U-Net's output (B, C, h, w) with RCLDM's residuals added.

    noisy: (B, C, h, w); text: (B, T, D); grid: the condition (B, 3, H, W) in [-1, 1].
    """
    raise NotImplementedError


def break_zero(rcldm: RCLDM, deviation: float) -> None:
    """Fills the weights of the links' projections, and nothing else, with normal noise of that deviation."""
    raise NotImplementedError


def learners(rcldm: RCLDM) -> set[str]:
    """The names of the parameters that the last backward pass gave a gradient other than zero."""
    raise NotImplementedError
