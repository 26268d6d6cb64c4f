"""InstructGIE itself: what `python train.py` makes of single edits and mixtures, in half precision."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from disk import atomic_folder
from rcldm import RCLDM
from toy import world

HERE = Path(__file__).parents[2]
DATA = HERE / "data" / "toy-mixtures"


def train_editor(args: argparse.Namespace) -> None:
    if not DATA.exists():
        world.write_dataset(DATA, mixtures=world.TRAINED_MIXTURES)
    run = args.runs.parent / "editor"
    if args.device.type == "cuda":  # [ours] where large batches cost little, fewer and longer steps
        budget = ["--batch", 512, "--steps", 2400, "--lr", 0.025]
    else:
        budget = ["--batch", 64, "--steps", 14000, "--lr", 0.01]
    command = [sys.executable, "train.py", "--data", DATA, "--output", run, "--device", args.device]
    command += ["--seed", args.seed, *budget, *(["--resume"] if run.exists() else [])]
    ended = subprocess.run([str(word) for word in command], cwd=HERE)
    if ended.returncode:  # train.py has said why
        raise SystemExit(ended.returncode)
    model = RCLDM.from_pretrained(run / "editor").half()
    model.register_to_config(_name_or_path="")  # no path of this machine
    with atomic_folder(args.out / "editor") as folder:
        model.save_pretrained(folder)
        shutil.copy(run / "editor" / "instructgie.json", folder)
