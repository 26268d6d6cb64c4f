"""The dataset, phase 1, step 2: pairs of captions become pairs of pictures.

    python -m data_making.pictures --out data/mine

Stable Diffusion draws both captions of a pair from the same noise with Prompt-to-Prompt
(`prompt_to_prompt.py`), so that what the edit leaves alone stays. It draws several samples, with random
guidance and strength of injection; CLIP keeps the best of those that pass InstructPix2Pix's thresholds, and
an instruction stays if two pairs or more do. The result is a dataset folder for `train.py --data`, and for
`datasets.load_dataset("imagefolder", data_dir=…)`.

Symbols: B samples drawn at a time; H, W a picture's pixels; C, h, w its latent's.
"""

import argparse
import contextlib
import json
import math
import random
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
from data_making.stage import hash_of, processes, same_settings, stage
from data_making.texts import read_texts
from disk import as_lines, atomic_folder
from pictures import tensor_to_image

# [ours] InstructPix2Pix's ranges and Prompt-to-Prompt's part of the steps.
GUIDANCE = 7.5, 15.0  # scale
INJECTION = 0.1, 0.9  # part of the steps with the first picture's self-attention
CROSS = 0.8  # part of the steps with its attention to the text
DECODED = 8  # pictures at a time: at 512 pixels the decoder needs more memory than the U-Net


@torch.no_grad()
def draw_pairs(
    sd: backbone.StableDiffusion,
    captions: list[str],
    seeds: list[int],
    guidance: list[float],
    self_share: list[float],
    cross_share: float,
    steps: int,
    size: int,
) -> Tensor:
    """Draws both captions from the same noise, B times → pictures (B, 2, 3, size, size) in [-1, 1].

    seeds, guidance: noise and guidance scale of each sample. self_share, of each sample, and cross_share: the
    first part of the steps in which self-attention and attention to the text are those of the first picture.
    With 0 and 0 the two pictures share nothing but the noise.
    """
    unet, device = sd.unet, sd.unet.device
    matrix, known = align(*captions, sd.tokenizer)
    control = PromptToPrompt(matrix.to(device), known.to(device))
    prompts = [caption for caption in captions for _ in seeds]
    text = torch.cat([backbone.encode_text(sd, [""] * len(prompts)), backbone.encode_text(sd, prompts)])
    shape = unet.config.in_channels, *[size // backbone.vae_factor(sd.vae)] * 2
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise * 2).to(device, unet.dtype)  # (2B, C, h, w)
    scale = torch.tensor(guidance * 2).to(latents)[:, None, None, None]
    share = torch.tensor(self_share, device=device)
    plain = unet.attn_processors
    unet.set_attn_processor(control)
    backbone.set_timesteps(sd.scheduler, steps, device)
    latents = latents * sd.scheduler.init_noise_sigma
    for i, t in enumerate(sd.scheduler.timesteps):
        control.replace_cross, control.replace_self = i < cross_share * steps, i < share * steps
        rows = sd.scheduler.scale_model_input(torch.cat([latents] * 2), t)
        without, told = unet(rows, t, encoder_hidden_states=text).sample.chunk(2)
        latents = sd.scheduler.step(without + scale * (told - without), t, latents).prev_sample
    unet.set_attn_processor(plain)
    decoded = torch.cat([backbone.decode_latents(sd.vae, few) for few in latents.split(DECODED)])
    return decoded.unflatten(0, (2, -1)).transpose(0, 1)


# --- CLIP's filter ------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_scores(clip: nn.Module, tokenizer: Any, pictures: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Four cosines (B,) for drawings (B, 2, 3, H, W) of a pair of captions, as InstructPix2Pix filters by: of
    each picture with its caption, of the two pictures, and of the two changes, from picture to picture and
    from caption to caption."""
    said = F.normalize(clip.encode_text(tokenizer(captions).to(pictures.device)).float(), dim=-1)
    shown = esm.embed(clip, pictures.flatten(0, 1)).unflatten(0, (-1, 2))
    return {
        "clip_before": shown[:, 0] @ said[0],
        "clip_after": shown[:, 1] @ said[1],
        "clip_image": (shown[:, 0] * shown[:, 1]).sum(-1),
        "clip_direction": F.cosine_similarity(shown[:, 1] - shown[:, 0], (said[1] - said[0])[None]),
    }


def draw_best(
    name: str, captions: list[str], sd, clip, tokenizer, args: argparse.Namespace
) -> tuple[tuple[dict, Tensor] | None, Counter[str]]:
    """Draws a pair of captions as often as asked.

    Returns the best sample that passes, as its scores and settings and its pictures (2, 3, H, W); and how
    many samples were drawn, and failed by which threshold. Captions too long for the text encoder have none.
    """
    best, counts = None, Counter()
    if backbone.cut_off(sd.tokenizer, captions):  # the end, where the edit often stands, would not be read
        return best, Counter(long=1)
    rng = random.Random(f"{args.seed} {name}")
    tries = [
        (rng.getrandbits(32), rng.uniform(*GUIDANCE), rng.uniform(*INJECTION)) for _ in range(args.samples)
    ]
    for first in range(0, len(tries), args.batch):
        seeds, guidance, injection = map(list, zip(*tries[first : first + args.batch]))
        pictures = draw_pairs(sd, captions, seeds, guidance, injection, CROSS, args.steps, args.size)
        scores = clip_scores(clip, tokenizer, pictures, captions)
        for k, (seed, scale, share) in enumerate(zip(seeds, guidance, injection)):
            if not pictures[k].isfinite().all():
                counts["finite"] += 1
                continue
            score = {key: round(value[k].item(), 4) for key, value in scores.items()}
            passed = {  # which NaN does not
                "caption": all(score[key] >= args.min_caption for key in ("clip_before", "clip_after")),
                "image": score["clip_image"] >= args.min_image,
                "direction": score["clip_direction"] >= args.min_direction,
            }
            counts.update(reason for reason, is_so in passed.items() if not is_so)
            if all(passed.values()) and (best is None or score["clip_direction"] > best[0]["clip_direction"]):
                drawn = {"seed": seed, "guidance": round(scale, 3), "injection": round(share, 3)}
                best = score | drawn, pictures[k]
    if counts["finite"] == len(tries):
        raise ValueError(f"{args.stable_diffusion}: all its pictures of {captions} are NaN or infinite")
    return best, counts + Counter(drawn=len(tries))


# --- The program --------------------------------------------------------------------------------------------

# Every instruction has a folder, whose name is made of its text, with a `metadata.jsonl` and a `report.json`.
# It is written whole or not at all. What a pair of captions looks like depends on its texts and --seed alone,
# and neither on the order of the texts nor on the number of processes.


def images(args: argparse.Namespace, held: contextlib.ExitStack) -> None:
    texts = defaultdict(list)  # instruction → pairs of captions
    for record in read_texts(args.out / "texts.jsonl"):
        there = texts[record["instruction"]]
        for pair in record["pairs"]:
            if pair not in there:
                there.append(pair)
    state, device = processes(args, held)
    preset = backbone.preset(args.backbone)
    args.stable_diffusion = args.stable_diffusion or preset.stable_diffusion
    args.clip = args.clip or preset.clip
    args.size = preset.picture
    names = "stable_diffusion clip size samples steps seed min_caption min_image min_direction"
    settings = {name: getattr(args, name) for name in names.split()}
    same_settings(args.out / "images.settings.json", settings, state)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    parts = (
        backbone.load_stable_diffusion(args.stable_diffusion, device, dtype),
        backbone.load_clip(args.clip, device),
        backbone.load_clip_tokenizer(args.clip),
    )
    known = {hash_of(instruction) for instruction in texts}
    for folder in sorted((args.out / "train").glob("[!.]*/")) if state.is_main_process else ():
        if folder.name not in known:
            print(f"{folder}: its instruction is no longer in texts.jsonl; remove it, or training reads it")
    mine = sorted(texts)[state.process_index :: state.num_processes]
    counts = Counter()
    for instruction in tqdm(mine, desc="images", unit="instruction"):
        folder = args.out / "train" / hash_of(instruction)
        counts += draw_instruction(folder, instruction, texts[instruction], *parts, args)
    print(
        f"process {state.process_index}: {counts['pairs']} pairs of {counts['instructions']} instructions in "
        f"{args.out / 'train'}, {counts['thin']} instructions left out that had fewer than two; "
        f"{counts['long']} pairs of captions too long for the text encoder; of "
        f"{counts['drawn']} samples, {counts['caption']} were too far from their captions, {counts['image']} "
        f"from each other, {counts['direction']} from the edit, {counts['finite']} not finite"
    )
    state.wait_for_everyone()


def draw_instruction(
    folder: Path, instruction: str, pairs: list[list[str]], sd, clip, tokenizer, args: argparse.Namespace
) -> Counter[str]:
    """Draws an instruction's pairs of captions into its folder, unless that is done; returns the counts."""
    report = folder / "report.json"
    if report.exists():
        there = json.loads(report.read_text("utf-8"))
        if there["pairs"] == pairs:
            return Counter(there["counts"])
    rows, pictures, counts = [], {}, Counter()
    for before, after in pairs:
        name = hash_of([instruction, before, after])
        best, found = draw_best(name, [before, after], sd, clip, tokenizer, args)
        counts += found
        if best:
            scores, drawn = best
            files = [f"{name}_{when}.png" for when in ("before", "after")]
            pictures |= zip(files, map(tensor_to_image, drawn))
            row = {"instruction": instruction, "input_caption": before, "output_caption": after}
            rows.append(row | {"input_file_name": files[0], "output_file_name": files[1]} | scores)
    enough = len(rows) >= 2  # an example for every query
    counts += Counter(instructions=1, pairs=len(rows)) if enough else Counter(thin=1)
    with atomic_folder(folder) as new:
        if enough:
            for file, picture in pictures.items():
                picture.save(new / file)
            (new / "metadata.jsonl").write_text(as_lines(rows), "utf-8")
        record = {"instruction": instruction, "pairs": pairs, "counts": counts}
        (new / "report.json").write_text(json.dumps(record, ensure_ascii=False), "utf-8")
    return counts


@backbone.one_line_errors("data_making.pictures")
def main(argv: list[str] | None = None) -> None:
    parser = stage("data_making.pictures", __doc__)
    add = parser.add_argument
    add("--stable-diffusion", help="a folder or hub id (default: the preset's)")
    add("--clip", help="for the filter, an open_clip folder or hub id (default: the preset's)")
    # [ours] InstructPix2Pix's thresholds. It draws 100 samples and keeps 4 of them; but there an instruction
    # has one pair of captions, here five.
    add("--samples", type=int, default=16, help="drawn of each pair of captions; one is kept at most")
    add("--steps", type=int, default=50, help="of sampling")
    add("--min-caption", type=float, default=0.2, help="CLIP cosine of a picture and its caption")
    add("--min-image", type=float, default=0.7, help="CLIP cosine of the two pictures")
    add("--min-direction", type=float, default=0.2, help="CLIP cosine of the two changes")
    add("--batch", type=int, default=16, help="samples drawn at a time")
    args = parser.parse_args(argv)
    backbone.check_numbers(args, {(1, math.inf): "samples steps batch", (0, 2**62): "seed"})
    with contextlib.ExitStack() as held:
        images(args, held)


if __name__ == "__main__":
    main()
