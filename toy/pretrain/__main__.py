"""Trains the toy parts, or measures them: `python -m toy.pretrain`; see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from toy.pretrain.clip import train_clip, train_clip_eval
from toy.pretrain.editor import train_editor
from toy.pretrain.language import train_llm, train_writer
from toy.pretrain.report import report
from toy.pretrain.segmenter import train_segmenter
from toy.pretrain.unet import train_unet
from toy.pretrain.vae import train_vae

WEIGHTS = Path(__file__).parents[1] / "weights"


def main() -> None:
    stages = {
        "vae": train_vae,
        "unet": train_unet,
        "clip": train_clip,
        "clip_eval": train_clip_eval,
        "segmenter": train_segmenter,
        "llm": train_llm,
        "writer": train_writer,
        "editor": train_editor,
    }
    parser = argparse.ArgumentParser(prog="python -m toy.pretrain", description="Train the toy parts.")
    parser.add_argument("stages", nargs="*", choices=[[], *stages], default=[])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of all training lengths")
    parser.add_argument("--report", action="store_true", help="measure the saved parts, train nothing")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.scaled = lambda steps: max(1, round(args.scale * steps))
    if args.report:
        for name, value in report(args).items():
            print(f"{name:40} {value:8.3f}")
        return
    for name in args.stages or stages:
        torch.manual_seed(args.seed)
        stages[name](args)


if __name__ == "__main__":
    main()
