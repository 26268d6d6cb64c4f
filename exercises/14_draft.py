"""14 · The draft that hides a loss                                              core, 40 minutes

Suppose that diffusion learns an edit slowly, and somebody adds a shortcut: a second network regresses the
answer in one pass, the draft d. The answer that diffusion draws, x̂_0, is then settled. Wherever the two are
close, the draft's latents replace it:

    settle(x̂_0, d) = d where |x̂_0 - d| ≤ c, else x̂_0          |·| the channels' root mean square

Scores rise. But the paper's losses work on x̂_0. Measure how much an ablation can still reveal about them:

- Does a loss on the settled answer reach x̂_0? Only where the gradient is not zero.
- Two editors, trained with the loss and without it, differ by some error. How much of the difference is left
  once both are settled with one draft?

Question: a table says "without SAM: no difference". Which two things may that mean, and which arm tells them
apart?

Read: `selective_area_loss` in sam_loss.py.
Test: pytest exercises -k 14, and with -s to see what is measured
"""

from collections.abc import Callable

from torch import Tensor


def settle(drawn: Tensor, draft: Tensor, close: float) -> Tensor:
    """Latents (B, C, p, p): place by place the draft's where the two are `close` or less apart."""
    raise NotImplementedError


def heard(loss: Callable[[Tensor], Tensor], drawn: Tensor, draft: Tensor, close: float) -> float:
    """The share of all places (B, p, p) at which `loss` of the settled answer has a gradient for `drawn`."""
    raise NotImplementedError


def seen(taught: Tensor, untaught: Tensor, truth: Tensor, draft: Tensor, close: float) -> float:
    """How much of the difference is left: (mean squared error of `untaught` less that of `taught`), of the
    settled answers, over the same of the answers as drawn."""
    raise NotImplementedError
