"""Trains the toy parts from scratch, each saved in the layout of the library that loads the real one.

    python toy/pretrain.py                  # everything missing under toy/weights, resumable at any moment
    python toy/pretrain.py vae unet         # only these stages
    python toy/pretrain.py --report         # measure the saved parts on pictures they have not seen

    vae          AutoencoderKL, 64×64 pictures <-> 8×8 latents of 16 channels           (diffusers)
    unet         text encoder and text-to-image U-Net; single scenes, 2×2 collages      (diffusers)
    clip         a CLIP for editing-shift matching and the dataset filter                (open_clip)
    clip_eval    another of a different seed, for evaluation only                        (open_clip)
    segmenter    Mask2Former                                                             (transformers)
    llm          a Llama that maps what people say to the canonical instruction          (transformers)
    writer       a Llama that writes captions and instructions, for data_making.texts    (transformers)
    editor       InstructGIE itself, by train.py

What the backbone has seen: pictures of the toy world, edited ones too, alone and in collages whose panels may
show the same scene again with something changed, as the pages of comics do.  It has seen no instruction and
no two rows that share an edit, so the editor still has everything about editing left to learn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from backbone import encode_images
from data_making.texts import OWN_TASK, as_prompt, as_reply, writing_loss
from disk import whole_folder
from pictures import from_bytes
from toy import world
from training.checkpoint import load_checkpoint, save_checkpoint
from training.ema import new_ema
from training.muon import Muon, parameter_groups

WEIGHTS = Path(__file__).parent / "weights"
LATENT_CHANNELS = 16
CONTEXT = 64  # tokens of a prompt


# ----------------------------------------------------------------------------------------------------------
# One loop for every stage


def fit(
    name: str,
    module: nn.Module,
    loss_of_step: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    runs: Path,
    weight_decay: float = 0.0,
    ema_decay: float = 0.999,
    warmup: int = 100,
    muon: bool = False,
) -> None:
    """Trains `module`, warm-up and cosine decay; leaves the averaged weights in it.

    muon: train by Muon, not AdamW.

    `loss_of_step(step)` draws its own data from the step's number and returns named losses, the first of
    which is minimised.  A checkpoint is written every minute; a stage that is started again goes on from it.
    """
    module.train()
    average = new_ema(module, ema_decay)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if muon:
        optimizer = Muon(parameter_groups(module, weight_decay), lr)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    folder = runs / name
    start = load_checkpoint(folder, {"model": module, "average": average}, optimizer)
    saved = time.monotonic()
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step in progress:
        schedule = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * max(schedule, 0.01)
        losses = loss_of_step(step)
        next(iter(losses.values())).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(module)
        if step % 20 == 0:
            progress.set_postfix({k: f"{v.item():.4f}" for k, v in losses.items()}, refresh=False)
        if time.monotonic() - saved > 60 or step + 1 == steps:
            save_checkpoint(folder, step + 1, {"model": module, "average": average}, optimizer, keep=2)
            saved = time.monotonic()
    module.load_state_dict(average.module.state_dict())
    module.eval()


def pictures(count: int, seed: int) -> tuple[Tensor, list[world.Scene]]:
    """Random pictures: (count, 3, 64, 64) uint8, and the scenes they show."""
    rng = random.Random(seed)
    scenes = [world.random_picture(rng) for _ in range(count)]
    pixels = np.stack([np.asarray(world.render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), scenes


def to_float(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 pixels -> floats in [-1, 1]."""
    return from_bytes(pixels.to(device))


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: a resumed run draws what an uninterrupted one would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ----------------------------------------------------------------------------------------------------------
# VAE


def new_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    # One group for GroupNorm: with two channels a group it would wash out what makes a flat area red.
    return AutoencoderKL(
        block_out_channels=(16, 24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=world.PANEL,
    )


class LinearShell:
    """The VAE with nothing but its samplers, shortcuts and outer convolutions: a linear autoencoder.

    Flat colours are a linear matter, and the deep network takes long to find that out.  So the convolutions
    are trained alone first, at a tenth of the cost, and `grow` then adds the rest such that the function
    stays almost the same: residual branches start at zero, and the outer GroupNorm and SiLU are brought
    into a range where they are straight lines, by two channels of constant value and a large bias.
    """

    def __init__(self, vae: nn.Module) -> None:
        from diffusers.models.resnet import ResnetBlock2D

        self.vae, self.ends = vae, (vae.encoder, vae.decoder)
        self.blocks = [m for m in vae.modules() if isinstance(m, ResnetBlock2D)]
        for block in self.blocks:
            block.forward = lambda x, temb=None, skip=block.conv_shortcut: skip(x) if skip else x
        for end in self.ends:  # the last two channels are kept free for the constants
            end.conv_norm_out.forward = lambda x: F.pad(x[:, :-2], (0, 0, 0, 0, 0, 2))
            end.conv_act.forward = lambda x: x

    @torch.no_grad()
    def grow(self, images: Tensor) -> None:
        seen: list[Tensor] = []
        for end in self.ends:
            end.conv_norm_out.register_forward_hook(lambda _, __, x: seen.append(x))
        self.vae(images)
        for module in [*self.blocks, *(m for end in self.ends for m in (end.conv_norm_out, end.conv_act))]:
            del module.forward
            module._forward_hooks.clear()
        for block in self.blocks:
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
        last = self.vae.encoder.down_blocks[-1].resnets[0], self.vae.decoder.up_blocks[-1].resnets[0]
        for end, block, x in zip(self.ends, last, seen):
            content, channels = x[:, :-2].std(), x.shape[1]
            constant, gain, bias = 20 * content, 0.5 / content, 4.0
            block.conv_shortcut.weight[-2:] = 0
            block.conv_shortcut.bias[-2:] = torch.stack([constant, -constant])
            nn.init.constant_(end.conv_norm_out.weight, gain * constant * math.sqrt(2 / channels))
            nn.init.constant_(end.conv_norm_out.bias, bias)
            end.conv_out.weight[:, -2:] = 0
            end.conv_out.weight /= gain
            end.conv_out.bias -= bias * end.conv_out.weight.sum((1, 2, 3))


def train_vae(args: argparse.Namespace) -> None:
    vae = new_vae().to(args.device, memory_format=torch.channels_last)
    pool, _ = pictures(args.scaled(60_000), seed=args.seed)
    batch = 8

    def loss(step: int) -> dict[str, Tensor]:
        g = generator(args.seed, step)
        x = to_float(pool[torch.randint(len(pool), (batch,), generator=g)], args.device)
        posterior = vae.encode(x).latent_dist
        # Choice: noise of one fixed strength on the latents and a whisper of a penalty on their size, in
        # place of a learned variance. Both only keep the latents' scale in bounds and their space smooth.
        z = posterior.mean + 0.05 * torch.randn(posterior.mean.shape, generator=g).to(x.device)
        error = vae.decode(z).sample - x
        pixel = error.abs().mean() / 4 + error.square().mean()
        return {"loss": pixel + 2e-4 * posterior.mean.square().mean(), "mse": error.square().mean()}

    shell = LinearShell(vae)
    fit("vae-linear", vae, loss, steps=args.scaled(2000), lr=3e-3, runs=args.runs, ema_decay=0.99)
    shell.grow(to_float(pool[:64], args.device))
    fit("vae", vae, loss, steps=args.scaled(12_000), lr=1e-3, runs=args.runs, ema_decay=0.99)

    # Last and longest, the decoder alone, for latents without noise: it is what every answer passes.
    def sharpness(step: int) -> dict[str, Tensor]:
        g = generator(args.seed + 1, step)
        x = to_float(pool[torch.randint(len(pool), (batch,), generator=g)], args.device)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        error = vae.decode(z).sample - x
        return {"loss": error.abs().mean() / 8 + error.square().mean(), "mse": error.square().mean()}

    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    vae.post_quant_conv.requires_grad_(False)
    fit("vae-decoder", vae, sharpness, steps=args.scaled(40_000), lr=1e-3, runs=args.runs, ema_decay=0.999)
    with torch.no_grad():
        quant = vae.quant_conv
        # The noise that an AutoencoderKL reports is the same for every picture, and small.
        quant.weight[LATENT_CHANNELS:] = 0
        quant.bias[LATENT_CHANNELS:] = 2 * math.log(0.05)
        z = vae.encode(to_float(pool[:512], args.device)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    save(vae.half().save_pretrained, args.out / "stable-diffusion" / "vae")


# ----------------------------------------------------------------------------------------------------------
# Text encoder and U-Net


def new_tokenizer(seed: int):
    """CLIP's kind of tokenizer (byte-level BPE), learnt from the toy world's captions and instructions.

    The merges are learnt here: the library's trainer breaks ties in a hash table's order, another each time.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    rng = random.Random(seed)
    texts = [world.random_picture(rng).caption() for _ in range(2000)]
    for edit in world.every_edit():
        texts += [edit.instruction] + [world.say(edit, rng) for _ in range(3)]
    empty = CLIPTokenizer()
    normalize, split = (getattr(empty.backend_tokenizer, k) for k in ("normalizer", "pre_tokenizer"))
    counts = Counter(
        word for text in texts for word, _ in split.pre_tokenize_str(normalize.normalize_str(text))
    )
    words = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    ends = {f"{c}</w>" for word in words for c in word}
    alphabet = [*empty.all_special_tokens, *sorted({*ByteLevel.alphabet(), *ends})]
    numbers, merges = learn_merges(words, counts, alphabet)
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=CONTEXT)


def learn_merges(
    words: dict[str, list[str]], counts: Counter, vocabulary: list[str], size: int = 1024
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding: words in parts, and how often each occurs → tokens by number, and merges."""
    vocabulary, merges = list(vocabulary), []
    while len(vocabulary) < size:
        pairs = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        vocabulary.append("".join(merges[-1]))
        for parts in words.values():
            for i in reversed(range(len(parts) - 1)):
                if (parts[i], parts[i + 1]) == merges[-1]:
                    parts[i : i + 2] = vocabulary[-1:]
    return {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, merges


def tokenize(tokenizer, texts: list[str], device: torch.device) -> Tensor:
    padding = {"padding": "max_length", "truncation": True, "max_length": CONTEXT}
    return tokenizer(texts, return_tensors="pt", **padding).input_ids.to(device)


def new_text_encoder(tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    # Choice: attention wherever Stable Diffusion has it, at the finest latents too: in a 2×2 grid every place
    # then sees its twins in the other panels. The decoder's last level does without, being the dearest.
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(1, 2, 3),  # heads, in truth: each of 32 channels
        norm_num_groups=8,
    )


def new_scheduler():
    from diffusers import DDIMScheduler

    # Down to pure noise: a tiny model paints flat areas in the right colour only if sampling starts where
    # training ends (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed").
    # Choice: it predicts x_0. Its decoder then draws, at every noise level, what its skip features hold, and
    # there the editor's residuals come in. One that predicts noise or velocity draws the picture at strong
    # noise only; in one trial, where more than this was changed, an editor could hardly make it draw another.
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # as pipelines ask for; without meaning where the spacing is trailing
        clip_sample=False,
        set_alpha_to_one=True,
    )


PANEL_NAMES = ("top left", "top right", "bottom left", "bottom right")


def train_unet(args: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    folder = args.out / "stable-diffusion"
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(args.device).eval().requires_grad_(False)
    rng = random.Random(args.seed + 1)
    tokenizer, scheduler = new_tokenizer(args.seed), new_scheduler()
    model = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(tokenizer)})
    model.to(args.device, memory_format=torch.channels_last)

    # The pool: strips of four pictures, the first and what three edits make of it.
    strips = []
    for _ in range(args.scaled(8000)):
        scene = world.random_picture(rng)
        strips.append([scene] + [world.random_edit(scene, rng) for _ in range(3)])
    latents = encode_scenes(vae, [scene for strip in strips for scene in strip], args.device)
    latents = latents.unflatten(0, (-1, 4))
    blank = encode_images(vae, torch.full((1, 3, world.PANEL, world.PANEL), 0.0, device=args.device))[0].cpu()
    batch = 32

    def draw(step: int) -> tuple[Tensor, list[str]]:
        rng = random.Random(args.seed * 1_000_003 + step)
        if step % 5 == 0:  # single scenes, a cheap batch at a quarter of the size
            chosen = [(rng.randrange(len(strips)), rng.randrange(4)) for _ in range(2 * batch)]
            texts = [strips[i][j].caption() if rng.random() < 0.8 else "" for i, j in chosen]
            return torch.stack([latents[i, j] for i, j in chosen]), texts
        grids, texts = [], []
        for _ in range(batch):
            # Rows of one strip or of two; within a row the same panel twice, or two variations.
            first, second = rng.randrange(len(strips)), rng.randrange(len(strips))
            rows = (first, first) if rng.random() < 0.3 else (first, second)
            panels = [(row, rng.randrange(4)) for row in rows for _ in range(2)]
            for right in (1, 3):
                if rng.random() < 0.3:
                    panels[right] = panels[right - 1]
            tiles = [latents[i, j] for i, j in panels]
            shown = rng.choice((0, 1, 2, 3, 3, 3))
            if rng.random() < 0.1:
                tiles[:2] = [blank, blank]
                shown = 3
            grids.append(torch.cat([torch.cat(tiles[:2], -1), torch.cat(tiles[2:], -1)], -2))
            i, j = panels[shown]
            caption = f"four pictures, the {PANEL_NAMES[shown]} shows {strips[i][j].caption()}"
            texts.append(caption if rng.random() < 0.75 else "")
        return torch.stack(grids), texts

    def loss(step: int) -> dict[str, Tensor]:
        x, texts = draw(step)
        x, g = x.to(args.device).float(), generator(args.seed + 1, step)
        noise = torch.randn(x.shape, generator=g).to(args.device)
        # Choice: three pictures in ten have hardly any noise. What this U-Net cannot give back of a clean
        # picture, an editor that steers its frozen decoder cannot draw either.
        u, weak = torch.rand(2, len(x), generator=g)
        t = torch.where(weak < 0.3, u / 10, u) * scheduler.config.num_train_timesteps
        t = t.long().to(args.device)
        states = model["text"](tokenize(tokenizer, texts, args.device)).last_hidden_state
        output = model["unet"](scheduler.add_noise(x, noise, t), t, states).sample
        error = (output - x).square().mean((1, 2, 3))
        # As if it predicted the velocity, but at weak noise no more than ten times the weight of pure noise.
        weight = (1 / (1 - scheduler.alphas_cumprod.to(t.device)[t])).clamp(max=10)
        return {"loss": (weight * error).mean(), "x_0": error.mean()}

    fit("unet", model, loss, steps=args.scaled(2200), lr=1e-2, runs=args.runs, ema_decay=0.997, muon=True)
    save(model["unet"].half().save_pretrained, folder / "unet")
    save(model["text"].half().save_pretrained, folder / "text_encoder")
    save(tokenizer.save_pretrained, folder / "tokenizer")
    save(scheduler.save_pretrained, folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def encode_scenes(vae: nn.Module, scenes: list[world.Scene], device: torch.device) -> Tensor:
    """The scenes' latents, (N, 16, 8, 8) half floats on the CPU."""
    latents = []
    for start in tqdm(range(0, len(scenes), 250), desc="encode", mininterval=10):
        pixels = np.stack([np.asarray(world.render(scene)) for scene in scenes[start : start + 250]])
        images = to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2), device)
        latents.append(encode_images(vae, images).cpu().half())
    return torch.cat(latents)


# ----------------------------------------------------------------------------------------------------------
# CLIP


def train_clip(args: argparse.Namespace, name: str = "clip", seed: int = 10) -> None:
    import open_clip

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
    pool, scenes = pictures(args.scaled(20_000), seed=args.seed + seed)
    captions = torch.cat(
        [
            tokenize(tokenizer, [s.caption() for s in scenes[i : i + 500]], args.device)
            for i in range(0, len(scenes), 500)
        ]
    )
    batch = 96

    def loss(step: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(pool), (batch,), generator=generator(args.seed + seed, step))
        images, texts, scale = clip(to_float(pool[chosen], args.device), captions[chosen])
        logits = scale * images @ texts.T
        truth = torch.arange(batch, device=args.device)
        return {"loss": (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2}

    fit(name, clip, loss, steps=args.scaled(900), lr=1e-3, runs=args.runs, weight_decay=0.02)

    def write(folder: Path) -> None:
        from safetensors.torch import save_file

        tokenizer.save_pretrained(folder)
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
        text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
        (folder / "open_clip_config.json").write_text(text + "\n")
        weights = {k: v.half().contiguous() for k, v in clip.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")

    save(write, args.out / name)


def train_clip_eval(args: argparse.Namespace) -> None:
    train_clip(args, "clip-eval", seed=20)


# ----------------------------------------------------------------------------------------------------------
# Mask2Former


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
    _, scenes = pictures(args.scaled(10_000), seed=args.seed + 2)
    batch = 8

    def loss(step: int) -> dict[str, Tensor]:
        torch.manual_seed(args.seed + step)  # the loss samples points
        rng = random.Random(args.seed * 1_000_003 + step)
        chosen = [rng.choice(scenes) for _ in range(batch)]
        pixels = np.stack([np.asarray(world.render(scene)) for scene in chosen])
        images = to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2), args.device)
        masks, classes = [], []
        for scene in chosen:
            shown = torch.from_numpy(world.render_classes(scene)).to(args.device)
            present = shown.unique().long()
            classes.append(present)
            masks.append((shown[None] == present[:, None, None]).float())
        return {"loss": model(pixel_values=images, mask_labels=masks, class_labels=classes).loss}

    fit("segmenter", model, loss, steps=args.scaled(6500), lr=1e-3, runs=args.runs, weight_decay=0.01)
    processor = Mask2FormerImageProcessor(
        size={"height": world.PANEL, "width": world.PANEL},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        ignore_index=255,
        do_reduce_labels=False,
    )
    save(
        lambda folder: (model.half().save_pretrained(folder), processor.save_pretrained(folder)),
        args.out / "segmenter",
    )


# ----------------------------------------------------------------------------------------------------------
# Language model


def new_llama(tokenizer, **sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    numbers = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **numbers, **sizes)
    )


def train_llm(args: argparse.Namespace) -> None:
    tokenizer = new_tokenizer(args.seed)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|say|>"]})
    # The model knows one task, so its template renders the wish alone, without examples for larger models.
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<|say|>"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = new_llama(tokenizer, max_position_embeddings=128, **sizes).to(args.device)
    edits = list(world.every_edit())
    families: dict[str, list[world.Edit]] = {}
    for edit in edits:
        families.setdefault(edit.family, []).append(edit)
    say = tokenizer.convert_tokens_to_ids("<|say|>")
    batch = 64

    def loss(step: int) -> dict[str, Tensor]:
        rng = random.Random(args.seed * 1_000_003 + step)
        rows = []
        for _ in range(batch):
            edit = rng.choice(edits if rng.random() < 0.5 else rng.choice(list(families.values())))
            wish = world.say(edit, rng) if rng.random() < 0.9 else edit.instruction
            prompt = [*tokenizer(wish, add_special_tokens=False).input_ids, say]
            reply = [*tokenizer(edit.instruction, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            rows.append((prompt, reply))
        length = max(len(p) + len(r) for p, r in rows)
        pad = [[tokenizer.pad_token_id] * (length - len(p) - len(r)) for p, r in rows]
        ids = torch.tensor([p + r + x for (p, r), x in zip(rows, pad)], device=args.device)
        labels = torch.tensor([[-100] * len(p) + r + [-100] * len(x) for (p, r), x in zip(rows, pad)])
        return {"loss": model(input_ids=ids, labels=labels.to(args.device)).loss}

    fit("llm", model, loss, steps=args.scaled(2500), lr=2e-3, runs=args.runs, weight_decay=0.05)
    save(
        lambda folder: (model.half().save_pretrained(folder), tokenizer.save_pretrained(folder)),
        args.out / "llm",
    )


# ----------------------------------------------------------------------------------------------------------
# The language model that writes a dataset's texts


def new_writer_tokenizer(seed: int):
    """GPT-2's kind of tokenizer, which gives every text back as it was: lines, capitals, blanks."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer

    rng = random.Random(seed)
    records = [world.random_texts(rng) for _ in range(1500)]
    texts = [as_prompt(record["pairs"][0][0]) + as_reply(record) for record in records]
    split = ByteLevel(add_prefix_space=False)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    alphabet = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    numbers, merges = learn_merges({word: [*word] for word in counts}, counts, alphabet)
    return GPT2Tokenizer(vocab=numbers, merges=merges, pad_token="<|endoftext|>")


def train_writer(args: argparse.Namespace) -> None:
    tokenizer = new_writer_tokenizer(args.seed)
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 5}
    model = new_llama(tokenizer, max_position_embeddings=512, **sizes).to(args.device)

    def loss(step: int) -> dict[str, Tensor]:
        rng = random.Random(args.seed * 1_000_003 + step)
        with torch.autocast(args.device.type, torch.bfloat16):
            return {"loss": writing_loss(model, tokenizer, [world.random_texts(rng) for _ in range(16)])}

    fit("writer", model, loss, steps=args.scaled(4000), lr=2e-3, runs=args.runs, weight_decay=0.05)
    tokenizer.chat_template = OWN_TASK
    save(
        lambda folder: (model.half().save_pretrained(folder), tokenizer.save_pretrained(folder)),
        args.out / "writer",
    )


# ----------------------------------------------------------------------------------------------------------


def save(write: Callable[..., object], folder: Path) -> None:
    """Writes a model folder in one piece: a killed run leaves the old one or the new one."""
    with whole_folder(folder) as new:
        write(new)


# ----------------------------------------------------------------------------------------------------------
# The editor: what `python train.py` makes, in half precision


def train_editor(args: argparse.Namespace) -> None:
    from rcldm import RCLDM

    run, data = args.runs.parent / "editor", args.runs.parent / "toy-large"
    if not data.exists():  # Choice: twice the pairs of each instruction that train.py is content with
        world.write_dataset(data, args.seed, world.SPLITS | {"train": (world.SPLITS["train"][0], 12)})
    processes = [
        "--nproc_per_node",
        "1" if args.device.type == "cuda" else "2",
    ]  # on a CPU faster than threads
    command = [sys.executable, "-m", "torch.distributed.run", *processes, "train.py", "--output", run]
    command += ["--data", data, "--seed", args.seed, "--device", args.device, "--steps", args.scaled(20_000)]
    command += ["--precision", "bf16"] if args.device.type == "cuda" else []
    command += ["--resume"] if run.exists() else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    subprocess.run([str(word) for word in command], cwd=root, check=True, env=environment)
    model = RCLDM.from_pretrained(run / "editor").half()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        shutil.copy(run / "editor" / "instructgie.json", folder)

    save(write, args.out / "editor")


# ----------------------------------------------------------------------------------------------------------
# What the parts can do, on pictures and sayings they have not seen


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, dB; values in [-1, 1]."""
    mse = (a.clamp(-1, 1) - b).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse)).mean().item()


@torch.no_grad()
def report(args: argparse.Namespace) -> dict[str, float]:
    """Measures every part under `--out` that was trained; `python toy/pretrain.py --report` prints it."""
    import backbone
    from liu import InstructionUnifier

    results: dict[str, float] = {}
    out, device = args.out, args.device
    pixels, scenes = pictures(512, seed=args.seed + 999)
    images = to_float(pixels, device)
    sd = backbone.load_stable_diffusion(str(out / "stable-diffusion"), device)
    decoded = [sd.vae.decode(sd.vae.encode(x).latent_dist.mean).sample for x in images.split(64)]
    results["VAE: PSNR, dB"] = psnr(torch.cat(decoded), images)
    for name in (name for name in ("clip", "clip-eval") if (out / name).is_dir()):
        clip = backbone.load_clip(str(out / name), device)
        tokens = backbone.load_clip_tokenizer(str(out / name))([scene.caption() for scene in scenes]).to(
            device
        )
        shown, told = clip.encode_image(images, normalize=True), clip.encode_text(tokens, normalize=True)
        nearest = (shown @ told.T).argmax(1).cpu() == torch.arange(len(images))
        results[f"{name}: right caption of 512"] = nearest.float().mean().item()
    model, processor = backbone.load_segmenter(str(out / "segmenter"), device)
    both, either = torch.zeros(len(world.CLASSES)), torch.zeros(len(world.CLASSES))
    for start in range(0, len(scenes), 64):
        output = model(pixel_values=images[start : start + 64])
        sizes = [(world.PANEL, world.PANEL)] * len(output.class_queries_logits)
        found = processor.post_process_semantic_segmentation(output, target_sizes=sizes)
        for scene, guess in zip(scenes[start : start + 64], found):
            truth, guess = torch.from_numpy(world.render_classes(scene)), guess.cpu()
            for k in range(len(world.CLASSES)):
                both[k] += ((truth == k) & (guess == k)).sum()
                either[k] += ((truth == k) | (guess == k)).sum()
    results["segmenter: mean IoU"] = (both / either).mean().item()
    results["segmenter: IoU of faces"] = (both / either)[world.CLASSES.index("face")].item()
    unifier = InstructionUnifier(*backbone.load_llm(str(out / "llm"), device), batch_size=64)
    rng = random.Random(args.seed)
    edits = [rng.choice(list(world.every_edit())) for _ in range(256)]
    for kind, held_out in (("trained", False), ("held-out", True)):
        replies = unifier.unify([world.say(edit, rng, held_out) for edit in edits])
        right = [reply == edit.instruction for reply, edit in zip(replies, edits)]
        results[f"llm: exact matches, {kind} sayings"] = sum(right) / len(right)
    return results


def main() -> None:
    stages = {
        "vae": train_vae,
        "unet": train_unet,
        "clip": train_clip,
        "clip_eval": train_clip_eval,
        "segmenter": train_segmenter,
        "llm": train_llm,
        "writer": train_writer,
        "editor": train_editor,
    }
    parser = argparse.ArgumentParser(description="Train the toy parts.")
    parser.add_argument("stages", nargs="*", choices=[[], *stages], default=[])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="of all training lengths")
    parser.add_argument("--report", action="store_true", help="measure the saved parts, train nothing")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.scaled = lambda steps: max(1, round(args.scale * steps))
    if args.report:
        for name, value in report(args).items():
            print(f"{name:40} {value:8.3f}")
        return
    for name in args.stages or stages:
        torch.manual_seed(args.seed)
        stages[name](args)


if __name__ == "__main__":
    main()
