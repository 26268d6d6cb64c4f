"""Kills a tiny run of train.py again and again, resumes it, and tells how often it ended in the same bits.

    python tests/killing.py FOLDER --kills 50

A process of its own, which forks every run: PyTorch is loaded once. A run is killed by SIGKILL, in turn: at a
random instant; at one of its steps into the file system, drawn at random; and in the middle of the file of a
checkpoint's tensors. Then it is resumed, and killed again, until it comes to its end.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tests")]
from tiny import options, save_all  # noqa: E402

import backbone  # noqa: E402
import train  # noqa: E402
from training import checkpoint, validation  # noqa: E402

STEPS = ("--steps", "5", "--save-every", "1")
WATCHED = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.unlink")


def run(parts: Path, output: Path, die: str | None = None, at: float = 0) -> tuple[int, float]:
    """One run in a forked process → its exit status, -9 where it was killed, and its seconds."""
    start = time.monotonic()
    if pid := os.fork():
        if die == "instant":
            time.sleep(at)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - start
    status, files = 1, 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal files
        if event in WATCHED and str(output) in str(arguments):
            files += 1
            if files == at:
                os.kill(os.getpid(), signal.SIGKILL)

    def half(tensors: dict, path: Path) -> None:
        nonlocal files
        save(tensors, path)
        files += 1
        if files == at:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.stdout = sys.stderr = open(output.with_suffix(".log"), "a")  # noqa: SIM115
        save = checkpoint.save_file
        if die == "file":
            sys.addaudithook(count)
        if die == "tensors":
            checkpoint.save_file = half
        begun = ("--resume",) if (output / "lock").exists() else ()
        sys.argv = ["train.py", *options(parts, output), *STEPS, *begun]
        train.main()
        status = 0
    finally:
        os._exit(status)


def result(output: Path) -> dict[str, bytes]:
    """All that a run leaves, but TensorBoard's file, which tells the time, and records of paths."""
    (last,) = sorted(output.glob("checkpoint-*"))[-1:]
    found = {f"state/{k}": v.numpy().tobytes() for k, v in load_file(last / "state.safetensors").items()}
    weights = load_file(output / "editor" / "diffusion_pytorch_model.safetensors")
    found |= {f"editor/{k}": v.numpy().tobytes() for k, v in weights.items()}
    return found | {path.name: path.read_bytes() for path in output.glob("validation-*.png")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="an empty one, for the tiny parts and the runs")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    validation.PICTURES, backbone.SAMPLING["steps"] = 2, 2
    rng, parts = random.Random(args.seed), args.folder / "parts"
    save_all(parts)
    assert run(parts, args.folder / "first")[0] == 0  # fills the caches
    status, seconds = run(parts, args.folder / "whole")
    assert status == 0
    wanted = result(args.folder / "whole")
    kills, ends, equal, deaths = 0, 0, 0, {"instant": 0, "file": 0, "tensors": 0}
    while kills < args.kills:
        output = args.folder / f"killed-{ends}"
        while True:
            die = rng.choice(list(deaths)) if kills < args.kills else None
            at = {
                "instant": rng.uniform(0, seconds),
                "file": rng.randint(1, 60),
                "tensors": rng.randint(1, 8),
            }
            status, _ = run(parts, output, die, at.get(die, 0))
            assert status in (0, -9), output.with_suffix(".log").read_text()[-3000:]
            if status == 0:
                break
            kills, deaths[die] = kills + 1, deaths[die] + 1
        ends, equal = ends + 1, equal + (result(output) == wanted)
        left = [path.name for path in output.iterdir() if path.name.startswith(".")]
        assert not left, left
        shutil.rmtree(output)
    print(json.dumps({"kills": kills, "ends": ends, "equal": equal, **deaths}))


if __name__ == "__main__":
    main()
