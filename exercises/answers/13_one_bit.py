"""σ is a root and σ² its square, which may miss the number under the root by a bit. Then 1 - ᾱ' - σ² is not 0
but some 6e-8 above or below. The count of ᾱ' where it is below depends on the machine, since processors round
in different ways: 296 of 999 on one, 221 on another. The root of a number below zero is NaN. The next pass of
the U-Net spreads NaN over the picture, and as bytes it is black.

The clamp is the fix. A check that refuses to write NaN makes the next such fault loud."""

import torch
from torch import Tensor


def step(
    x_t: Tensor, x_0: Tensor, z: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, eta: float
) -> Tensor:
    now, later = alpha_bar[:, None, None, None], alpha_bar_next[:, None, None, None]
    noise = (x_t - now.sqrt() * x_0) / (1 - now).sqrt()
    sigma = eta * ((1 - later) / (1 - now)).sqrt() * (1 - now / later).sqrt()
    direction = (1 - later - sigma**2).clamp(min=0).sqrt()
    return later.sqrt() * x_0 + direction * noise + sigma * z


def below_zero(alpha_bar_next: Tensor) -> int:
    sigma = (1 - alpha_bar_next).sqrt()
    return int(torch.sum(1 - alpha_bar_next - sigma**2 < 0))
