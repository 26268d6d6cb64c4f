"""InstructGIE itself: what `python train.py` makes, in half precision."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from disk import atomic_folder
from rcldm import RCLDM


def train_editor(args: argparse.Namespace) -> None:
    run = args.runs.parent / "editor"
    if args.device.type == "cuda":  # [ours] where large batches cost little, fewer and longer steps
        count, budget = 1, ["--batch", 512, "--steps", 2400, "--lr", 0.025]
    else:  # two processes, which are faster than as many threads
        count, budget = 2, ["--batch", 32, "--steps", 14000]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count]
    command += ["train.py", "--output", run, "--seed", args.seed, "--device", args.device, *budget]
    command += ["--resume"] if run.exists() else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    subprocess.run([str(word) for word in command], cwd=root, check=True, env=environment)
    model = RCLDM.from_pretrained(run / "editor").half()
    model.register_to_config(_name_or_path="")  # no path of this machine
    with atomic_folder(args.out / "editor") as folder:
        model.save_pretrained(folder)
        shutil.copy(run / "editor" / "instructgie.json", folder)
