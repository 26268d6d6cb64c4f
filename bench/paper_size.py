"""The paper's size, without its weights: one training step and one edit with the real configurations.

    python -m bench.paper_size     # takes minutes on a CPU, and 10 GB of disk while it runs

Stable Diffusion 1.5, CLIP ViT-L-14 and Mask2Former Swin-L are built from their published configurations with
random weights, saved to folders, and read back by `backbone/` as anyone's weights would be, in a real
`train.py` and `edit.py`.  It shows that shapes, memory and loading are right, and of quality nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

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


def run(*command: object) -> None:
    print("$ python", *command, flush=True)
    start = time.monotonic()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{time.monotonic() - start:.0f} s; largest process so far {peak:.1f} GiB\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.paper_size", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the parts here (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=1, help="training steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        parts = {
            "stable-diffusion": save_stable_diffusion,
            "clip": save_clip,
            "segmenter": save_segmenter,
            "data": save_data,
        }
        torch.manual_seed(0)
        for name, save in parts.items():
            if not (folder / name).exists():
                save(folder / name)
        sources = [x for name in list(parts)[:3] for x in (f"--{name}", folder / name)]
        # The unifying model's size is free; the embedded one serves.
        run(
            *(
                "train.py",
                "--backbone",
                "sd15",
                *sources,
                "--llm",
                "toy/weights/llm",
                "--data",
                folder / "data",
            ),
            *("--output", folder / "run", "--cache", folder / "cache", "--steps", args.steps, "--batch", 1),
            *("--workers", 0, "--gradient-checkpointing"),
            # Its first noise is weak, so that the losses on the picture take part and their memory counts.
            *("--seed", 2),
        )
        picture = folder / "data" / "train" / "0_before.png"
        pair = picture, folder / "data" / "train" / "0_after.png"
        run(
            *("edit.py", "--model", folder / "run" / "editor", "--prompt-pair", *pair, "--input", picture),
            *("--instruction", "make it night", "--steps", 2, "--output", folder / "answer.png"),
        )
        print(f"answer: {Image.open(folder / 'answer.png').size} pixels")


if __name__ == "__main__":
    main()
