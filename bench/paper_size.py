"""Whether the paper's size works here: its parts, the start, one training step and one edit, in that order.

    python -m bench.paper_size               # with random weights: minutes on a CPU, 10 GB of disk
    python -m bench.paper_size --real        # with the preset's parts, from the hub or from folders
    python -m bench.paper_size --real --stable-diffusion FOLDER --device cuda --precision bf16

Each part is found or downloaded, named with its size and licence, and loaded. The untrained RCLDM must leave
the U-Net's prediction as it is, to the last bit. Then `train.py` takes a step with all four losses and
`edit.py` draws an edit; each says its time and memory. What fails, fails there, in one line.

Without `--real`, Stable Diffusion 1.5, CLIP ViT-L-14 and Mask2Former Swin-L have their published
configurations and random weights. That shows shapes, memory and loading, and of quality nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import backbone
from rcldm import RCLDM
from training.draws import draw_timesteps, keep_conditions, step_generator

ROOT = Path(__file__).resolve().parents[1]


def save_stable_diffusion(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.half().save_pretrained(folder / "unet")
    del unet
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    ).half().save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    CLIPTextModel(text).half().save_pretrained(folder / "text_encoder")
    # The vocabulary of CLIP's text encoder comes with open_clip.
    bpe = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): index for token, index in bpe.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks))
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")


def save_clip(folder: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    config = open_clip.get_model_config("ViT-L-14")
    clip = open_clip.CLIP(**config).half()
    folder.mkdir(parents=True)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    record = {"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    save_file(
        {k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors"
    )


def save_segmenter(folder: Path) -> None:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    swin = SwinConfig(
        image_size=384,
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        drop_path_rate=0.3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    labels = {0: "person"} | {k: f"class {k}" for k in range(1, 133)}  # COCO panoptic has 133 classes
    names = {"id2label": labels, "label2id": {name: k for k, name in labels.items()}}
    config = Mask2FormerConfig(backbone_config=swin, num_queries=200, **names)
    Mask2FormerForUniversalSegmentation(config).half().save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}, ignore_index=255).save_pretrained(folder)


def save_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for k in range(2):
        names = f"{k}_before.png", f"{k}_after.png"
        for name in names:
            (folder / "train").mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "train" / name)
        record = {"input_file_name": names[0], "output_file_name": names[1], "instruction": "make it night"}
        lines.append(json.dumps(record))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def licence(source: str) -> str:
    """As the model's page on the hub says, or its README where it lies here."""
    if folder := backbone.local_folder(source):
        page = folder / "README.md"
        found = re.search(r"^license: *(.+)$", page.read_text() if page.exists() else "", re.MULTILINE)
        return found[1] if found else "not told"
    from huggingface_hub import model_info

    try:
        return str(model_info(source, timeout=10).card_data.get("license", "not told"))
    except Exception as error:  # of the hub's client, whose kinds are many
        return f"not known ({type(error).__name__})"


def load(part: str, source: str, device: torch.device) -> Any:
    """What `backbone` makes of the part, which train.py will load once more; says what it is. Raises
    BackboneError."""
    start = time.monotonic()
    loaded = getattr(backbone, f"load_{part}")(source, device)
    models = [x for x in (loaded if isinstance(loaded, tuple) else [loaded]) if isinstance(x, nn.Module)]
    folder = backbone.find_folder(source, {"clip": ["open_clip*"], **backbone.FOLDERS}.get(part))
    files = [*folder.rglob("*.safetensors")]
    size = sum(file.stat().st_size for file in files) / 2**30
    names = ", ".join(
        f"{type(model).__name__} of {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M"
        for model in models
    )
    print(f"{part}: {source}, in {folder}")
    print(f"    {len(files)} safetensors files, {size:.2f} GiB; licence: {licence(source)}")
    print(f"    {names} parameters, {time.monotonic() - start:.0f} s", flush=True)
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
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"start: RCLDM, {millions:.0f} M parameters; the U-Net predicts as without it, to the last bit")
    return x_t.shape[1:]


def seed_of_weak_noise(shape: torch.Size) -> int:
    """Of a training whose first grid has so little noise that L_es and L_sam act, and their memory counts."""
    for seed in itertools.count():
        g = step_generator(seed, 0)
        keep_conditions(1, (0.0, 0.0, 0.0), g)
        torch.randn(1, *shape, generator=g)
        if draw_timesteps(1, 1000, g) < 300:
            return seed


def run(*command: object) -> None:
    print("$ python", *command, flush=True)
    start = time.monotonic()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{time.monotonic() - start:.0f} s; largest process so far {peak:.1f} GiB\n", flush=True)


def check(args: argparse.Namespace, folder: Path) -> None:
    preset, device = backbone.preset(args.backbone), backbone.pick_device(args.device)
    sources = {part: getattr(args, part) or getattr(preset, part) for part in PARTS}
    if not args.real:
        torch.manual_seed(0)
        for part, save in RANDOM.items():
            if not (folder / part).exists():
                save(folder / part)
            sources[part] = str(folder / part)
        sources["llm"] = backbone.PRESETS["toy"].llm  # its size is free
    if not (folder / "data").exists():
        save_data(folder / "data")
    for part in ("llm", "clip", "segmenter"):
        load(part, sources[part], device)
    shape = check_start(load("stable_diffusion", sources["stable_diffusion"], device), preset.panel)

    options = [x for part in PARTS for x in (f"--{part.replace('_', '-')}", sources[part])]
    where = ["--output", folder / "run", "--cache", folder / "cache", "--workers", 0]
    how = ["--device", args.device, "--precision", args.precision, "--gradient-checkpointing"]
    step = ["--steps", 1, "--batch", 1, "--seed", seed_of_weak_noise(shape)]
    data = ["--backbone", args.backbone, "--data", folder / "data"]
    shutil.rmtree(folder / "run", ignore_errors=True)
    run("train.py", *data, *options, *where, *how, *step)
    picture, after = (folder / "data" / "train" / f"0_{when}.png" for when in ("before", "after"))
    given = ["--prompt-pair", picture, after, "--instruction", "make it night", "--input", picture]
    where = ["--model", folder / "run" / "editor", "--output", folder / "answer.png"]
    run("edit.py", *where, *given, "--steps", 2, "--device", args.device)
    print(f"answer: {Image.open(folder / 'answer.png').size} pixels")


PARTS = ("stable_diffusion", "clip", "segmenter", "llm")
RANDOM = {"stable_diffusion": save_stable_diffusion, "clip": save_clip, "segmenter": save_segmenter}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.paper_size", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--backbone", default="sd15", choices=backbone.PRESETS)
    add("--real", action="store_true", help="the preset's parts, or those named below")
    for part in PARTS:
        add(f"--{part.replace('_', '-')}", help="hub id or folder instead of the preset's, with --real")
    add("--folder", type=Path, help="keep what is made here (default: a temporary folder)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="no", choices=("no", "bf16", "fp16"), help="of autocast, in training")
    args = parser.parse_args(argv)
    with backbone.one_line_errors("bench.paper_size"), tempfile.TemporaryDirectory() as temporary:
        check(args, args.folder or Path(temporary))


if __name__ == "__main__":
    main()
