"""Contribution 5, phase 1, step 2: pairs of captions become pairs of pictures.

    python -m data_making.pictures --out data/mine

Stable Diffusion draws both captions of a pair from the same noise with Prompt-to-Prompt
(`prompt_to_prompt.py`), so that what the edit leaves alone stays. It draws several samples, with random
guidance and strength of injection; CLIP keeps the best of those that pass InstructPix2Pix's thresholds, and
an instruction stays if two pairs or more do. The result is a dataset folder for `train.py --data`, and for
`datasets.load_dataset("imagefolder", data_dir=…)`.

Symbols: B pairs drawn at a time; H, W a picture's pixels; C, h, w its latent's.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import backbone
import esm
from data_making.prompt_to_prompt import PromptToPrompt, align
from data_making.texts import (
    append,
    hash_of,
    processes,
    read_lines,
    read_texts,
    same_settings,
    stage,
    write_lines,
)
from disk import atomic_write
from pictures import tensor_to_image

# --- Two pictures from one noise ----------------------------------------------------------------------------


@torch.no_grad()
def draw_pairs(
    sd: backbone.StableDiffusion,
    captions: list[tuple[str, str]],
    seeds: list[int],
    guidance: list[float],
    own: list[float],
    cross: float,
    steps: int,
    size: int,
) -> Tensor:
    """Draws both captions of each of B pairs from the same noise → pictures (B, 2, 3, size, size) in [-1, 1].

    guidance: scale of each pair. own, of each pair, and cross: in which part of the steps, counted from the
    first, self-attention and attention to the text are those of the first picture. With 0 and 0 the two
    pictures share nothing but the noise.
    """
    unet, device = sd.unet, sd.unet.device
    matrix, known = map(torch.stack, zip(*(align(*pair, sd.tokenizer) for pair in captions)))
    control = PromptToPrompt(matrix.to(device), known.to(device))
    prompts = [pair[k] for k in (0, 1) for pair in captions]
    text = torch.cat([backbone.encode_text(sd, [""] * len(prompts)), backbone.encode_text(sd, prompts)])
    shape = unet.config.in_channels, *[size // backbone.vae_factor(sd.vae)] * 2
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise * 2).to(device, unet.dtype)  # (2B, C, h, w)
    scale = torch.tensor(guidance * 2).to(latents)[:, None, None, None]
    part = torch.tensor(own, device=device)
    plain = unet.attn_processors
    unet.set_attn_processor(control)
    try:
        backbone.set_timesteps(sd.scheduler, steps, device)
        latents = latents * sd.scheduler.init_noise_sigma
        for i, t in enumerate(sd.scheduler.timesteps):
            control.cross, control.own = i < cross * steps, i < part * steps
            rows = sd.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            without, told = unet(rows, t, encoder_hidden_states=text).sample.chunk(2)
            latents = sd.scheduler.step(without + scale * (told - without), t, latents).prev_sample
    finally:
        unet.set_attn_processor(plain)
    return backbone.decode_latents(sd.vae, latents).unflatten(0, (2, -1)).transpose(0, 1)


# --- CLIP's filter ------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_scores(
    clip: nn.Module, tokenizer: Any, pictures: Tensor, captions: tuple[str, str]
) -> dict[str, Tensor]:
    """Four cosines (B,) for drawings (B, 2, 3, H, W) of a pair of captions, as InstructPix2Pix filters by: of
    each picture with its caption, of the two pictures, and of the two changes, from picture to picture and
    from caption to caption."""
    device = pictures.device
    said = F.normalize(clip.encode_text(tokenizer(list(captions)).to(device)).float(), dim=-1)
    shown = esm.embed(clip, pictures.flatten(0, 1)).unflatten(0, (-1, 2))
    return {
        "clip_before": shown[:, 0] @ said[0],
        "clip_after": shown[:, 1] @ said[1],
        "clip_image": (shown[:, 0] * shown[:, 1]).sum(-1),
        "clip_direction": F.cosine_similarity(shown[:, 1] - shown[:, 0], (said[1] - said[0])[None]),
    }


# --- The program --------------------------------------------------------------------------------------------

# Every pair of captions has a name made of its own texts, and every instruction a shard, a folder with a
# `metadata.jsonl`. So neither depends on the order of the texts or the number of processes, and a shard has
# one writer at a time.


def images(args: argparse.Namespace) -> None:
    state, device = processes(args.device)
    records = read_texts(args.out / "texts.jsonl")
    preset = backbone.preset(args.backbone)
    parts = {
        "stable_diffusion": args.stable_diffusion or preset.stable_diffusion,
        "clip": args.clip or preset.clip,
    }
    args.size = args.size or preset.picture
    names = ("size", "samples", "keep", "steps", "guidance", "injection", "cross", "seed")
    names += ("min_caption", "min_image", "min_direction")
    settings = parts | {name: getattr(args, name) for name in names}
    same_settings(args.out / "images.settings.json", settings, state)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    sd = backbone.load_stable_diffusion(parts["stable_diffusion"], device, dtype)
    clip, tokenizer = backbone.load_clip(parts["clip"], device), backbone.load_clip_tokenizer(parts["clip"])
    unit = backbone.vae_factor(sd.vae) * 2 ** (len(sd.unet.config.block_out_channels) - 1)
    if args.size % unit:
        raise ValueError(f"--size {args.size}: give a multiple of {unit}, which this U-Net can halve")
    shards = defaultdict(list)
    for record in records:
        shards[hash_of(record["instruction"])[:2]].append(record)
    mine = sorted(shards)[state.process_index :: state.num_processes]
    total = sum(len(record["pairs"]) for shard in mine for record in shards[shard])
    counts = Counter()
    with tqdm(total=total, desc="images", unit="pair") as progress:
        for shard in mine:
            ledger, folder = args.out / "ledger" / f"{shard}.jsonl", args.out / args.split / shard
            done = {line["name"]: line for line in read_lines(ledger, "name")}

            def draw(name: str, pair: list[str], done=done, ledger=ledger, folder=folder) -> None:
                done[name] = draw_and_filter(name, pair, folder, sd, clip, tokenizer, args)
                append(ledger, [done[name]])

            for record in shards[shard]:
                pairs = by_name(record)
                for name, pair in pairs.items():
                    if name not in done:
                        draw(name, pair)
                    progress.update()
                if is_enough(record, done):  # what was too thin once, or has lost a file, is drawn as it was
                    for name, pair in pairs.items():
                        if not all((folder / file).exists() for file in files_of(done[name])):
                            draw(name, pair)
            counts += finish_shard(folder, shards[shard], done)
    print(
        f"process {state.process_index}: {counts['pairs']} pairs of {counts['instructions']} instructions in "
        f"{args.out / args.split}, {counts['thin']} instructions left out that had fewer than two; of "
        f"{counts['drawn']} samples, {counts['caption']} were too far from their captions, {counts['image']} "
        f"from each other, {counts['direction']} from the edit"
    )
    state.wait_for_everyone()


def draw_and_filter(
    name: str, captions: list[str], folder: Path, sd, clip, tokenizer, args: argparse.Namespace
) -> dict:
    """Draws a pair of captions as often as asked, and saves the best that pass → its line of the ledger."""
    rng = random.Random(f"{args.seed} {name}")
    tries = [
        (rng.getrandbits(32), rng.uniform(*args.guidance), rng.uniform(*args.injection))
        for _ in range(args.samples)
    ]
    longest = max(len(sd.tokenizer(text).input_ids) for text in captions)
    if longest > sd.tokenizer.model_max_length:  # its end, where the edit often stands, would not be read
        return {"name": name, "drawn": 0, "failed": {}, "kept": []}
    found, failed = [], Counter()
    for first in range(0, len(tries), args.batch):
        seeds, guidance, injection = zip(*tries[first : first + args.batch])
        same = [captions] * len(seeds)
        pictures = draw_pairs(sd, same, seeds, [*guidance], [*injection], args.cross, args.steps, args.size)
        scores = clip_scores(clip, tokenizer, pictures, captions)
        for k, (seed, scale, own) in enumerate(zip(seeds, guidance, injection)):
            score = {key: round(value[k].item(), 4) for key, value in scores.items()}
            passed = {  # which what is no number does not
                "caption": all(score[key] >= args.min_caption for key in ("clip_before", "clip_after")),
                "image": score["clip_image"] >= args.min_image,
                "direction": score["clip_direction"] >= args.min_direction,
            }
            failed.update(reason for reason, is_so in passed.items() if not is_so)
            if all(passed.values()):
                drawn = {"seed": seed, "guidance": round(scale, 3), "injection": round(own, 3)}
                found.append((score | drawn, [tensor_to_image(picture) for picture in pictures[k]]))
    found.sort(key=lambda item: -item[0]["clip_direction"])
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for k, (scores, pictures) in enumerate(found[: args.keep]):
        files = [f"{name}_{k}_{when}.png" for when in ("before", "after")]
        for file, image in zip(files, pictures):
            atomic_write(folder / file, lambda path, image=image: image.save(path, format="PNG"))
        kept.append({"input_file_name": files[0], "output_file_name": files[1]} | scores)
    return {"name": name, "drawn": len(tries), "failed": failed, "kept": kept}


def by_name(record: dict) -> dict[str, list[str]]:
    """The pairs of captions of an instruction, each under its name."""
    return {hash_of([record["instruction"], *pair]): pair for pair in record["pairs"]}


def is_enough(record: dict, done: dict[str, dict]) -> bool:
    """Whether an instruction has an example for every query."""
    return sum(len(done[name]["kept"]) for name in by_name(record)) >= 2


def files_of(line: dict) -> list[str]:
    """The pictures of a line of the ledger."""
    return [kept[key] for kept in line["kept"] for key in ("input_file_name", "output_file_name")]


# The names that this program gives, and what a run that was killed leaves of them.
_OURS = re.compile(r"(\.\d+\.)?([0-9a-f]{12}_\d+_(before|after)\.png|metadata\.jsonl)")


def finish_shard(folder: Path, records: list[dict], done: dict[str, dict]) -> Counter[str]:
    """Lists the pairs of instructions that have enough, and removes what else this program has written."""
    counts, rows, listed = Counter(), [], set()
    for record in records:
        enough = is_enough(record, done)
        counts += Counter(instructions=1) if enough else Counter(thin=1)
        for name, (before, after) in by_name(record).items():
            line = done[name]
            counts += Counter(drawn=line["drawn"], **line["failed"])
            if enough:
                said = {
                    "instruction": record["instruction"],
                    "input_caption": before,
                    "output_caption": after,
                }
                rows += [said | kept for kept in line["kept"]]
                listed.update(files_of(line))
    counts["pairs"] = len(rows)
    if rows:
        write_lines(folder / "metadata.jsonl", rows)
        listed.add("metadata.jsonl")
    for path in folder.iterdir() if folder.exists() else ():
        if _OURS.fullmatch(path.name) and path.name not in listed:
            path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    return counts


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = stage("data_making.pictures", "pairs of captions → pairs of pictures")
    add = parser.add_argument
    add("--stable-diffusion", help="a folder or hub id (default: the preset's)")
    add("--clip", help="for the filter, an open_clip folder or hub id (default: the preset's)")
    add("--split", default="train", help="folder of the pictures, below --out")
    add("--size", type=int, help="pixels along a picture's side (default: the preset's)")
    # [ours] InstructPix2Pix's thresholds and ranges. It draws 100 samples and keeps 4 of them; but there an
    # instruction has one pair of captions, here five.
    add("--samples", type=int, default=16, help="drawn of each pair of captions")
    add("--keep", type=int, default=1, help="of them at most, by directional similarity")
    add("--steps", type=int, default=50, help="of sampling")
    add("--guidance", type=float, nargs=2, default=[7.5, 15.0], metavar=("MIN", "MAX"), help="guidance scale")
    add(
        "--injection",
        type=float,
        nargs=2,
        default=[0.1, 0.9],
        metavar=("MIN", "MAX"),
        help="part of the steps with the first picture's self-attention",
    )
    add("--cross", type=float, default=0.8, help="part of the steps with its attention to the text")
    add("--min-caption", type=float, default=0.2, help="CLIP cosine of a picture and its caption")
    add("--min-image", type=float, default=0.7, help="CLIP cosine of the two pictures")
    add("--min-direction", type=float, default=0.2, help="CLIP cosine of the two changes")
    add("--batch", type=int, default=16, help="pairs drawn at a time")
    args = parser.parse_args(argv)
    counts = {(1, math.inf): "samples keep steps batch", (1, 4096): "size"}
    backbone.check_numbers(args, counts | {(0, 1): "cross", (0, 2**62): "seed"})
    if Path(args.split).name != args.split or args.split in ("", ".."):
        raise ValueError(f"--split {args.split}: give a folder's name; it lies below --out")
    for name, top in (("guidance", 1e6), ("injection", 1)):
        low, high = getattr(args, name)
        if not 0 <= low <= high <= top:
            raise ValueError(f"--{name} {low} {high}: give two numbers, the smaller first")
    return args


def main(argv: list[str] | None = None) -> None:
    with backbone.one_line_errors("data_making.pictures"):
        images(arguments(argv))


if __name__ == "__main__":
    main()
