"""What both stages of making a dataset share: settings, hashes, processes, options."""

import argparse
import atexit
import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import backbone
from disk import locked, other_settings


def same_settings(path: Path, settings: dict, state: PartialState) -> None:
    """Notes the settings, or raises ValueError where work with others has begun."""
    with state.main_process_first():
        other = other_settings(path, settings)
    if other:
        now = ", ".join(f"{name} {there}, now {mine}" for name, (there, mine) in other.items())
        way = "go back to those, or begin in another --out, to which texts.jsonl may be copied"
        raise ValueError(f"{path.parent} has been begun with other settings ({now}); {way}")


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:12]


def processes(args: argparse.Namespace, held: contextlib.ExitStack) -> tuple[PartialState, torch.device]:
    """Which of how many processes this one is, and its device. Until `held` closes, the folder is theirs;
    raises ValueError where another run works in it.
    """
    device = backbone.pick_device(args.device)
    state = PartialState(cpu=device.type == "cpu", timeout=backbone.PATIENCE)
    atexit.register(state.destroy_process_group)  # its threads may abort a process that ends before them
    if state.is_main_process:
        held.enter_context(locked(args.out))
    return state, state.device if state.num_processes > 1 and device.type != "cpu" else device


def stage(program: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the options that both stages have."""
    parser = backbone.new_parser(program, doc)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the dataset's folder")
    add("--backbone", default="toy", help=f"whose parts to take: {', '.join(backbone.PRESETS)}")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser
