"""Settling is a switch. Where it takes the draft, nothing that diffusion drew is left: no loss on the answer
reaches x̂_0, and no ablation can see the loss's effect there.

Of faces drawn with the wrong mouth and a tenth of a unit of noise, L_sam is heard at 41 % where c is 0.25, at
15 % where it is 0.5, and nowhere from 1 on. An ablation then sees 93 %, 61 % and 0 % of the difference.

"No difference" may mean that the loss does nothing, or that the draft covers its effect. An arm without the
draft tells them apart: so measure a contribution where it works, and on the method alone."""

from collections.abc import Callable

import torch
from torch import Tensor


def settle(drawn: Tensor, draft: Tensor, close: float) -> Tensor:
    apart = (drawn - draft).square().mean(1, keepdim=True).sqrt()  # (B, 1, p, p)
    return torch.where(apart <= close, draft, drawn)


def heard(loss: Callable[[Tensor], Tensor], drawn: Tensor, draft: Tensor, close: float) -> float:
    drawn = drawn.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(settle(drawn, draft, close)), drawn)
    return (gradient != 0).any(1).float().mean().item()


def seen(taught: Tensor, untaught: Tensor, truth: Tensor, draft: Tensor, close: float) -> float:
    def difference(taught: Tensor, untaught: Tensor) -> Tensor:
        return (untaught - truth).square().mean() - (taught - truth).square().mean()

    settled = difference(*(settle(drawn, draft, close) for drawn in (taught, untaught)))
    return (settled / difference(taught, untaught)).item()
