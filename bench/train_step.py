"""A training step of ours against the same step with diffusers' ControlNet: grids a second and peak memory.

    python -m bench.train_step                                    # the toy size
    python -m bench.train_step --backbone sd15 --batch 1 --repeat 8 --gradient-checkpointing
    python -m bench.train_step --backbone sd15 --batch 4 --precision bf16 --device cuda

A step is forward, backward, clipping and Muon, on random pictures under the same frozen U-Net. Steps differ:
L_es decodes no answer whose noise is too strong. So the time is a mean over steps. Each step counts as the
fastest of those that decoded as many answers; how many a step decoded stands beside it. Operations are those
of the way forward: products of matrices, convolutions and attention. The rest, the scan too, is small.

ControlNet learns from the same grids by the same L_dm. All four contributions are RCLDM, the unified
instruction (it costs nothing here: encoded once, before training), L_es and L_sam. Parts of the paper's size
have random weights (bench/random_parts.py).
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop

import backbone
import train
from bench.random_parts import preset
from bench.rows import in_own_process, peak_bytes, print_head, print_row
from rcldm import RCLDM
from training.muon import Muon, parameter_groups
from training.precompute import Precomputed

MODELS = {
    "ControlNetModel": ("--no-rcldm", "--no-esm", "--no-sam"),
    "ours without ESM and SAM": ("--no-esm", "--no-sam"),
    "ours, all four": (),
}

WAYS = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}  # modes of torch.compile

# PyTorch's counter of operations does not know attention by the name that it has on a CPU.
flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop


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
    """Of each step the answers decoded and the seconds; operations, peak bytes, weights that learn."""
    device, chosen = args.device, preset(args.backbone, args.folder)
    settings = train.settings([*MODELS[name], "--batch", str(args.batch)])
    settings.panel = chosen.panel
    backbone.choose_kernels(torch.device(device), args.precision)
    sd = backbone.load_stable_diffusion(chosen.stable_diffusion, device)
    clip = None if settings.no_esm else backbone.load_clip(chosen.clip, device)
    decoded: list[int] = []  # by the step that is under way
    if clip is not None:  # it sees all that is decoded, and nothing else
        clip.visual.register_forward_pre_hook(lambda _, pictures: decoded.append(len(pictures[0])))
    precomputed, texts = random_precomputed(sd, clip, args.batch, settings.panel)
    rows = torch.zeros(2 * args.batch, dtype=torch.long)
    losses_of = train.Losses(settings, sd, clip, precomputed, texts, rows)
    if name == "ControlNetModel":
        model = ControlNetModel.from_unet(sd.unet)
    else:
        model = RCLDM.from_unet(sd.unet, factor=backbone.vae_factor(sd.vae))
    model.to(device).train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        sd.unet.enable_gradient_checkpointing()
    if way != "eager":
        for part in (model, sd.unet):  # a block meets panels of several sizes: one kernel for all fails
            part.compile(mode=WAYS[way], dynamic=False)
    optimizer = Muon(parameter_groups(model, train.WEIGHT_DECAY), lr=1e-5)
    index = torch.arange(args.batch)
    batch = {"index": index, "example_index": index + args.batch}

    def loss(step: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(step)
        with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
            return losses_of(model, batch, g)["loss"]

    def take(step: int) -> tuple[int, float]:
        """Answers decoded, and seconds."""
        decoded.clear()
        start = time.perf_counter()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return sum(decoded), time.perf_counter() - start

    steps = [take(step) for step in range(args.repeat + 1)][1:]
    peak = peak_bytes(device)
    with FlopCounterMode(display=False) as counter:  # which needs memory, too
        loss(0)
    count = sum(weight.numel() for weight in model.parameters())
    return {"steps": steps, "operations": counter.get_total_flops(), "bytes": peak, "weights": count}


@backbone.one_line_errors("bench.train_step")
def main() -> None:
    parser = backbone.new_parser("bench.train_step", __doc__)
    parser.add_argument("--backbone", default="toy", choices=backbone.PRESETS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=20, help="timed steps after one that is not")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"), help="of autocast")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for both")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager"])
    parser.add_argument("--limit", type=float, help="seconds for each row, start and compilation included")
    parser.add_argument("--folder", type=Path, help="of random parts (default: a temporary one)")
    args = parser.parse_args()
    args.device = backbone.pick_device(args.device).type
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        preset(args.backbone, args.folder)
        checkpointed = ", gradient checkpointing" if args.gradient_checkpointing else ""
        how = f"{args.backbone}, batch {args.batch}, precision {args.precision}{checkpointed}; {args.device}"
        columns = ["M weights", "G operations forwards", "answers decoded", "ms", "grids a second"]
        print_head(how, "a step of", *columns, "× the first's", "peak GiB")
        first = None
        for way, name in itertools.product(args.ways, args.only):
            label = name if way == "eager" else f"{name}, {way}"
            try:
                row = in_own_process(measure, name, way, args, limit=args.limit)
            except TimeoutError:
                print_row(label, f"not within {args.limit:g} s")
                continue
            except Exception as error:  # too little memory, or the compiler's: the next row is another
                print_row(label, f"failed ({type(error).__name__})")
                print(error, file=sys.stderr)
                continue
            fastest = dict(sorted(row["steps"], reverse=True))  # by answers decoded: the last of each stays
            seconds, decoded = (mean(x) for x in zip(*((fastest[n], n) for n, _ in row["steps"])))
            first = first or seconds
            numbers = f"{row['weights'] / 1e6:.2f}", f"{row['operations'] / 1e9:.0f}", f"{decoded:.2f}"
            times = f"{1e3 * seconds:.0f}", f"{args.batch / seconds:.2f}", f"{seconds / first:.2f}"
            print_row(label, *numbers, *times, f"{row['bytes'] / 2**30:.2f}")


if __name__ == "__main__":
    main()
