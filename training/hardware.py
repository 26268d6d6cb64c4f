"""What a run takes of its machine: all cores of a CPU, less memory of a GPU."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import nn

import backbone

SHARE = 32  # grids of a step, at least, of each process: a smaller share would not pay
LARGE_PAGES = "glibc.malloc.hugetlb=1"  # else each step asks the system for thousands of small ones
LESS_MEMORY = "if memory ran out, give a smaller --batch or --workers"
shared_threads = 0  # of all processes together, in one of several


def on_every_core(work: Callable, args: argparse.Namespace, *more: Any) -> None:
    """work(args, *more), on a CPU in several processes, each with its part of `args.batch`.

    [ours] Small layers leave threads little to share, and whole processes much. Calls `work` directly
    where a launcher has started several. Otherwise this process only waits: it passes signals on, and raises
    the error of the first that fails.
    """
    threads = torch.get_num_threads()
    count = max(min(threads, args.batch // SHARE), 1)
    on_cpu = backbone.pick_device(args.device).type == "cpu"
    if count == 1 or args.batch % count or not on_cpu or "WORLD_SIZE" in os.environ:
        first = os.environ.get("RANK", "0") == "0"
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(sys.stdout if first else null):
            work(args, *more)
        return
    args.batch //= count
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    group |= {"OMP_NUM_THREADS": threads // count, "GLIBC_TUNABLES": LARGE_PAGES}
    os.environ |= {name: str(value) for name, value in group.items()}
    spawn = multiprocessing.get_context("spawn")  # a fork would keep this process's threads
    with ProcessPoolExecutor(count, spawn) as pool, _signals_passed_on() as asked:
        ranks = [pool.submit(_join, rank, threads, work, args, *more) for rank in range(count)]
        try:
            ended, _ = wait(ranks, return_when=FIRST_EXCEPTION)
            stopped = any(isinstance(rank.exception(), SystemExit) for rank in ended)
            wait(ranks, None if stopped else 10)  # the first may still save; what fails in all, it tells
            for rank in (*ended, *ranks):
                if rank.done():
                    rank.result()
        except BrokenProcessPool:
            if asked:
                raise SystemExit(128 + asked[0]) from None
            raise backbone.BackboneError(f"a process was killed: {LESS_MEMORY}") from None
        finally:
            if not all(rank.done() for rank in ranks):
                for process in multiprocessing.active_children():
                    process.kill()


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[list[int]]:
    """To the processes started, which a terminal's Ctrl-C does not reach (see _join); yields those so far."""
    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join(rank: int, threads: int, work: Callable, args: argparse.Namespace, *more: Any) -> None:
    """One of the processes: silent but for the first, and gone as soon as the one that started it is."""
    global shared_threads
    shared_threads = threads
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    multiprocessing.set_start_method(None, force=True)  # spawning is not for the loader's workers
    os.setpgrp()  # a signal comes once, from the process that waits
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of a depthwise kernel, which is small
    if rank:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(args, *more)


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
