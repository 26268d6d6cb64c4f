"""Solve for x_0, and read the factor of ε off the solution: √(1 - ᾱ) / √ᾱ, the ratio of noise to signal.

It is 2 where (1 - ᾱ) / ᾱ = 4, at ᾱ = 0.2. That is `min_alpha_bar` of `reliability`. At stronger noise, losses
on pictures would mostly judge the magnified error of a predicted noise. The toy's U-Net predicts x_0 itself.
It magnifies nothing, but its x̂_0 is a blur there."""

from torch import Tensor


def predict_x0(noisy: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    alpha_bar = alpha_bar[:, None, None, None]  # one noise level for each sample, not for each column
    return (noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


def error_gain(alpha_bar: Tensor) -> Tensor:
    return ((1 - alpha_bar) / alpha_bar).sqrt()
