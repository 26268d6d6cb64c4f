"""A cosine sees direction alone. The relative distance of r s* from s* is (1 - r)² / (1 + r²): half of the
edit costs 0.2, a tenth of it or ten times as much 0.8. The plain distance sees lengths too, but grows with
their square: edits that are large for CLIP would drown the small ones.

Between real pictures the cosine is less blind, since on the way from before to after the direction turns as
well. But "make it night" made to a tenth costs 0.49 by the cosine and 0.89 by the relative distance.

At s = 0 a cosine is not defined. PyTorch keeps it finite by a tiny eps, and its gradient has a length of 1e8.
The relative distance is 1 there, and its negative gradient points straight at s*: a good start for a model
that leaves the query unchanged at first."""

import torch.nn.functional as F
from torch import Tensor


def cosine_loss(shift: Tensor, true_shift: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(shift, true_shift, dim=-1)


def relative_loss(shift: Tensor, true_shift: Tensor, eps: float = 1e-3) -> Tensor:
    distance = (shift - true_shift).square().sum(-1)
    return distance / (shift.square().sum(-1) + true_shift.square().sum(-1) + eps)


def deceptive(true_shift: Tensor) -> Tensor:
    return 0.01 * true_shift
