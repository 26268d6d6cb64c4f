"""07 · What a cosine does not see                                               core, 45 minutes

CLIP puts a picture at a point T of unit length, and an edit moves it: the editing shift is T(after) -
T(before). Editing-shift matching requires the predicted shift s to match the true one, s*. The paper's
summary and figures leave the measure open. The obvious one is the cosine; this project takes a distance
relative to both lengths:

    1 - cos(s, s*)        or        |s - s*|² / (|s|² + |s*|² + eps)        eps = 0.001

Both are 0 for the true edit and 2 (all but eps) for its opposite. Write both; then a shift that deceives the
cosine. Question: how do they score an edit that is made only in part? How do they score an unchanged picture,
and in which direction does the gradient point there? Why is |s - s*|² alone unsuitable?

Read: `editing_shift_loss` in esm.py, after you have tried.
Test: pytest exercises -k 07, and with -s to see what is measured
"""

from torch import Tensor


def cosine_loss(shift: Tensor, true_shift: Tensor) -> Tensor:
    """1 - cosine: shifts (B, E) → (B,). A shift of length 0 has the loss 1."""
    raise NotImplementedError


def relative_loss(shift: Tensor, true_shift: Tensor, eps: float = 1e-3) -> Tensor:
    """The relative distance: shifts (B, E) → (B,)."""
    raise NotImplementedError


def deceptive(true_shift: Tensor) -> Tensor:
    """A shift (B, E) that the cosine loss holds for perfect, below 0.001; the relative loss is over 0.9."""
    raise NotImplementedError
