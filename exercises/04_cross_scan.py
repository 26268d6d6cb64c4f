"""04 · A picture as four sequences                                              warm-up, 30 minutes

A selective scan reads a sequence from beginning to end, so late elements cannot influence early ones. VMamba
therefore reads a picture in four orders at once: by rows, by columns, and both from the end:

    0 1 2      0 1 2 3 4 5, 0 3 1 4 2 5, 5 4 3 2 1 0, 5 2 4 1 3 0
    3 4 5

and afterwards each pixel sums the results of its four readings. That sum is the adjoint of the reading:
<scan(x), y> = <x, merge(y)> for all x and y, so each is the other's gradient.

Write both functions, and count over how many steps a scan must carry information.
Question: a panel of the toy grid is 8 latents wide. How many steps lie between a place of the query and its
twin in the answer, in each order? And from the twin in "example after"? What is left of a state after that
many steps, at a half-life of 7?

Read: section 2 of rcldm.py, after you have tried.
Test: pytest exercises -k 04
"""

from torch import Tensor

Pixel = tuple[int, int]  # row, column


def cross_scan(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, 4, C, H·W), in the orders above."""
    raise NotImplementedError


def cross_merge(ys: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, C, H·W) → (B, C, H, W): each pixel sums its four."""
    raise NotImplementedError


def steps(a: Pixel, b: Pixel, height: int, width: int) -> list[int]:
    """How many steps after pixel `a` each order reads pixel `b`; negative where `b` comes first."""
    raise NotImplementedError
