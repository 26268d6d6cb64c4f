"""An edit of ours against diffusers' StableDiffusionControlNetPipeline: equal steps, resolution and passes.

    python -m bench.edit_time                            # the toy size
    python -m bench.edit_time --backbone sd15 --batch 1 --steps 2 --repeat 1

Both draw a whole grid with the same frozen Stable Diffusion, with as many passes of the U-Net for each step:
one without guidance, two with guidance by text. Ours unifies no instruction, and decodes the answer's panel
alone; the pipeline decodes the grid. ControlNet and RCLDM have random weights, which cost as much as trained
ones.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import backbone
from apps.pipeline import InstructGIEPipeline
from bench.random_parts import preset
from bench.rows import in_own_process, peak_bytes, print_head, print_row
from dataset import compose_grid, mask_query
from rcldm import RCLDM

EDITORS = ("StableDiffusionControlNetPipeline", "ours")


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a batch of edits, and the process's peak bytes."""
    device, dtype, chosen = args.device, getattr(torch, args.dtype), preset(args.backbone, args.folder)
    sd = backbone.load_stable_diffusion(chosen.stable_diffusion, device, dtype)
    g = torch.Generator().manual_seed(0)
    before, after, query = torch.rand(3, args.batch, 3, chosen.panel, chosen.panel, generator=g) * 2 - 1
    texts, seeds = ["wave"] * args.batch, list(range(args.batch))
    torch.manual_seed(0)
    if name == "ours":
        model = RCLDM.from_unet(sd.unet, factor=backbone.vae_factor(sd.vae)).to(device, dtype).eval()
        pipe = InstructGIEPipeline(**sd._asdict(), rcldm=model, panel=chosen.panel)
    else:
        control = ControlNetModel.from_unet(sd.unet).to(device, dtype).eval()
        unscreened = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionControlNetPipeline(**sd._asdict(), controlnet=control, **unscreened)
    pipe.set_progress_bar_config(disable=True)

    def edit() -> torch.Tensor:
        if name == "ours":
            options = {"steps": args.steps, "guidance_text": args.guidance, "guidance_visual": 1.0}
            return pipe.answer(torch.stack([before, after], 1), None, query, texts, seeds, **options)
        condition = (mask_query(compose_grid(before, after, query, query)) + 1) / 2
        options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "output_type": "pt"}
        return pipe(texts, condition, generator=torch.Generator().manual_seed(0), **options).images

    seconds = []
    for _ in range(args.repeat + 1):
        start = time.perf_counter()
        with torch.no_grad():
            edit().cpu()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "bytes": peak_bytes(device)}


@backbone.one_line_errors("bench.edit_time")
def main() -> None:
    parser = backbone.new_parser("bench.edit_time", __doc__)
    parser.add_argument("--backbone", default="toy", choices=backbone.PRESETS)
    parser.add_argument("--batch", type=int, default=4, help="edits drawn at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0, help="1: one pass for each step; else two")
    parser.add_argument("--repeat", type=int, default=5, help="timed batches after one that is not")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--folder", type=Path, help="of random parts (default: a temporary one)")
    args = parser.parse_args()
    args.device = backbone.pick_device(args.device).type
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        preset(args.backbone, args.folder)
        how = f"{args.batch} at once, {args.steps} steps, guidance {args.guidance:g}, {args.dtype}"
        how = f"{args.backbone}, {how}; {args.device}"
        print_head(how, "edits by", "ms for each", "× the pipeline's", "peak GiB")
        first = None
        for name in EDITORS:
            row = in_own_process(measure, name, args)
            first = first or row["seconds"]
            numbers = f"{1e3 * row['seconds'] / args.batch:.0f}", f"{row['seconds'] / first:.2f}"
            print_row(name, *numbers, f"{row['bytes'] / 2**30:.2f}")


if __name__ == "__main__":
    main()
