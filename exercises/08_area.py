"""08 · A loss that looks at the face                                            core, 45 minutes

A mouth covers a few pixels, so its error hardly counts in the mean over a whole panel. Selective-area
matching gives it a loss of its own: the squared error of the answer's latent, averaged only over the area m
that a segmenter marked:

    L = Σ m · |x̂_0 - x_0|² / Σ m        |·|² the mean over channels, Σ over places; m from 0 to 1

The mask has the resolution of the pixels. A place of the latent stands for a square of pixels, and counts in
proportion to the marked share of this square. The loss of a batch is the mean over its samples. A sample that
marks nothing has loss 0 and gradients of 0, not NaN.

Question: a face is drawn with the wrong mouth. How much larger is this loss than the mean over the panel, and
what does the ratio tell?

Read: `selective_area_loss` in sam_loss.py, after you have tried.
Test: pytest exercises -k 08, and with -s to see what is measured
"""

from torch import Tensor


def latent_area(area: Tensor, side: int) -> Tensor:
    """Masks of pixels (B, 1, P, P) in [0, 1] → the marked share of each latent place (B, 1, side, side)."""
    raise NotImplementedError


def selective_area_loss(predicted: Tensor, target: Tensor, area: Tensor) -> Tensor:
    """The loss L, a scalar. predicted, target: (B, C, p, p); area: of pixels (B, 1, P, P)."""
    raise NotImplementedError
