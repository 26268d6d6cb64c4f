"""01 · The visual prompt                                                        warm-up, 15 minutes

InstructGIE is asked for an edit by one picture, a 2×2 grid: an example of the edit above, before and after;
below it the query, and in the last panel the answer. What the model is shown is the same grid with the answer
greyed out (in the paper's figure: Img_VPcon).

    example before | example after
    query          | grey

Pictures are in [-1, 1], black to white. The panels may come with any axes before the last three, and are not
to be changed.

Question: which number is grey, and why is the answer not simply left black?

Read: the head of dataset.py.
Test: pytest exercises -k 01
"""

from torch import Tensor


def condition(before: Tensor, after: Tensor, query: Tensor) -> Tensor:
    """Three panels (..., 3, P, P) → the grid (..., 3, 2P, 2P) whose answer is grey."""
    raise NotImplementedError


def answer(grid: Tensor) -> Tensor:
    """The answer's panel (..., C, P, P) of a grid (..., C, 2P, 2P)."""
    raise NotImplementedError
