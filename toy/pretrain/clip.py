"""CLIP, in open_clip's layout: one for training and the dataset filter, one for evaluation only."""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from disk import atomic_folder
from pictures import from_bytes
from toy import world
from toy.pretrain.loop import fit, pictures
from toy.pretrain.words import CONTEXT, new_tokenizer, tokenize
from training.draws import step_generator


def train_clip(args: argparse.Namespace, name: str = "clip", seed: int = 10) -> None:
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_for_hf

    torch.manual_seed(args.seed + seed)
    tokenizer = new_tokenizer(args.seed)
    config = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": world.PANEL,
            "patch_size": 8,
            "width": 96,
            "layers": 4,
            "head_width": 24,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(tokenizer),
            "width": 96,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "local",  # open_clip reads the tokenizer that lies in the same folder
            "pool_type": "argmax" if tokenizer.eos_token_id == len(tokenizer) - 1 else "eos",
            "eos_id": tokenizer.eos_token_id,
        },
    }
    clip = open_clip.CLIP(**config).to(args.device)
    pool, scenes = pictures(20_000, seed=args.seed + seed)
    captions = tokenize(tokenizer, [scene.caption() for scene in scenes], args.device)
    batch = 96

    def loss(step: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(pool), (batch,), generator=step_generator(args.seed + seed, step))
        images, texts, scale = clip(from_bytes(pool[chosen].to(args.device)), captions[chosen])
        logits = scale * images @ texts.T
        truth = torch.arange(batch, device=args.device)
        return {"loss": (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2}

    fit(name, clip, loss, steps=900, lr=1e-3, runs=args.runs, weight_decay=0.02)

    set_model_preprocess_cfg(clip, {"mean": [0.5] * 3, "std": [0.5] * 3})
    with atomic_folder(args.out / name) as folder:
        save_for_hf(clip.half(), tokenizer, config, folder, safe_serialization=True)
