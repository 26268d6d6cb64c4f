"""A training step of ours against the same step with diffusers' ControlNet: grids a second and peak memory.

    python -m bench.train_step                                    # the toy size
    python -m bench.train_step --backbone sd15 --batch 1 --repeat 16 --rounds 1 --gradient-checkpointing
    python -m bench.train_step --backbone sd15 --batch 4 --precision bf16 --device cuda

A step is forward, backward, clipping and Muon, on random pictures under the same frozen U-Net; each model
runs in processes of its own, whose peak memory is its alone. Steps differ: L_es decodes no answer whose noise
is too strong. So the time is a mean over steps. Each step counts as the fastest of those that decoded as many
answers; how many a step decoded stands beside it. Operations are counted in one further step: products of
matrices, convolutions and attention. The rest, the scan too, is small.

ControlNet learns from the same grids, its condition the grid with the answer greyed out, its loss the plain
mean of squares. All four contributions are RCLDM, the unified instruction (it costs nothing here: encoded
once, before training), L_es and L_sam. Parts of the paper's size are built from their configurations, with
random weights (bench/paper_size.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    flop_registry,
    register_flop_formula,
)
from tqdm import tqdm

import backbone
import train
from bench import paper_size
from bench.scan import apart, resident
from rcldm import RCLDM
from training.muon import Muon, parameter_groups
from training.precompute import Precomputed

MODELS = {
    "ControlNetModel": ("--no-rcldm", "--no-esm", "--no-sam"),
    "ours without ESM and SAM": ("--no-esm", "--no-sam"),
    "ours, all four": (),
}

WAYS = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}  # modes of torch.compile

ATTENTION = "_scaled_dot_product_flash_attention"
for way in ("", "_backward"):  # PyTorch's counter does not know the names that a CPU has for it
    here, there = (getattr(torch.ops.aten, ATTENTION + where + way) for where in ("_for_cpu", ""))
    flop_registry[here] = flop_registry[there]
# It counts the gradient of a depthwise convolution's weights as that of a full one's.
del flop_registry[torch.ops.aten.convolution_backward]


@register_flop_formula(torch.ops.aten.convolution_backward)
def convolution_backward(
    dy, x, weight, bias, stride, padding, dilation, transposed, more, groups, wanted, **_
) -> int:
    """Each of the gradients by x and by the weight (whichever is wanted) has as many as the way forward."""
    return sum(wanted[:2]) * conv_flop_count(x, weight, dy, transposed)


def preset(name: str, folder: Path) -> backbone.Preset:
    """Of the paper's size with parts of random weights, written below the folder, in place of the hub's."""
    chosen = backbone.preset(name)
    if name == "toy":
        return chosen
    sources = {"stable_diffusion": paper_size.save_stable_diffusion, "clip": paper_size.save_clip}
    torch.manual_seed(0)
    for part, save in sources.items():
        if not (folder / part).exists():
            save(folder / part)
    return dataclasses.replace(chosen, **{part: str(folder / part) for part in sources})


def random_precomputed(sd: backbone.StableDiffusion, clip: torch.nn.Module | None, batch: int, panel: int):
    """What is precomputed of 2B pairs, and the embeddings of one instruction and of none."""
    device, count, channels = sd.unet.device, 2 * batch, sd.unet.config.in_channels
    side = panel // backbone.vae_factor(sd.vae)
    latents = torch.randn(count, 2, channels, side, side, device=device)
    pictures = torch.randint(256, (count, 2, 3, panel, panel), dtype=torch.uint8, device=device)
    embeddings = areas = None
    if clip is not None:
        width = clip.visual.output_dim
        embeddings = F.normalize(torch.randn(count, 2, width, device=device), dim=-1)
        areas = (torch.rand(count, 1, side, side, device=device) > 0.8).float()
    return Precomputed(latents, embeddings, areas, pictures), backbone.encode_text(sd, ["wave", ""])


def measure(name: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Answers decoded and seconds of each step, operations, the process's peak bytes, weights that learn."""
    device, cuda, chosen = args.device, args.device == "cuda", preset(args.backbone, args.folder)
    settings = train.settings([*MODELS[name], "--batch", str(args.batch)])
    settings.panel = chosen.panel
    backbone.choose_attention(torch.device(device), args.precision)
    sd = backbone.load_stable_diffusion(chosen.stable_diffusion, device)
    clip = None if settings.no_esm else backbone.load_clip(chosen.clip, device)
    decoded: list[int] = []  # by the step that is under way
    if clip is not None:  # it sees all that is decoded, and nothing else
        clip.visual.register_forward_pre_hook(lambda _, pictures: decoded.append(len(pictures[0])))
    precomputed, texts = random_precomputed(sd, clip, args.batch, settings.panel)
    rows = torch.zeros(2 * args.batch, dtype=torch.long)
    losses_of = train.Losses(settings, sd, clip, precomputed, texts, rows)
    theirs = name == "ControlNetModel"
    if theirs:
        model = ControlNetModel.from_unet(sd.unet)
    else:
        model = RCLDM.from_unet(sd.unet, factor=backbone.vae_factor(sd.vae))
    model.to(device).train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        sd.unet.enable_gradient_checkpointing()
    if way != "eager":
        for part in (model, sd.unet):
            part.compile(mode=WAYS[way])
    optimizer = Muon(parameter_groups(model, train.WEIGHT_DECAY), lr=1e-5)
    index = torch.arange(args.batch)
    batch = {"index": index, "example_index": index + args.batch}

    def controlnet_loss(g: torch.Generator) -> Tensor:
        condition, x_0, states, _ = losses_of.compose(batch, g)
        noise = torch.randn(x_0.shape, generator=g).to(device)
        t = torch.randint(sd.scheduler.config.num_train_timesteps, (args.batch,), generator=g).to(device)
        x_t = sd.scheduler.add_noise(x_0, noise, t)
        down, mid = model(x_t, t, states, (condition + 1) / 2, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        prediction = sd.unet(x_t, t, states, **residuals).sample.float()
        return (prediction - backbone.prediction_target(x_0, noise, t, sd.scheduler)).square().mean()

    def take(step: int) -> tuple[int, float]:
        """Answers decoded, and seconds."""
        decoded.clear()
        g = torch.Generator().manual_seed(step)
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = controlnet_loss(g) if theirs else losses_of(model, batch, g)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return sum(decoded), time.perf_counter() - start

    steps = [take(step) for step in range(args.repeat + 1)][1:]
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    with FlopCounterMode(display=False) as counter:  # which needs memory, too
        take(0)
    count = sum(weight.numel() for weight in model.parameters())
    return {"steps": steps, "operations": counter.get_total_flops(), "bytes": peak, "weights": count}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="toy", choices=backbone.PRESETS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=10, help="timed steps after one that is not")
    parser.add_argument("--rounds", type=int, default=3, help="over all models")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"), help="of autocast")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for both")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager"])
    parser.add_argument("--limit", type=float, help="seconds for each row, start and compilation included")
    parser.add_argument(
        "--folder", type=Path, help="of the parts of random weights (default: a temporary one)"
    )
    args = parser.parse_args()
    args.device = backbone.pick_device(args.device).type
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        preset(args.backbone, args.folder)
        checkpointed = ", gradient checkpointing" if args.gradient_checkpointing else ""
        threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        print(
            f"{args.backbone}, batch {args.batch}, precision {args.precision}{checkpointed}; {args.device},"
        )
        print(f"{threads}\n", flush=True)
        print("| a step of | M weights | G operations | answers decoded | ms ", end="")
        print("| grids a second | × ControlNet's | peak GiB |")
        print("| --- |" + " ---: |" * 7, flush=True)
        kinds = [(name, way) for way in args.ways for name in args.only]
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        first = None
        for at, kind in enumerate(tqdm(kinds * args.rounds, unit="process")):
            label = ", ".join(part for part in kind if part != "eager")
            try:
                row = apart(measure, *kind, args, limit=args.limit)
            except TimeoutError:
                print(
                    f"| {label} |" + " – |" * 3 + f" not within {args.limit:g} s |" + " – |" * 3, flush=True
                )
                continue
            rows.setdefault(kind, row | {"steps": []})["steps"] += row["steps"]
            if at < len(kinds) * (args.rounds - 1):
                continue
            row = rows[kind]
            fastest = dict(sorted(row["steps"], reverse=True))  # by answers decoded: the last of each stays
            seconds, decoded = (mean(x) for x in zip(*((fastest[n], n) for n, _ in row["steps"])))
            first = seconds if kind == ("ControlNetModel", "eager") else first
            numbers = [f"{row['weights'] / 1e6:.2f}", f"{row['operations'] / 1e9:.0f}", f"{decoded:.2f}"]
            numbers += [
                f"{1e3 * seconds:.0f}",
                f"{args.batch / seconds:.2f}",
                f"{seconds / first:.2f}" if first else "–",
            ]
            print(f"| {label} | {' | '.join(numbers)} | {row['bytes'] / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    main()
