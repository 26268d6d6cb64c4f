"""02 · What a noise prediction says of the picture                              warm-up, 20 minutes

A training step draws no picture. It adds noise to the clean latent x_0 of the grid:

    x_t = √ᾱ · x_0 + √(1 - ᾱ) · ε        ε ~ N(0, 1), 0 < ᾱ ≤ 1

A U-Net such as Stable Diffusion's predicts the noise ε. Editing-shift matching and selective-area matching,
however, both need a picture. They use x̂_0, the clean latent that the prediction implies.

Write the function for x̂_0, and the factor by which it enlarges an error of the prediction.
Question: from which ᾱ on is that factor at most 2? Where is this number in esm.py?

Read: `predict_x0` and `reliability` in esm.py, after you have tried. Mind the axes of ᾱ.
Test: pytest exercises -k 02
"""

from torch import Tensor


def predict_x0(noisy: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x̂_0 (B, C, H, W) of x_t and a prediction of ε, both (B, C, H, W); alpha_bar: (B,)."""
    raise NotImplementedError


def error_gain(alpha_bar: Tensor) -> Tensor:
    """The size of an error in x̂_0 over that of the error in the predicted ε. (B,) → (B,), > 0."""
    raise NotImplementedError
