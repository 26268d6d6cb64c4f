"""Trains InstructGIE: a ControlNet of VMamba blocks learns to draw the missing panel of a 2×2 grid.

    python train.py                                  # the toy world, on whatever this machine has
    python train.py --no-sam                         # an ablation; so --no-rcldm, --no-esm, --no-liu
    python train.py --resume --output runs/train     # goes on where a stopped run stood
    python train.py --backbone sd15 --data FOLDER --precision bf16 --batch 8 --accumulate 4
    accelerate launch train.py --backbone sd15 --data FOLDER      # several GPUs, or several machines

One step, in the words of the paper's architecture figure:

    Img_train  -> VAE -> x_0, with noise x_t        Img_VPcon -> G_ven, trainable copy, links -> residuals
    instruction l -> U -> l' -> text encoder        frozen U-Net(x_t, l', residuals) -> prediction, x̂_0
    L = L_dm + λ_es · L_es + λ_sam · L_sam

The file reads from top to bottom: settings, what the frozen parts make of the data, the losses, the loop.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbone
import esm
import liu
import sam_loss
from dataset import VisualPromptDataset, compose_grid, drop_example, mask_query, read_pairs, split_grid
from rcldm import RCLDM

# ----------------------------------------------------------------------------------------------------------
# Settings: every one once, with its reason


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train InstructGIE.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--backbone", default="toy", help=f"preset of pretrained parts: {', '.join(backbone.PRESETS)}")
    for part in ("stable_diffusion", "clip", "segmenter", "llm"):
        add(f"--{part.replace('_', '-')}", help="hub id or folder instead of the preset's")
    add("--data", help="dataset: a folder or a hub id (default: the preset's)")
    add("--split", default="train", help="to train on")
    add("--validation-split", default="seen", help="to draw validation pictures from")
    add("--output", type=Path, default=Path("runs/train"), help="checkpoints, pictures and the final editor")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    add("--seed", type=int, default=0, help="of weights, data order and noise")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="no", choices=("no", "bf16", "fp16"), help="of autocast")

    # The contributions. Each has a switch, as in the paper's ablation.
    add("--no-rcldm", action="store_true", help="ControlNet's convolutions in place of VMamba")
    add("--encoder", default="vmamba", choices=("vmamba", "vit"), help="what the RCLDM is built of")
    add("--no-esm", action="store_true", help="without editing-shift matching")
    add("--no-liu", action="store_true", help="instructions as people wrote them")
    add("--no-sam", action="store_true", help="without selective-area matching")

    # Choice: all numbers below. The paper gives none of them.
    add("--steps", type=int, default=1500, help="optimiser steps")
    add("--batch", type=int, default=32, help="grids per step and process")
    add("--accumulate", type=int, default=1, help="batches per optimiser step")
    add("--lr", type=float, default=1e-3, help="peak learning rate; warm-up, then cosine to a tenth of it")
    add("--warmup", type=int, default=50, help="steps")
    add("--weight-decay", type=float, default=0.01)
    add("--clip-norm", type=float, default=1.0, help="largest norm of the gradient")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights, which are what is saved")
    add("--answer-weight", type=float, default=4.0, help="of the answer panel in L_dm; the given panels have 1")
    add("--es-weight", type=float, default=0.05, help="λ_es")
    add("--es-samples", type=int, default=4, help="answers decoded for L_es in a batch at most: memory, time")
    add("--sam-weight", type=float, default=0.1, help="λ_sam")
    add("--sam-classes", nargs="+", help="names of the segmenter's classes (default: the preset's)")
    add("--sam-propose", action="store_true", help="let the language model choose the segmenter's classes")
    # Dropout makes guidance possible, and edits by the example alone or by the instruction alone.
    add("--drop-text", type=float, default=0.3, help="share of samples without the instruction")
    add("--drop-example", type=float, default=0.15, help="share of samples without the example pair")
    add("--drop-both", type=float, default=0.05, help="share of samples without either")
    add("--flip", action="store_true", help="mirror half of the grids; encodes every step instead of once")

    add("--workers", type=int, default=1, help="processes that decode pictures")
    add("--cache", type=Path, default=Path("data/cache"), help="what the frozen parts computed, kept for later runs")
    add("--checkpoint-every", type=int, default=100, help="steps")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--validate-every", type=int, default=500, help="steps")
    add("--validation-pictures", type=int, default=6)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------
# What the frozen parts make of the data, computed once where pictures are not flipped


@dataclass
class Facts:
    """What training needs to know of edit pairs besides their pictures.

    latents: (N, 2, C, p, p), of before and after. shifts: (N, 2, E), their CLIP embeddings, or None.
    areas: (N, 1, p, p) in [0, 1], the selected areas of the after picture on the latent's raster, or None.
    """

    latents: Tensor
    embeddings: Tensor | None
    areas: Tensor | None


@torch.no_grad()
def observe(panels: Tensor, vae: nn.Module, clip: nn.Module | None, areas) -> Facts:
    """Facts of pairs of pictures (N, 2, 3, P, P) in [-1, 1].

    Choice: each panel passes the VAE by itself, where the figure encodes the grid. The latents tile to the
    same grid, panels do not leak into each other at their borders, and a picture is encoded once, in
    whatever grid it appears.
    """
    flat = panels.flatten(0, 1)
    latents = vae.encode(flat.to(vae.dtype)).latent_dist.mean
    latents = (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
    area = areas and F.interpolate(areas(panels[:, 1]), latents.shape[-2:], mode="area")
    embeddings = clip and esm.embed(clip, flat).unflatten(0, panels.shape[:2])
    return Facts(latents.float().unflatten(0, panels.shape[:2]), embeddings, area)


def observe_all(data: VisualPromptDataset, args, parts, accelerator: Accelerator) -> Facts:
    """Facts of every pair of the dataset, from the cache on disk where a run before has left them."""
    vae, clip, areas = parts
    key = [args.data, args.split, len(data), data.size, data.pairs[0].input, data.pairs[-1].output]
    key += [fingerprint(model) for model in (vae, clip, areas and areas.model) if model is not None]
    key += [bool(clip), areas.classes if areas else None]
    path = args.cache / f"facts-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.safetensors"
    with accelerator.main_process_first():
        if not path.is_file():
            loader = DataLoader(Pairs(data), batch_size=64, num_workers=args.workers)
            seen = [
                observe(panels.to(accelerator.device), *parts)
                for panels in tqdm(loader, desc="encoding the pictures, once", mininterval=2)
            ]
            columns = {name: [getattr(facts, name) for facts in seen] for name in asdict_names(Facts)}
            tensors = {k: torch.cat(v).cpu().half() for k, v in columns.items() if v[0] is not None}
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            save_file(tensors, temporary)
            os.replace(temporary, path)
    tensors = load_file(path)
    return Facts(*(tensors.get(name) for name in asdict_names(Facts)))
