"""One process for each core: shares of a step, and no process that outlives the others or is waited for."""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import backbone
from training import hardware

PROGRAM = """
import os, sys, time
from argparse import Namespace
from pathlib import Path
import torch
from training import hardware

def work(args, folder, fails):
    rank = os.environ.get("RANK", "alone")
    Path(folder, rank).write_text(f"{args.batch} {torch.get_num_threads()} {os.getpid()}")
    print(rank, "says", flush=True)
    while fails and len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.1)
    if rank == fails:
        raise ValueError(f"{rank} fails")
    if fails == "1":  # as a process whose connection to the failed one closes
        time.sleep(3)
        raise RuntimeError("connection closed")
    time.sleep(120 if fails else 0)

if __name__ == "__main__":
    hardware.on_every_core(work, Namespace(batch=int(sys.argv[1]), device="cpu"), *sys.argv[2:])
"""


def start(folder: Path, batch: int, fails: str = "") -> subprocess.Popen:
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    environment |= {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(backbone.HERE)}
    command = [sys.executable, str(program), str(batch), str(folder), fails]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def told(folder: Path) -> dict[str, list[int]]:
    """By rank: its batch, its threads, its process."""
    return {path.name: [int(word) for word in path.read_text().split()] for path in folder.iterdir()}


def wait_for(condition) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ")[1][0] != "Z"
    except OSError:
        return False


def test_processes_share_a_batch(tmp_path):
    process = start(tmp_path / "told", 64)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, printed, errors) == (0, "0 says\n", "")  # only the first says anything
    shares = {rank: numbers[:2] for rank, numbers in told(tmp_path / "told").items()}
    assert shares == {"0": [32, 1], "1": [32, 1]}


@pytest.mark.parametrize(
    ("batch", "threads", "launched"), [(63, 2, False), (65, 2, False), (64, 1, False), (64, 2, True)]
)
def test_one_process_is_left_alone(monkeypatch, batch, threads, launched):
    """With a batch too small or not to be shared, with one core, and where a launcher started several."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: pytest.fail("starts a process"))
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "2")
    called = []
    args = argparse.Namespace(batch=batch, device="cpu")
    hardware.on_every_core(lambda args, word: called.append((args.batch, word)), args, "more")
    assert called == [(batch, "more")]


def test_the_first_process_takes_all_threads_while_the_others_wait(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(hardware, "shared_threads", threads + 1)
    with hardware.on_all_threads():
        assert torch.get_num_threads() == threads + 1
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("fails", ["0", "1"])
def test_an_error_ends_all_and_is_told(tmp_path, fails):
    process = start(tmp_path / "told", 64, fails)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.rstrip().endswith(f"ValueError: {fails} fails")
    assert not any(lives(numbers[2]) for numbers in told(tmp_path / "told").values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("to_first", "number", "code", "line"),
    [
        (True, signal.SIGKILL, -signal.SIGKILL, ""),
        (True, signal.SIGTERM, 143, ""),
        (True, signal.SIGINT, -signal.SIGINT, ""),
        (False, signal.SIGKILL, 1, "a process was killed: if memory ran out, give a smaller"),
    ],
)
def test_a_signal_ends_all(tmp_path, to_first, number, code, line):
    process = start(tmp_path / "told", 64, "nobody")
    assert wait_for(lambda: len(list((tmp_path / "told").iterdir())) == 2)
    started = [numbers[2] for numbers in told(tmp_path / "told").values()]
    os.kill(process.pid if to_first else started[0], number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert line in errors and ("BackboneError" in errors) == (line != "")
    assert wait_for(lambda: not any(lives(number) for number in started))


@pytest.mark.parametrize(("rank", "said"), [("0", "said\n"), ("1", "")])
def test_of_the_processes_of_a_launcher_one_speaks(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    hardware.on_every_core(lambda args: print("said"), argparse.Namespace(batch=64, device="cpu"))
    assert capsys.readouterr().out == said
