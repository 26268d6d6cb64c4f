"""Validation during a run: a few queries, answered as `edit.py` answers them, and shown beside the truth."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dataset import VisualPromptDataset
from pictures import ImageError, tensor_to_image
from pictures.answers import save_png
from pictures.pairs import DatasetError, read_pairs

PICTURES = 6


class Validation:
    """The same queries each time: of the split `seen` (edits of `train`, new pictures), or else pairs of
    `train`, whose error is then of learnt pictures.

    data: the pairs of `train`. source: the dataset's folder. unify: instructions to their unified forms.
    name: of the error, in the log. Raises DatasetError if no picture can be read.
    """

    def __init__(
        self, data: VisualPromptDataset, source: str, unify: Callable, args: argparse.Namespace
    ) -> None:
        self.name = "validation error"
        try:
            data = VisualPromptDataset(read_pairs(source, "seen", args.columns), args.panel, args.seed)
        except DatasetError as error:
            self.name = "error on training pairs"
            print(f"validation is on training pairs: {error}", flush=True)
        g = torch.Generator().manual_seed(args.seed)
        order, items = torch.randperm(len(data), generator=g).tolist(), []
        while order and len(items) < PICTURES:
            try:
                items.append(data[0, order.pop(0)])
            except ImageError as error:
                print(f"left out: {error}", flush=True)
        if not items:
            raise DatasetError(f"{source}: no picture of the validation can be read; mend its split `seen`")
        self.panels = torch.stack([item["panels"] for item in items])  # (N, 4, 3, P, P)
        self.texts = unify([item["instruction"] for item in items])

    def measure(
        self, answer: Callable[[Tensor, list[str]], Tensor], folder: Path, step: int, log: SummaryWriter
    ) -> float:
        """Writes a picture, a row per query with example before and after, input, answer, truth. Returns the
        answers' mean absolute error, in levels of 0 … 255.

        answer: panels (N, 4, 3, P, P) and texts to answers (N, 3, P, P) in [-1, 1].
        """
        panels, answers = self.panels, answer(self.panels, self.texts).cpu()
        shown = torch.stack([*panels[:, :3].unbind(1), answers, panels[:, 3]], 1)  # (N, 5, 3, P, P)
        picture = torch.cat([torch.cat(list(row), -1) for row in shown], -2).clamp(-1, 1)
        save_png(tensor_to_image(picture), folder / f"validation-{step:07d}.png")
        error = 127.5 * (answers - panels[:, 3]).abs().mean().item()
        log.add_image("validation", (picture + 1) / 2, step)
        log.add_scalar(self.name, error, step)
        log.flush()
        return error
