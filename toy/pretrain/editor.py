"""InstructGIE itself: what `python train.py` makes, in half precision."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rcldm import RCLDM
from toy import world
from toy.pretrain.loop import save


def train_editor(args: argparse.Namespace) -> None:
    run, data = args.runs.parent / "editor", args.runs.parent / "toy-large"
    if not data.exists():  # [ours] Twice the pairs of each instruction that train.py is content with
        world.write_dataset(data, args.seed, world.SPLITS | {"train": (world.SPLITS["train"][0], 12)})
    count = 1 if args.device.type == "cuda" else 2  # of processes: on a CPU faster than as many threads
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count]
    command += ["train.py", "--output", run]
    command += ["--data", data, "--seed", args.seed, "--device", args.device, "--steps", args.scaled(4800)]
    command += ["--precision", "bf16"] if args.device.type == "cuda" else []
    command += ["--resume"] if run.exists() else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    subprocess.run([str(word) for word in command], cwd=root, check=True, env=environment)
    model = RCLDM.from_pretrained(run / "editor").half()
    model.register_to_config(_name_or_path="")  # no path of this machine

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        shutil.copy(run / "editor" / "instructgie.json", folder)

    save(write, args.out / "editor")
