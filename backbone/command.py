"""What the programs share: devices, bounds of options, tables, and errors of one line."""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import diffusers
import torch
import transformers

from backbone.folders import BackboneError

# How long processes wait for one another: the first precomputes meanwhile, for longer than PyTorch's ten
# minutes. Should it fail, the launcher ends all.
PATIENCE = timedelta(days=7)

# `--columns` of the programs that read datasets.
COLUMNS: dict[str, Any] = {
    "nargs": 3,
    "metavar": ("BEFORE", "AFTER", "INSTRUCTION"),
    "help": "the dataset's names of these columns, or keys of its metadata (default: the usual ones)",
}


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells each default but None, whose meaning the option's own text tells."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def new_parser(program: str, doc: str) -> argparse.ArgumentParser:
    """Of a file, or of `python -m program`, described by the first line of its docstring; --help tells the
    defaults."""
    prog, description = program if program.endswith(".py") else f"python -m {program}", doc.split("\n")[0]
    return argparse.ArgumentParser(prog, description=description, formatter_class=_Defaults)


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, else MPS, else the CPU. Raises BackboneError for a device that is not there."""
    there = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if torch.cuda.is_available():
        there = ["cuda", *(f"cuda:{k}" for k in range(torch.cuda.device_count())), *there]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise BackboneError(f"--device {name[:80]}: no such device here; use --device auto or cpu")
    device = torch.device(name)
    if device.index is not None:  # accelerate takes the current one
        torch.cuda.set_device(device)
    return device


def hide_progress_bars() -> None:
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()


def choose_kernels(device: torch.device, precision: str) -> None:
    """Which of its kernels PyTorch takes in training from here on, for the whole process: what gradient
    checkpointing computes again, it must compute as before.

    On a CPU in bf16, and at the toy's sizes, the way back through fused attention takes several times as long
    as in float32. On a GPU, products of matrices have TF32's ten bits, as PyTorch's convolutions have.
    """
    fused = device.type != "cpu" or precision == "no"
    torch.backends.cuda.enable_flash_sdp(fused)  # not of CUDA alone
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True


def check_numbers(args: argparse.Namespace, bounds: dict[tuple[float, float], str]) -> None:
    """Raises ValueError for an option that is no finite number, or beyond its bounds.

    bounds: (least, most) → the names of the options that they hold for, with spaces between.
    """
    of = {name: pair for pair, names in bounds.items() for name in names.split()}
    for name, value in vars(args).items():
        if isinstance(value, float | int):
            option, (least, most) = f"--{name.replace('_', '-')}", of.get(name, (-math.inf, math.inf))
            wanted = f"{least} … {most}" if most < math.inf else f"at least {least}"
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option} must be a finite number, not {value}")
            if not least <= value <= most:
                raise ValueError(f"{option} must be {wanted}, not {str(value)[:40]}")


def markdown(head: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A table, of which so many columns hold words, and all others numbers."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """What the user can mend ends the program with one line and exit code 2: a ValueError or OSError, a
    missing package, too little memory. Ctrl-C ends it without more words and with a shell's code for that,
    130."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        print(f"{program}: error: {error}; pip install -r requirements-dev.txt", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, NotImplementedError):  # a sampler's of a kind of prediction, a device's
            line = f"not possible here: {line}"
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in line:
            line = f"the memory does not suffice ({line[-200:]}); ask for less at a time, or smaller pictures"
        elif isinstance(error, RuntimeError):
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
