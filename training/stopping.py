"""Ends that are asked for: Ctrl-C and SIGTERM."""

import os
import signal
import sys
from typing import Any

import torch


class Stop:
    """Ctrl-C and SIGTERM while it is entered: `asked` is to be looked at after each step.

    Before the first step (until `at_work` is set), and asked twice, they end the program at once. Exit codes
    are a shell's, 130 and 143.
    """

    def __init__(self) -> None:
        self.asked, self.at_work = 0, False

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: object) -> None:
        if self.asked or not self.at_work:
            os._exit(128 + number)  # an exception may get lost: it is raised wherever the program just is
        self.asked = number
        _say(f"\n{signal.Signals(number).name}: ends after this step; again, and it ends at once")

    def agree(self, accelerator: Any) -> None:
        """When one of several processes is asked to stop, all stop; else the others would wait for it."""
        if accelerator.num_processes > 1:
            asked = torch.tensor([self.asked], device=accelerator.device)
            self.asked = int(accelerator.gather(asked).max())

    def end(self, saved: str) -> None:
        """saved: what was saved last, for the message: "step 120"."""
        _say(f"stopped; --resume goes on after {saved}")
        raise SystemExit(128 + self.asked)


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # Ctrl-C at a terminal ends its `tee` first, which the progress bar must survive too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def begin_worker(worker: int) -> None:
    """`worker_init_fn` of a loader's processes: a terminal sends Ctrl-C to all, and the first one decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
