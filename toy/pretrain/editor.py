"""InstructGIE itself, by `python train.py`: it learns single edits, and then mixtures with them.

[ours] Two runs, so that the second can be repeated alone. The loss and its four contributions are the same.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from disk import atomic_folder
from rcldm import RCLDM
from toy import world

HERE = Path(__file__).parents[2]
DATA = Path("data/toy-mixtures")  # below HERE


def train_editor(args: argparse.Namespace) -> None:
    singles, mixtures = args.runs.parent / "editor", args.runs.parent / "editor-mixtures"
    if args.device.type == "cuda":  # [ours] where large batches cost little, fewer and longer steps
        budget = ["--batch", 512, "--steps", 2400, "--lr", 0.025]
    else:
        budget = ["--batch", 64, "--steps", 14000, "--lr", 0.01]
    run(args, singles, "--seed", args.seed, *budget)
    if not (HERE / DATA).exists():
        world.write_dataset(HERE / DATA, mixtures=world.TRAINED_MIXTURES)
    begun = ["--data", DATA, "--init", singles / "editor", "--seed", args.seed + 1]
    for steps in (4000, 6000):  # [ours] the longer horizon restarts the cosine at a quarter of the peak
        run(args, mixtures, *begun, "--batch", 64, "--steps", steps, "--lr", 0.005)
    model = RCLDM.from_pretrained(mixtures / "editor").half()
    model.register_to_config(_name_or_path="")  # no path of this machine
    with atomic_folder(args.out / "editor") as folder:
        model.save_pretrained(folder)
        shutil.copy(mixtures / "editor" / "instructgie.json", folder)


def run(args: argparse.Namespace, output: Path, *options: object) -> None:
    """`train.py`, or the rest of it."""
    command = [sys.executable, "train.py", "--output", output, "--device", args.device, *options]
    command += ["--resume"] if output.exists() else []
    ended = subprocess.run([str(word) for word in command], cwd=HERE)
    if ended.returncode:  # train.py has said why
        raise SystemExit(ended.returncode)
