"""What the trained parts can do, on pictures and sayings that they have not seen."""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor

import backbone
from liu import InstructionUnifier
from toy import world
from toy.pretrain.loop import pictures, to_float


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, dB; values in [-1, 1]."""
    mse = (a.clamp(-1, 1) - b).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse)).mean().item()


@torch.no_grad()
def report(args: argparse.Namespace) -> dict[str, float]:
    """Measures every part under `--out` that was trained; `python -m toy.pretrain --report` prints it."""
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
