"""What a run takes of its machine: all cores of a CPU, less memory of a GPU."""

import argparse
import contextlib
import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import backbone

SHARE = 32  # grids of a step, at least, of each process: a smaller share would not pay
shared_threads = 0  # of this process, before it shared the cores with others


def on_every_core(work: Callable, args: argparse.Namespace, *more: Any) -> None:
    """work(args, *more), on a CPU in several processes, each with its part of `args.batch`.

    [ours] Small layers leave threads little to share, and whole processes much. Calls work at once where a
    launcher has started several. This process is the first; an error is told once.
    """
    threads = torch.get_num_threads()
    count = max(min(threads, args.batch // SHARE), 1)
    on_cpu = backbone.pick_device(args.device).type == "cpu"
    if count == 1 or args.batch % count or not on_cpu or "WORLD_SIZE" in os.environ:
        work(args, *more)
        return
    global shared_threads
    args.batch, shared_threads = args.batch // count, threads
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "LOCAL_RANK": 0}
    os.environ |= {name: str(value) for name, value in group.items()}
    os.environ["OMP_NUM_THREADS"] = str(threads // count)
    torch.set_num_threads(threads // count)
    spawn = multiprocessing.get_context("spawn")  # a fork would keep this process's threads
    others = [spawn.Process(target=_join, args=(rank, work, args, *more)) for rank in range(1, count)]
    over = threading.Event()
    try:
        for other in others:
            other.start()
            threading.Thread(target=_watch, args=(other, over), daemon=True).start()
        work(args, *more)
        for other in others:
            other.join()
    except SystemExit:  # asked to stop, as all of them were
        for other in others:
            other.join(10)
        raise
    finally:
        over.set()
        for other in others:
            other.kill()


def _watch(other: Any, over: threading.Event) -> None:
    """Ends this process when another fails or is killed: it would wait for that one forever."""
    other.join()
    if not over.is_set() and other.exitcode is not None and (other.exitcode == 1 or other.exitcode < 0):
        os._exit(1)


def _join(rank: int, work: Callable, args: argparse.Namespace, *more: Any) -> None:
    """One of the other processes: silent, unless it alone fails, and gone as soon as the first is."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(args, *more)
    except Exception:
        time.sleep(10)  # what fails in the first process as well is told there
        os.write(stderr, traceback.format_exc().encode())
        raise


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def on_all_threads() -> Iterator[None]:
    """While the other processes wait for this one, their cores are its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, shared_threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def checkpoint_gradients(clip: nn.Module | None, *parts: nn.Module) -> None:
    """For `--gradient-checkpointing`. clip: an open_clip model, with another name for it than diffusers'."""
    for part in parts:
        part.enable_gradient_checkpointing()
    if clip is not None:  # L_es goes through the decoder and CLIP
        clip.set_grad_checkpointing()
