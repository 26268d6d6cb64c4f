"""A row of a table: measured in a process of its own, whose peak memory is its alone, then printed."""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_head(how: str, *names: str) -> None:
    """What the rows are measured with, then the names of their columns."""
    print(f"{how}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print_row(*names)
    print_row("---", *["---:"] * (len(names) - 1))


def in_own_process(measure: Callable[..., dict], *inputs: Any, limit: float | None = None) -> dict[str, Any]:
    """`measure(*inputs)` in a process of its own. Raises TimeoutError after `limit` seconds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *inputs).result(limit)
        except TimeoutError:
            for process in pool._processes.values():
                process.kill()
            raise


def resident(name: str) -> int:
    """This process's memory in bytes: now (VmRSS) or at its most so far (VmHWM, for both on a Mac)."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_bytes(device: str) -> int:
    """The most that this process has held so far, of the GPU's memory or the machine's."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
