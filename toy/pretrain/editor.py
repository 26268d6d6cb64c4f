"""InstructGIE itself, by `python train.py`: it learns single edits, and then mixtures with them.

[ours] Three runs, so that the later ones can be repeated alone. Their loss is the same.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import backbone
from disk import atomic_folder
from rcldm import RCLDM
from toy import world

HERE = Path(__file__).parents[2]
DATA = Path("data/toy-mixtures")  # below HERE


def train_editor(args: argparse.Namespace) -> None:
    singles, mixtures, last = (args.runs.parent / f"editor{name}" for name in ("", "-mixtures", "-last"))
    if args.device.type == "cuda":  # [ours] where large batches cost little, fewer and longer steps
        budget = ["--batch", 512, "--steps", 2400, "--lr", 0.025]
    else:
        budget = ["--batch", 64, "--steps", 14000, "--lr", 0.01]
    run(args, singles, "--seed", args.seed, *budget)
    if not (HERE / DATA).exists():
        world.write_dataset(HERE / DATA, mixtures=world.TRAINED_MIXTURES)
    budget = ["--data", DATA, "--batch", 64, "--lr", 0.005]
    for steps in (4000, 6000):  # [ours] the longer horizon restarts the cosine at a quarter of the peak
        run(args, mixtures, *budget, "--init", singles / "editor", "--seed", args.seed + 1, "--steps", steps)
    # [ours] Restarted once more, from the peak: some families are hard to learn by words.
    run(args, last, *budget, "--init", mixtures / "editor", "--seed", args.seed + 2, "--steps", 3000)
    model = RCLDM.from_pretrained(last / "editor").half()
    model.register_to_config(_name_or_path="")  # no path of this machine
    with atomic_folder(args.out / "editor") as folder:
        model.save_pretrained(folder)
        shutil.copy(last / "editor" / "instructgie.json", folder)


def run(args: argparse.Namespace, output: Path, *options: object) -> None:
    """`train.py`, or the rest of it."""
    command = [sys.executable, "train.py", "--output", output, "--device", args.device, *options]
    for part in ("stable-diffusion", "clip", "segmenter", "llm"):
        command += [f"--{part}", backbone.lasting_name(str(args.out / part))]
    command += ["--resume"] if output.exists() else []
    ended = subprocess.run([str(word) for word in command], cwd=HERE)
    if ended.returncode:  # train.py has said why
        raise SystemExit(ended.returncode)
