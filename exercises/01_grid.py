"""01 · The visual prompt                                                        warm-up, 15 minutes

A 2×2 grid shows InstructGIE the edit to make. Its upper row shows an example of the edit,
before and after. Its lower row holds the query and the answer. The model sees the same grid with the answer
greyed out (in the paper's figure: Img_VPcon).

    example before | example after
    query          | grey

Pictures are in [-1, 1], black to white. The panels may have any axes before the last three, and must not be
modified.

Question: which number is grey, and why is the answer not simply left black?

Read: the section Grids of dataset.py, after you have tried.
Test: pytest exercises -k 01
"""

from torch import Tensor


def condition(before: Tensor, after: Tensor, query: Tensor) -> Tensor:
    """Three panels (..., 3, P, P) → the grid (..., 3, 2P, 2P) whose answer is grey."""
    raise NotImplementedError


def answer(grid: Tensor) -> Tensor:
    """The answer's panel (..., C, P, P) of a grid (..., C, 2P, 2P)."""
    raise NotImplementedError
