"""Settings of a training run: filled in from the preset, checked, and kept beside the run."""

import argparse
import math

import torch

import backbone
from disk import other_settings
from training.checkpoint import CHECKPOINT_NAMES

PARTS = ("stable_diffusion", "clip", "segmenter", "llm")

BOUNDS = {
    (1, math.inf): "steps accumulate save_every",
    (0, math.inf): "answer_weight change_weight es_weight sam_weight",
    (0, 1): "lr",
    (1, 4096): "batch",
    (8, 1024): "panel",
    (0, 256): "workers",
    (0, 2**32): "seed",
}

# Settings that may change when a run is resumed, and it still ends where it would have.
INCIDENTAL = {"output", "resume", "device", "gradient_checkpointing", "workers", "cache", "save_every"}


def fill_in(args: argparse.Namespace) -> backbone.Preset:
    """What the preset says where the command line does not; returns the preset. Raises ValueError."""
    preset = backbone.preset(args.backbone)
    for setting in (*PARTS, "panel", "data", "lr"):
        if getattr(args, setting) is None:
            setattr(args, setting, getattr(preset, setting))
    if args.data is None:
        raise ValueError(f"--backbone {args.backbone} has no dataset of its own; give one with --data")
    for part in PARTS:
        setattr(args, part, backbone.lasting_name(getattr(args, part)))
    there = any(args.output.glob(CHECKPOINT_NAMES))
    if there and not args.resume:
        raise ValueError(f"--output {args.output} holds a run already; add --resume or choose another folder")
    if args.resume and not (there or (args.output / "lock").exists()):
        raise ValueError(f"--resume: --output {args.output} holds no run; name its folder, or begin without")
    backbone.check_numbers(args, BOUNDS)
    return preset


def note_settings(args: argparse.Namespace, processes: int, device: torch.device) -> None:
    """Keeps the settings beside the run; says which of those that matter are others than when it began."""
    needed = ("stable_diffusion", *(() if args.no_liu else ("llm",)))
    args.fingerprints = {part: backbone.fingerprint(getattr(args, part), part) for part in needed}
    matter = {name: value for name, value in vars(args).items() if name not in INCIDENTAL}
    path = args.output / "settings.json"
    matter |= {"processes": processes, "device": device.type}  # "auto" is another on another machine
    changed = other_settings(path, matter, anew=not args.resume)
    for name, (there, now) in changed.items():
        print(f"--{name.replace('_', '-')} was {there} when this run began, and is {now}", flush=True)
