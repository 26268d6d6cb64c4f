"""What is drawn at random for each step: pairs, conditions that are left out, timesteps; each by its seed."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor


def step_generator(seed: int, step: int, rank: int = 0, processes: int = 1) -> torch.Generator:
    """The random numbers of one step: a resumed run draws what an uninterrupted one would have drawn."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * processes + rank)


def draw_order(count: int, batch: int, seed: int, steps: range, rank: int, processes: int) -> Iterator[list]:
    """The items (epoch, index) of each batch, one permutation an epoch; every process takes its share.

    steps: numbers of batches. A function of these alone, so that a resumed run goes on with the pictures it
    would have seen.
    """

    @lru_cache(maxsize=2)  # a batch may lie across an epoch's end
    def permutation(epoch: int) -> list[int]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=g).tolist()

    for step in steps:
        first = (step * processes + rank) * batch
        places = (divmod(position, count) for position in range(first, first + batch))
        yield [(epoch, permutation(epoch)[place]) for epoch, place in places]


def keep_conditions(
    batch: int, drop: tuple[float, float, float], g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which samples keep their instruction and which their example pair: two (B,) of bool.

    drop: shares of samples without the instruction, without the example pair, without either.
    """
    text, example, both = drop
    u = torch.rand(batch, generator=g)  # from 0 on: without either, without text, without example, with both
    no_text = u < both + text
    no_example = (u < both) | (~no_text & (u < both + text + example))
    return ~no_text, ~no_example


def draw_noise(shape: Sequence[int], g: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal noise. A GPU draws its own, from a seed out of `g`: a CPU's would keep it waiting."""
    if device.type != "cpu":
        g = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=g)))
    return torch.randn(shape, generator=g, device=device)


def draw_timesteps(batch: int, timesteps: int, g: torch.Generator) -> Tensor:
    """T · u^(1/4) for uniform u: (B,), a third of them in the noisiest tenth.

    [ours] There the answer is not yet seen in x_t, so there the edit is decided.
    """
    return (timesteps * torch.rand(batch, generator=g) ** (1 / 4)).long().clamp(max=timesteps - 1)
