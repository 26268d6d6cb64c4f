"""05 · The selective scan, as it is written                                     core, 45 minutes

The one equation of Mamba (Gu and Dao, 2023), on which the VMamba encoder of InstructGIE is built. Each of D
channels keeps a state h of N numbers, which starts at 0 and forgets as it reads:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
    y_t = C_t · h_t + D u_t

Δ_t is the size of a step, one for each channel; B_t and C_t are shared by all channels. In the network, all
three are computed from the input, so the input decides what the scan keeps. Write it as a loop over t; every
line in it should be one operation on whole tensors.

Then: how long does a channel remember? VMamba starts with A = -1 … -N and steps of 0.001 to 0.1.
Question: after how many pixels is half of the state forgotten, for A = -1, at both ends of that range?

Read: `selective_scan` in rcldm.py, after you have tried. Shapes in brackets are sizes. Outside brackets B, C
and D are the parameters.
Test: pytest exercises -k 05
"""

from torch import Tensor


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """u, delta: (B, D, L), delta > 0; A: (D, N), < 0; B, C: (B, N, L); D: (D,). Returns y (B, D, L)."""
    raise NotImplementedError


def half_life(step: float, rate: float) -> float:
    """The number of steps of size Δ = `step` after which half of the state is left, for A = -`rate`."""
    raise NotImplementedError
