"""13 · One bit of rounding                                                      core, 30 minutes

A sampler's step may add fresh noise. DDIM's (Song et al., 2021, equations 12 and 16) goes from x_t to

    x' = √ᾱ' · x̂_0 + √(1 - ᾱ' - σ²) · ε̂ + σ · z        z ~ N(0, 1)
    ε̂ = (x_t - √ᾱ · x̂_0) / √(1 - ᾱ)                    σ = η · √((1 - ᾱ') / (1 - ᾱ)) · √(1 - ᾱ / ᾱ')

Here ᾱ belongs to this timestep, 0 for pure noise, and ᾱ' > ᾱ to the next. η = 0 adds no noise, η = 1 as much
as DDPM.

Write this step so that rounding cannot spoil it. Otherwise an editor draws correct pictures on one processor
and black ones on another: at ᾱ = 0 and η = 1, the second root is that of zero.
Question: for how many of ᾱ' = 0.001 … 0.999 does float32 put it below zero, with σ² the square of σ as
computed? What becomes of the picture there?

Read: `check_finite` in pictures/tensors.py, after you have tried.
Test: pytest exercises -k 13, and with -s to see what is measured
"""

from torch import Tensor


def step(
    x_t: Tensor, x_0: Tensor, z: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, eta: float
) -> Tensor:
    """x' (B, C, H, W) of x_t, x̂_0 and z, of that shape; alpha_bar, alpha_bar_next: (B,); all float32."""
    raise NotImplementedError


def below_zero(alpha_bar_next: Tensor) -> int:
    """Of how many of these ᾱ', (N,) of float32, 1 - ᾱ' - σ² is below zero at ᾱ = 0 and η = 1."""
    raise NotImplementedError
