"""Whether the paper's size works here: its parts, the start, one training step and one edit, in that order.

    python -m bench.paper_size               # with random weights: minutes on a CPU, 10 GB of disk
    python -m bench.paper_size --real        # with the preset's parts, from the hub or from folders
    python -m bench.paper_size --real --stable-diffusion FOLDER --device cuda --precision bf16

Each part is found or downloaded, named with its size and licence, and loaded. The untrained RCLDM must leave
the U-Net's prediction as it is, to the last bit. Then `train.py` takes a step with all four contributions and
`edit.py` draws an edit; each says its time and memory. What fails, fails there, in one line.

Without `--real` the parts are those of bench/random_parts.py. The pictures are the toy world's.
"""

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

import backbone
from bench import random_parts
from rcldm import RCLDM
from toy import world
from training.draws import draw_noise, draw_timesteps, keep_conditions, step_generator
from training.settings import PARTS


def licence(source: str) -> str:
    """As the model's card has it, in its folder or on the hub."""
    folder = backbone.local_folder(source)
    if folder and not (folder / "README.md").is_file():
        return "not told"
    try:
        return ModelCard.load(folder / "README.md" if folder else source).data.license or "not told"
    except Exception as error:  # of the hub's client, whose kinds are many
        return f"not known ({type(error).__name__})"


def millions(model: nn.Module) -> float:
    return sum(weight.numel() for weight in model.parameters()) / 1e6


def load(part: str, source: str, device: torch.device) -> Any:
    """What `backbone` makes of the part, which train.py will load once more; says what it is. Raises
    BackboneError."""
    start = time.monotonic()
    loaded = getattr(backbone, f"load_{part}")(source, device)
    models = [x for x in (loaded if isinstance(loaded, tuple) else [loaded]) if isinstance(x, nn.Module)]
    folder = backbone.find_folder(source, {"clip": ["open_clip*"], **backbone.FOLDERS}.get(part))
    files = [*folder.rglob("*.safetensors")]
    size = sum(file.stat().st_size for file in files) / 2**30
    print(f"{part}: {source}, in {folder}, {time.monotonic() - start:.0f} s")
    print(f"    {len(files)} safetensors files, {size:.2f} GiB; licence: {licence(source)}")
    for model in models:
        print(f"    {type(model).__name__}: {millions(model):.0f} M parameters", flush=True)
    return loaded


@torch.no_grad()
def check_start(sd: backbone.StableDiffusion, panel: int) -> torch.Size:
    """The shape of a grid's latents. Raises ValueError where the untrained RCLDM changes a prediction."""
    factor = backbone.vae_factor(sd.vae)
    model = RCLDM.from_unet(sd.unet, factor=factor, panel=panel).to(sd.unet.device)
    g, device = torch.Generator().manual_seed(0), sd.unet.device
    x_t = torch.randn(1, sd.unet.config.in_channels, *[2 * panel // factor] * 2, generator=g).to(device)
    grid = (torch.rand(1, 3, 2 * panel, 2 * panel, generator=g) * 2 - 1).to(device)
    states = backbone.encode_text(sd, ["make it night"])
    down, mid = model(x_t, 500, states, grid, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    if not torch.equal(sd.unet(x_t, 500, states, **residuals).sample, sd.unet(x_t, 500, states).sample):
        raise ValueError("the untrained RCLDM changes what the U-Net predicts")
    print(
        f"start: RCLDM, {millions(model):.0f} M parameters; the U-Net predicts as without it, to the last bit"
    )
    return x_t.shape[1:]


def seed_of_weak_noise(batch: int, shape: torch.Size, device: torch.device) -> int:
    """Of a training whose first batch has little noise, so that L_es and L_sam act, and take memory."""
    for seed in itertools.count():
        g = step_generator(seed, 0)
        keep_conditions(batch, (0.0, 0.0, 0.0), g)
        draw_noise((batch, *shape), g, device)
        if draw_timesteps(batch, 1000, g).min() < 300:
            return seed


# Runs a program, and says how much of a GPU it took.
ON_GPU = """
import runpy, sys, torch
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
if torch.cuda.is_available():
    print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU", flush=True)
"""


def run(*command: object) -> None:
    print("$ python", *command, flush=True)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", ON_GPU, *map(str, command)], cwd=backbone.HERE)
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**30
    print(f"{time.monotonic() - start:.0f} s; largest process so far {peak:.1f} GiB of memory\n", flush=True)


def check(args: argparse.Namespace, folder: Path) -> None:
    chosen, device = backbone.preset(args.backbone), backbone.pick_device(args.device)
    # Of seed 4 the scenes show faces: else the toy's segmenter would select nothing, and L_sam be 0.
    world.write_split(folder / "data" / "train", world.draw_split("train", 1, 2, seed=4))
    if not args.real:
        chosen = random_parts.preset(args.backbone, folder, tuple(random_parts.RANDOM))
    sources = {part: getattr(args, part) or getattr(chosen, part) for part in PARTS}
    for part in ("llm", "clip", "segmenter"):
        load(part, sources[part], device)
    shape = check_start(load("stable_diffusion", sources["stable_diffusion"], device), chosen.panel)

    options = [x for part in PARTS for x in (f"--{part.replace('_', '-')}", sources[part])]
    options += ["--backbone", args.backbone, "--data", folder / "data", "--cache", folder / "cache"]
    options += ["--device", args.device, "--precision", args.precision, "--gradient-checkpointing"]
    options += ["--steps", 1, "--batch", args.batch, "--workers", 0]
    options += ["--seed", seed_of_weak_noise(args.batch, shape, device)]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # train.py is another process
    run("train.py", *options, "--output", folder / "run")
    pictures = ["--prompt-pair", "examples/before.png", "examples/after.png", "--input", "examples/input.png"]
    pictures += ["--instruction", "make it night", "--output", folder / "answer.png"]
    run("edit.py", "--model", folder / "run" / "editor", *pictures, "--steps", 2, "--device", args.device)
    print(f"answer: {Image.open(folder / 'answer.png').size} pixels")


@backbone.one_line_errors("bench.paper_size")
def main() -> None:
    parser = backbone.new_parser("bench.paper_size", __doc__)
    add = parser.add_argument
    add("--backbone", default="sd15", choices=backbone.PRESETS)
    add("--real", action="store_true", help="the preset's parts, not random weights")
    for part in PARTS:
        add(f"--{part.replace('_', '-')}", help="hub id or folder instead")
    add("--batch", type=int, default=1, help="grids of the training step")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="no", choices=("no", "bf16", "fp16"), help="of autocast, in training")
    args = parser.parse_args()
    backbone.hide_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        check(args, Path(temporary))


if __name__ == "__main__":
    main()
