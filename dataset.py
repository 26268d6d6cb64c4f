"""The visual prompt dataset, as training reads and composes it.

[paper] The model is shown one finished edit, and asked for the same edit of another picture. [figure] Both
stand in one image, a 2×2 grid of square panels. The dataset figure calls the step "data processing" (phase
2): two image pairs of one instruction are drawn at random. One becomes the example row, the other the query
row.

        Img_train                              Img_VPcon, the condition
    +----------------+----------------+        +----------------+----------------+
    | example before | example after  |        | example before | example after  |  P rows
    +----------------+----------------+        +----------------+----------------+
    | query          | answer         |        | query          | flat grey      |  P rows
    +----------------+----------------+        +----------------+----------------+
        P columns        P columns

The file defines the grids, then the dataset that draws the two rows. `read_pairs` in pictures/pairs.py reads
the pairs from disk; `data_making/` is phase 1, which makes them.

Symbols: P panel size (pixels, or latent pixels); C channels. Images are RGB in [-1, 1], where grey is 0.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pictures import ImageError, load_image, misfit, to_panel
from pictures.pairs import DatasetError, EditPair

log = logging.getLogger(__name__)


# --- Grids --------------------------------------------------------------------------------------------------


def compose_grid(example_before: Tensor, example_after: Tensor, query: Tensor, answer: Tensor) -> Tensor:
    """Four panels (..., C, P, P) to one grid (..., C, 2P, 2P): images in [-1, 1] and latents alike.

    A batch of dataset items becomes a batch of grids by `compose_grid(*batch["panels"].unbind(1))`.
    Raises ValueError unless the four panels are square and of one shape. Source: the paper's dataset figure.
    """
    shapes = [tuple(panel.shape) for panel in (example_before, example_after, query, answer)]
    if len(set(shapes)) > 1 or len(shapes[0]) < 3 or shapes[0][-1] != shapes[0][-2]:
        raise ValueError(f"a grid needs four square panels of one shape (..., C, P, P), not {shapes}")
    top = torch.cat([example_before, example_after], dim=-1)  # (..., C, P, 2P)
    bottom = torch.cat([query, answer], dim=-1)
    return torch.cat([top, bottom], dim=-2)


def answer_panel(grid: Tensor) -> Tensor:
    """The lower-right panel (..., C, P, P) of a grid (..., C, 2P, 2P), as a view: the answer to the query.

    Raises ValueError, as all functions on grids do, for a grid that is not square or has odd sides.
    """
    p = _panel_size(grid)
    return grid[..., p:, p:]


def mask_query(grid: Tensor) -> Tensor:
    """Img_VPcon: a copy of the grid (..., C, 2P, 2P) whose answer panel is grey, which is 0 in [-1, 1].

    Source: the paper's architecture figure. For images only: a latent of zeros is not the latent of grey.
    """
    masked = grid.clone()
    answer_panel(masked).zero_()
    return masked


def drop_example(grid: Tensor) -> Tensor:
    """A copy of the grid (..., C, 2P, 2P) whose example row is grey, so that the instruction stands alone.

    [ours] An absent example looks like an absent answer, flat grey. Training drops examples at random. This
    enables guidance by the example, and edits by instruction alone.
    """
    dropped = grid.clone()
    dropped[..., : _panel_size(grid), :] = 0
    return dropped


def _panel_size(grid: Tensor) -> int:
    height, width = grid.shape[-2:] if grid.ndim >= 3 else (0, 0)
    if height != width or height % 2 or height == 0:
        raise ValueError(f"a grid is square with even sides (..., C, 2P, 2P), not {tuple(grid.shape)}")
    return height // 2


# --- The dataset --------------------------------------------------------------------------------------------


class VisualPromptDataset(Dataset):
    """Every pair in turn as the query, with another pair of its instruction as the example.

    pairs: edit pairs. An instruction with a single pair has no example to show: it is left out, logged, and
        kept in the list `left_out`. `self.pairs` holds the others; indices point into it.
    size: P, the panel size in pixels.
    seed: with the epoch and the index it determines an item entirely. Neither the number of workers, nor the
        order of the items, nor a resumed run changes one.

    Raises DatasetError when no instruction has two pairs. [figure] phase 2 draws two pairs of an instruction.
    [ours] Each pair is the query once an epoch, so an instruction with more pairs is seen more often.
    """

    def __init__(self, pairs: Sequence[EditPair], size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        count = Counter(pair.instruction for pair in pairs)
        self.left_out = [instruction for instruction, n in count.items() if n == 1]
        if len(self.left_out) == len(count):
            where = pairs[0].output if pairs else "no pairs"
            reason = "no instruction here has a second edit pair to serve as the example"
            raise DatasetError(f"{where}: {reason}; give at least two pairs with the same instruction")
        if self.left_out:
            which = "; ".join(self.left_out[:3]) + ("; …" if len(self.left_out) > 3 else "")
            log.warning("instructions left out, of a single pair: %d (%s)", len(self.left_out), which)
        self.pairs = [pair for pair in pairs if count[pair.instruction] > 1]
        self._group: dict[str, list[int]] = {}  # instruction -> its pairs, in their order
        for i, pair in enumerate(self.pairs):
            self._group.setdefault(pair.instruction, []).append(i)

    def __len__(self) -> int:
        return len(self.pairs)

    def draw(self, i: int, epoch: int = 0) -> int:
        """The index of the pair that is item `i`'s example in this epoch: any other of its group, with equal
        chance. Raises IndexError."""
        i = range(len(self))[i]
        group = self._group[self.pairs[i].instruction]
        offset = np.random.default_rng((self.seed, epoch, i)).integers(1, len(group))  # from i, cyclically
        return group[(bisect_left(group, i) + offset) % len(group)]

    def load_pair(self, i: int) -> tuple[Tensor, Tensor]:
        """Before and after of pair `i`, each (3, P, P) in [-1, 1]. Raises ImageError, also for a `misfit`."""
        pair = self.pairs[i]
        before, after = load_image(pair.input), load_image(pair.output)
        if reason := misfit(before, after):
            raise ImageError(pair.output, reason)
        return to_panel(before, self.size), to_panel(after, self.size)

    def load_panels(self, example: int, query: int) -> Tensor:
        """Pair `example`, then pair `query`: (4, 3, P, P) as `load_pair`, in the order of `compose_grid`."""
        return torch.stack([*self.load_pair(example), *self.load_pair(query)])

    def __getitem__(self, i: int | tuple[int, int]) -> dict[str, Any]:
        """`panels` (4, 3, P, P) float32 in [-1, 1], in the order of `compose_grid`; `instruction`; `index`
        and `example_index` (into `pairs`). Raises ImageError, which names the broken picture.

        An index (epoch, i) asks for item `i` of that epoch, i alone for that of epoch 0. So a sampler may run
        on over epochs."""
        epoch, i = i if isinstance(i, tuple) else (0, i)
        example, query = self.draw(i, epoch), range(len(self))[i]
        panels, instruction = self.load_panels(example, query), self.pairs[query].instruction
        return {"panels": panels, "instruction": instruction, "index": query, "example_index": example}
