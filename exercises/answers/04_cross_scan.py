"""Flipping the last axis turns an order round, and transposing the picture swaps rows for columns; the merge
undoes the same in reverse. Four orders it must be: of any two pixels each is read before the other in two of
them, so each can speak to the other.

Query and answer lie 8 steps apart by rows and 128 by columns, "example after" and the answer the other way
round. After 8 steps of a half-life of 7 some 45 % is left, after 128 nothing. So one order in two brings each
twin near, and the other two need channels that forget slowly."""

import torch
from torch import Tensor

Pixel = tuple[int, int]  # row, column


def cross_scan(x: Tensor) -> Tensor:
    forth = torch.stack([x.flatten(2), x.mT.flatten(2)], dim=1)  # (B, 2, C, L)
    return torch.cat([forth, forth.flip(-1)], dim=1)


def cross_merge(ys: Tensor, height: int, width: int) -> Tensor:
    forth, back = ys.chunk(2, dim=1)
    rows, columns = (forth + back.flip(-1)).unbind(1)  # (B, C, L) each
    return rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).mT


def steps(a: Pixel, b: Pixel, height: int, width: int) -> list[int]:
    numbers = torch.arange(height * width).view(1, 1, height, width)
    when = cross_scan(numbers)[0, :, 0].argsort(dim=1)  # (4, L): the step at which a pixel is read
    first, second = (when[:, row * width + column] for row, column in (a, b))
    return (second - first).tolist()
