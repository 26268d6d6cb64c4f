"""Mask2Former, on the renderer's own classes."""

import argparse
import random

import torch
from torch import Tensor

from pictures import from_bytes
from toy import world
from toy.pretrain.loop import fit, rendered, save


def train_segmenter(args: argparse.Namespace) -> None:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    labels = dict(enumerate(world.CLASSES))
    backbone = SwinConfig(
        image_size=world.PANEL,
        patch_size=4,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 4, 8],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=96,
        dim_feedforward=96,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=4,
        num_queries=8,
        train_num_points=512,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    model = Mask2FormerForUniversalSegmentation(config).to(args.device)
    rng = random.Random(args.seed + 2)
    scenes = [world.random_picture(rng) for _ in range(10_000)]
    batch = 8

    def loss(step: int) -> dict[str, Tensor]:
        torch.manual_seed(args.seed + step)  # the loss samples points
        rng = random.Random(args.seed * 1_000_003 + step)
        chosen = [rng.choice(scenes) for _ in range(batch)]
        images = from_bytes(rendered(chosen).to(args.device))
        masks, classes = [], []
        for scene in chosen:
            shown = torch.from_numpy(world.render_classes(scene)).to(args.device)
            present = shown.unique().long()
            classes.append(present)
            masks.append((shown[None] == present[:, None, None]).float())
        return {"loss": model(pixel_values=images, mask_labels=masks, class_labels=classes).loss}

    fit("segmenter", model, loss, steps=6500, lr=1e-3, runs=args.runs, weight_decay=0.01)
    processor = Mask2FormerImageProcessor(
        size={"height": world.PANEL, "width": world.PANEL},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        ignore_index=255,
        do_reduce_labels=False,
    )
    save(args.out / "segmenter", model.half(), processor)
