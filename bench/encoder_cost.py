"""What the visual prompt encoder costs as panels grow: VMamba's in proportion to their area, ViT's faster.

    python -m bench.encoder_cost
    python -m bench.encoder_cost --width 320 --panels 64 128 256 512 --device cuda    # as for SD 1.5

Forward and backward of one condition grid of 2 × 2 panels, with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import backbone
from evaluation.vit import ViTPromptEncoder
from rcldm import VisualPromptEncoder


def seconds(encoder: VisualPromptEncoder, panel: int, repeat: int, device: torch.device) -> float:
    """Median of a forward and backward pass, after one that is not timed."""
    grid = torch.rand(1, 3, 2 * panel, 2 * panel, device=device) * 2 - 1
    taken = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        encoder(grid).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.encoder_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--panels", nargs="+", type=int, default=[64, 128, 256, 512], help="pixels a side")
    parser.add_argument("--width", type=int, default=64, help="channels of the blocks")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    device = backbone.pick_device(args.device)
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"width {args.width}; {device.type}, {threads}\n")
    print("| panel | latents of the grid | VMamba, ms | μs a latent | ViT, ms | μs a latent |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    torch.manual_seed(0)
    encoders = VisualPromptEncoder(args.width), ViTPromptEncoder(args.width)
    encoders = [encoder.to(device) for encoder in encoders]
    for panel in args.panels:
        places = (2 * panel // 8) ** 2
        cells = [f"{panel}", f"{places}"]
        for encoder in encoders:
            taken = seconds(encoder, panel, args.repeat, device)
            cells += [f"{1e3 * taken:.0f}", f"{1e6 * taken / places:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
