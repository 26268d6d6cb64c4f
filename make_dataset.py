"""Contribution 5, phase 1: the Visual Prompt Dataset, made from captions.

InstructPix2Pix's generator makes edit pairs that share no instruction. Learning from an example needs several
pairs of one, so here the language model also writes further captions under the instruction that it has found.
The steps are those of the paper's dataset figure, phase 1:

    python make_dataset.py texts  --seeds captions.txt --out data/mine   # I0 → E0, O0 and (I1,O1) … (I4,O4)
    python make_dataset.py images --out data/mine                        # each (Ik,Ok) → pairs of pictures
    python make_dataset.py check  data/mine                              # what has come of it

`texts`. From a seed caption a causal language model writes an instruction, the edited caption, and four
caption pairs more for which the instruction holds too. What does not parse strictly is refused, and counted.
`--finetune FILE` first teaches the model on examples that people wrote, as the paper did with GPT-3.

`images`. Stable Diffusion draws both captions of a pair from the same noise with Prompt-to-Prompt
(`prompt_to_prompt.py`), so that what the edit leaves alone stays. It draws several samples, with random
guidance and strength of injection; CLIP keeps the best of those that pass InstructPix2Pix's thresholds, and
an instruction stays if two pairs or more do.

`check`. Counts, scores, a contact sheet; duplicates, broken files, pairs whose pictures do not show one
frame, instructions that are too thin.

Stopped at any moment and started again, each goes on: what is finished is neither lost nor made twice. On
several GPUs and machines: `accelerate launch make_dataset.py images …`. The result is a dataset folder for
`train.py --data`, and for `datasets.load_dataset("imagefolder", data_dir=…)`.

Symbols: B pairs drawn at a time; H, W a picture's pixels; C, h, w its latent's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

import backbone
import esm
from checkpoint import load_checkpoint, other_settings, save_checkpoint, whole_folder, write_whole
from dataset import COLUMNS, ImageError, load_image, misfit, read_pairs, tensor_to_image
from prompt_to_prompt import PromptToPrompt, align

# --- Texts: the form of what the language model writes ------------------------------------------------------

# Choice: the paper gives no prompt. One form of lines serves base models, chat models, and people who correct
# the file by hand; examples teach it better than rules do.
RULES = (
    "From the caption of a picture, invent an edit that a person might ask for. Write the instruction, and "
    "the caption of the edited picture, which keeps every word that the edit leaves true. Then write four "
    "captions of quite other pictures for which the same instruction makes sense, each with its edited "
    "caption. Keep to the form of the examples."
)
EXAMPLES = (
    {
        "instruction": "make it night",
        "pairs": [
            ["a fishing boat in a small harbour", "a fishing boat in a small harbour at night"],
            ["a street market in Hanoi", "a street market in Hanoi at night"],
            ["two horses on a hill", "two horses on a hill at night"],
            ["a railway bridge over a wide river", "a railway bridge over a wide river at night"],
            ["a farmhouse behind a wall of poplars", "a farmhouse behind a wall of poplars at night"],
        ],
    },
    {
        "instruction": "swap the bicycle for a motorbike",
        "pairs": [
            ["an old man beside a bicycle", "an old man beside a motorbike"],
            ["a bicycle in front of a bakery", "a motorbike in front of a bakery"],
            ["a red bicycle on a country road", "a red motorbike on a country road"],
            ["oil painting of a bicycle in the rain", "oil painting of a motorbike in the rain"],
            ["a woman waiting with her bicycle", "a woman waiting with her motorbike"],
        ],
    },
    {
        "instruction": "could the animal wear a knitted scarf?",
        "pairs": [
            ["a penguin on an ice floe", "a penguin in a knitted scarf on an ice floe"],
            ["portrait of a greyhound", "portrait of a greyhound in a knitted scarf"],
            ["a cat asleep on a windowsill", "a cat in a knitted scarf asleep on a windowsill"],
            ["a donkey looking over a fence", "a donkey in a knitted scarf looking over a fence"],
            ["a fox between birch trees", "a fox in a knitted scarf between birch trees"],
        ],
    },
)
# The chat template of a model that was trained for this one task: it needs neither rules nor examples.
OWN_TASK = "{{ messages[-1]['content'] }}"


def as_prompt(caption: str) -> str:
    return f"Caption: {caption}\n"


def as_reply(record: dict) -> str:
    """What the model is to write after the first caption of `record`, which is as a line of texts.jsonl:
    {"instruction": E0, "pairs": [[I0, O0], [I1, O1], …]}."""
    (_, edited), *more = record["pairs"]
    further = "".join(f"Caption: {before}\nEdited: {after}\n" for before, after in more)
    return f"Instruction: {record['instruction']}\nEdited: {edited}\n{further}"


class Refusal(ValueError):
    """A reply that is no use. The message says why, in the same words for all of its kind."""


LONGEST = 30, 60  # words of an instruction, of a caption
LONGEST_REPLY = 448  # tokens


def parse_reply(caption: str, reply: str, further: int = 4) -> dict:
    """The record that a reply writes for its caption; of too many further pairs the first. Raises Refusal."""
    lines = reply.split("\n")[:-1]  # each line ends with a newline: behind the last is what was cut off
    labels = chain(("Instruction: ", "Edited: "), cycle(("Caption: ", "Edited: ")))
    texts = []
    for line, label in zip(lines[: 2 + 2 * further], labels):
        if not line.startswith(label):
            raise Refusal("it is not in the form of the examples")
        texts.append(" ".join(line.removeprefix(label).split()))
    if len(texts) < 2 + 2 * further:
        raise Refusal(f"it has fewer than {further} further pairs")
    instruction, *captions = texts[0], caption, *texts[1:]
    pairs = [list(pair) for pair in zip(captions[::2], captions[1::2])]
    if not all(texts):
        raise Refusal("a text of it is empty")
    if len(instruction.split()) > LONGEST[0] or any(len(text.split()) > LONGEST[1] for text in captions):
        raise Refusal("a text of it is too long")
    if any(_plain(before) == _plain(after) for before, after in pairs):
        raise Refusal("an edited caption says what the caption says")
    if len({_plain(before) for before, _ in pairs}) < len(pairs):
        raise Refusal("a caption occurs twice")
    return {"instruction": instruction, "pairs": pairs}


def _plain(text: str) -> str:
    return text.strip(" .!?").lower()


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Where each line of a file is, `path:number`, and its bytes, but for blank ones. Raises OSError, and
    ValueError for a device or a pipe, which may have no end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield f"{path}:{number}", line


def read_texts(path: Path) -> list[dict]:
    """The lines of texts.jsonl, or of a file of examples. Raises ValueError, which names the line."""
    records = []
    for where, line in lines_of(path):
        try:
            match json.loads(line):
                case {"instruction": str(instruction), "pairs": [[str(_), str(_)], *_] as pairs}:
                    if not all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in pairs):
                        raise ValueError
                    records.append({"instruction": instruction, "pairs": pairs})
                case _:
                    raise ValueError
        except ValueError:
            form = '{"instruction": "…", "pairs": [["caption", "edited caption"], …]}'
            raise ValueError(f"{where}: not an object of the form {form}") from None
    if not records:
        raise ValueError(f"{path}: is empty")
    return records


# --- Texts: the language model ------------------------------------------------------------------------------


@torch.no_grad()
def write_replies(model: nn.Module, tokenizer: Any, captions: list[str], temperature: float) -> list[str]:
    """A reply to each caption, sampled by the global random numbers."""
    shown = [text for record in EXAMPLES for text in (as_prompt(record["pairs"][0][0]), as_reply(record))]
    if tokenizer.chat_template:
        chats = []
        for caption in captions:
            said = [f"{RULES}\n\n{shown[0]}", *shown[1:], as_prompt(caption)]  # some templates know no rules
            roles = zip(cycle(("user", "assistant")), said)
            chats.append([{"role": role, "content": text} for role, text in roles])
        inputs = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            enable_thinking=False,  # for the templates of reasoning models; the others ignore it
            padding=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "left"},
        )
    else:
        before = f"{RULES}\n\n" + "".join(
            f"{prompt}{reply}\n" for prompt, reply in zip(shown[::2], shown[1::2])
        )
        prompts = [before + as_prompt(caption) for caption in captions]
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask = (inputs[key].to(model.device) for key in ("input_ids", "attention_mask"))
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "num_beams": 1}
    sampling |= {"repetition_penalty": 1.0, "max_new_tokens": LONGEST_REPLY}
    pad = tokenizer.pad_token_id
    output = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **sampling)[
        :, ids.shape[1] :
    ]
    ends = torch.tensor([pad, *_list(model.generation_config.eos_token_id)], device=output.device)
    cut = ~torch.isin(output[:, -1], ends) & (len(output[0]) == LONGEST_REPLY)
    replies = []
    for text, is_cut in zip(tokenizer.batch_decode(output, skip_special_tokens=True), cut):
        reply, *more = text.lstrip().split("\n\n")  # behind a blank line a base model begins another
        replies.append(reply if is_cut and not more else f"{reply.rstrip()}\n")
    return replies


def _list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def writing_loss(model: nn.Module, tokenizer: Any, records: list[dict]) -> Tensor:
    """Cross-entropy of the tokens of the replies, and of their end, to prompts without rules and examples."""
    rows = []
    for record in records:
        texts = as_prompt(record["pairs"][0][0]), as_reply(record)
        prompt, reply = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        rows.append((prompt, [*reply, tokenizer.eos_token_id]))
    length = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids, labels = torch.full((2, len(rows), length), -100)
    ids.fill_(tokenizer.eos_token_id)
    for i, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids[i, :end] = torch.tensor(prompt + reply)
        labels[i, len(prompt) : end] = torch.tensor(reply)
    return model(input_ids=ids.to(model.device), labels=labels.to(model.device)).loss


def finetune(
    model: nn.Module, tokenizer: Any, records: list[dict], folder: Path, epochs: int, lr: float, batch: int
) -> None:
    """Teaches all weights on the records, in an order of its own for each epoch, and saves `folder`.

    Choice: AdamW, a linear descent of the learning rate, no examples in the prompt, which becomes the form
    that InstructPix2Pix taught GPT-3. A checkpoint lies beside `folder` after each epoch.
    """
    model.float().train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    checkpoints = folder.with_name(f"{folder.name}-training")
    each = -(-len(records) // batch)
    start = load_checkpoint(checkpoints, {"model": model}, optimizer)
    progress = tqdm(range(start, epochs * each), initial=start, total=epochs * each, desc="finetune")
    for step in progress:
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(step // each)).tolist()
        first = step % each * batch
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / (epochs * each))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = writing_loss(model, tokenizer, [records[i] for i in order[first : first + batch]])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % each == 0:
            save_checkpoint(checkpoints, step + 1, {"model": model}, optimizer, keep=2)
    tokenizer.chat_template = OWN_TASK
    with whole_folder(folder) as new:
        model.eval().requires_grad_(False).save_pretrained(new)
        tokenizer.save_pretrained(new)


# --- Texts: the program -------------------------------------------------------------------------------------


def texts(args: argparse.Namespace) -> None:
    state, device = processes(args.device)
    seeds = read_seeds(args.seeds)
    preset = backbone.preset(args.backbone)
    source = args.llm or preset.writer
    examples = read_texts(args.finetune) if args.finetune else []
    taught = _hash(examples) if examples else None
    same_settings(args.out / "texts.settings.json", {"llm": source, "finetuned on": taught}, state)
    if examples and not (args.out / "writer").exists() and state.is_main_process:
        model, tokenizer = backbone.load_llm(source, device)
        torch.manual_seed(args.seed)
        finetune(
            model,
            tokenizer,
            examples,
            args.out / "writer",
            args.epochs,
            args.finetune_lr,
            args.finetune_batch,
        )
        del model
    state.wait_for_everyone()
    model, tokenizer = backbone.load_llm(str(args.out / "writer") if examples else source, device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for attempt in range(args.tries):
        known = read_replies(args.out)
        state.wait_for_everyone()  # so that all share out the same
        to_do = [caption for caption in seeds if _wanted(caption, known[caption], attempt, args.further)]
        mine = sorted(to_do[state.process_index :: state.num_processes], key=len)
        batches = range(0, len(mine), args.batch)
        for first in tqdm(batches, desc=f"texts, try {attempt + 1}", unit="batch", disable=not mine):
            batch = mine[first : first + args.batch]
            torch.manual_seed(int(_hash([args.seed, attempt, batch]), 16))
            replies = write_replies(model, tokenizer, batch, args.temperature)
            lines = [{"caption": text, "reply": reply} for text, reply in zip(batch, replies)]
            append(args.out / "replies" / f"{state.process_index:05d}.jsonl", lines)
        state.wait_for_everyone()
    if state.is_main_process:
        records, refused = gather_texts(seeds, read_replies(args.out), args.further)
        write_lines(args.out / "texts.jsonl", records)
        pairs = sum(len(record["pairs"]) for record in records)
        print(f"{len(seeds)} captions: {len(records)} instructions with {pairs} pairs of captions")
        for reason, count in refused.most_common():
            print(f"refused {count:5} replies: {reason}")
    state.wait_for_everyone()


def read_seeds(path: Path) -> list[str]:
    """The captions of a text file, one a line, each once. Raises ValueError."""
    try:
        lines = [line.decode() for _, line in lines_of(path)]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; give a text file, one caption a line") from None
    captions = list(dict.fromkeys(filter(None, (" ".join(line.split()) for line in lines))))
    if not captions:
        raise ValueError(f"{path}: no captions; give a text file, one caption a line")
    return captions


def read_replies(out: Path) -> dict[str, list[str]]:
    """All replies to each caption, of all processes that ever wrote."""
    replies = defaultdict(list)
    for path in sorted((out / "replies").glob("*.jsonl")):
        for line in read_lines(path, "caption", "reply"):
            replies[line["caption"]].append(line["reply"])
    return replies


def _accepted(caption: str, replies: list[str], further: int, refused: Counter) -> dict | None:
    for reply in replies:
        try:
            return parse_reply(caption, reply, further)
        except Refusal as reason:
            refused[str(reason)] += 1
    return None


def _wanted(caption: str, replies: list[str], attempt: int, further: int) -> bool:
    """Whether the caption waits for its reply number `attempt`, having none that will do."""
    return len(replies) <= attempt and _accepted(caption, replies, further, Counter()) is None


def gather_texts(
    seeds: list[str], replies: dict[str, list[str]], further: int
) -> tuple[list[dict], Counter[str]]:
    """The first usable reply to each caption, an instruction once; and how many were refused, by reason."""
    records, refused = {}, Counter()
    for caption in seeds:
        record = _accepted(caption, replies[caption], further, refused)
        if record and _plain(record["instruction"]) in records:
            refused["its instruction is there already"] += 1
        elif record:
            records[_plain(record["instruction"])] = record
    return list(records.values()), refused


# --- Images: two pictures from one noise --------------------------------------------------------------------


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


# --- Images: CLIP's filter ----------------------------------------------------------------------------------


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


# --- Images: the program ------------------------------------------------------------------------------------

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
        shards[_hash(record["instruction"])[:2]].append(record)
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
    for k, (facts, pictures) in enumerate(found[: args.keep]):
        files = [f"{name}_{k}_{when}.png" for when in ("before", "after")]
        for file, image in zip(files, pictures):
            write_whole(folder / file, lambda path, image=image: image.save(path, format="PNG"))
        kept.append({"input_file_name": files[0], "output_file_name": files[1]} | facts)
    return {"name": name, "drawn": len(tries), "failed": failed, "kept": kept}


def by_name(record: dict) -> dict[str, list[str]]:
    """The pairs of captions of an instruction, each under its name."""
    return {_hash([record["instruction"], *pair]): pair for pair in record["pairs"]}


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


# --- What both write, so that it can be stopped at any moment -----------------------------------------------


def _as_lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """The whole file, or none of it."""
    write_whole(path, lambda file: file.write_bytes(_as_lines(rows)))


def append(path: Path, rows: Iterable[dict]) -> None:
    """In a single write, after a newline, which ends a line that a killed run has cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(b"\n" + _as_lines(rows))


def read_lines(path: Path, *texts: str) -> Iterator[dict]:
    """The whole lines that `append` has written, which have a text by each of these names."""
    for _, line in lines_of(path) if path.exists() else ():
        with contextlib.suppress(ValueError):  # cut short; it will be made again
            row = json.loads(line)
            if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in texts):
                yield row


def same_settings(path: Path, settings: dict, state: PartialState) -> None:
    """Notes the settings, or raises ValueError where work with others has begun."""
    if state.is_main_process:
        other_settings(path, settings)
        for name in (".*.settings.json", ".*.texts.jsonl"):
            for left in path.parent.glob(name):  # of a run killed just there
                left.unlink()
    state.wait_for_everyone()
    if other := other_settings(path, settings):
        now = ", ".join(f"{name} {there}, now {mine}" for name, (there, mine) in other.items())
        raise ValueError(f"{path.parent} has been begun with other settings ({now}); give another --out")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:12]


def processes(name: str) -> tuple[PartialState, torch.device]:
    """Which of how many processes this one is, and its device."""
    device = backbone.pick_device(name)
    state = PartialState(cpu=device.type == "cpu", timeout=backbone.PATIENCE)
    return state, state.device if state.num_processes > 1 and device.type != "cpu" else device


# --- Check --------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Prints what a split holds; exits with 1 where something should be mended."""
    pairs = read_pairs(args.data, args.split, args.columns)
    read = {str(file) for pair in pairs for file in (pair.input, pair.output)}
    if args.sheet and os.path.realpath(args.sheet) in read:
        raise ValueError(f"--sheet {args.sheet}: would overwrite a picture that is read")
    with ThreadPoolExecutor() as pool:
        looks = pool.map(_look, pairs)
        looks = list(tqdm(looks, total=len(pairs), desc="check", unit="pair", mininterval=1))
    groups, seen, sizes = defaultdict(list), {}, Counter()
    broken, misfits, unchanged, twice = [], [], [], []
    for pair, look in zip(pairs, looks):
        if isinstance(look, ImageError):
            broken.append(str(look))
            continue
        size, before, after, reason = look
        sizes[size] += 1
        if reason:
            misfits.append(f"{pair.output}: {reason}")
        elif before == after:
            unchanged.append(f"{pair.output}: the same picture as {pair.input}")
        elif (before, after) in seen:
            twice.append(f"{pair.input}, {pair.output}: the same pictures as {seen[before, after]}")
        else:
            seen[before, after] = pair.input
            groups[pair.instruction].append(pair)
    counts = [len(group) for group in groups.values()]
    thin = [text for text, group in groups.items() if len(group) < args.thin]
    thin += [text for text in dict.fromkeys(pair.instruction for pair in pairs) if text not in groups]
    print(f"pairs                  {len(pairs):8}")
    print(f"instructions           {len({pair.instruction for pair in pairs}):8}")
    if counts:
        print(f"good pairs of each     {min(counts):8} to {max(counts)}, median {median(counts):g}")
    print("sizes                  " + ", ".join(f"{w} × {h} ({n})" for (w, h), n in sizes.most_common(5)))
    for key in ("clip_before", "clip_after", "clip_image", "clip_direction"):
        values = [pair.extra[key] for pair in pairs if isinstance(pair.extra.get(key), float)]
        if values:
            print(f"{key:22} {fmean(values):8.3f} in the mean, {min(values):.3f} to {max(values):.3f}")
    faults = {"broken files": broken, "pairs of two frames": misfits}
    faults |= {"pairs without a change": unchanged, "pairs there twice": twice}
    faults[f"instructions of fewer than {args.thin} good pairs"] = thin
    for name, which in faults.items():
        print(f"{name}: {len(which)}")
        for line in which[:20]:
            print(f"    {line}")
        if len(which) > 20:
            print(f"    and {len(which) - 20} more")
    if args.sheet and groups:
        draw_sheet(groups, args.sheet)
    if any(faults.values()):
        sys.exit(1)


def _look(pair) -> tuple[tuple[int, int], str, str, str] | ImageError:
    """Size and digests of the pixels of a pair of pictures, and why they are no pair, or ""."""
    try:
        pictures = [load_image(source) for source in (pair.input, pair.output)]
    except ImageError as error:
        return error
    before, after = (hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures)
    return pictures[0].size, before, after, misfit(*pictures)


def draw_sheet(groups: dict[str, list], path: Path, side: int = 96, most: int = 60) -> None:
    """The first two good pairs of each of the first instructions, a row of four panels."""
    from evaluate import panel_rows  # here, because it takes seconds to import

    rows = []
    for instruction, group in list(groups.items())[:most]:
        files = [file for pair in group[:2] for file in (pair.input, pair.output)]
        rows.append((instruction, [load_image(file) for file in files]))
    sheet = panel_rows(rows, ("before", "after", "before", "after"), side, min(3, len(rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: sheet.save(file, format="PNG"))
    print(f"contact sheet: {path}")


# --- The program --------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    show = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Make a dataset of edit pairs that share instructions.")
    stages = parser.add_subparsers(dest="stage", required=True)

    stage = stages.add_parser(
        "texts", help="captions → instructions and pairs of captions", formatter_class=show
    )
    add = stage.add_argument
    add("--seeds", type=Path, required=True, help="a text file, one caption a line")
    add("--llm", help="causal language model: a folder or hub id (default: the preset's)")
    add(
        "--further", type=int, default=4, help="pairs of captions that an instruction needs beside the seed's"
    )
    add("--tries", type=int, default=4, help="replies to a caption until one will do")
    add("--temperature", type=float, default=0.7)
    add("--batch", type=int, default=16, help="captions at a time")
    add(
        "--finetune",
        type=Path,
        help="examples by people, of the form of texts.jsonl, to teach the model first",
    )
    add("--epochs", type=int, default=4, help="of finetuning")
    add("--finetune-lr", type=float, default=1e-5)
    add("--finetune-batch", type=int, default=8)

    stage = stages.add_parser("images", help="pairs of captions → pairs of pictures", formatter_class=show)
    add = stage.add_argument
    add("--stable-diffusion", help="a folder or hub id (default: the preset's)")
    add("--clip", help="for the filter, an open_clip folder or hub id (default: the preset's)")
    add("--split", default="train", help="folder of the pictures, below --out")
    add("--size", type=int, help="pixels along a picture's side (default: the preset's)")
    # Choice: InstructPix2Pix's thresholds and ranges. It draws 100 samples and keeps 4 of them; but there an
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

    for stage in stages.choices.values():
        add = stage.add_argument
        add("--out", type=Path, required=True, help="the dataset's folder")
        add("--backbone", default="toy", help=f"whose parts to take: {', '.join(backbone.PRESETS)}")
        add("--seed", type=int, default=0)
        add("--device", default="auto", help="auto, cpu, cuda or mps")

    stage = stages.add_parser("check", help="what a dataset holds, and what to mend", formatter_class=show)
    add = stage.add_argument
    add("data", help="a dataset's folder")
    add("--split", default="train")
    add("--columns", **COLUMNS)
    add("--thin", type=int, default=2, help="an instruction of fewer good pairs is too thin")
    add("--sheet", type=Path, help="write a contact sheet, PNG")
    args = parser.parse_args(argv)
    counts = "further tries batch epochs finetune_batch samples keep steps thin"
    bounds = {(1, math.inf): counts, (1e-6, math.inf): "temperature", (0, 1): "cross finetune_lr"}
    backbone.check_numbers(args, bounds | {(1, 4096): "size", (0, 2**62): "seed"})
    if args.stage == "images":
        if Path(args.split).name != args.split or args.split in ("", ".."):
            raise ValueError(f"--split {args.split}: give a folder's name; it lies below --out")
        for name, top in (("guidance", 1e6), ("injection", 1)):
            low, high = getattr(args, name)
            if not 0 <= low <= high <= top:
                raise ValueError(f"--{name} {low} {high}: give two numbers, the smaller first")
    if args.stage == "check" and args.sheet and args.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet {args.sheet}: give a name that ends in .png")
    return args


def main(argv: list[str] | None = None) -> None:
    with backbone.one_line_errors("make_dataset.py"):
        args = arguments(argv)
        {"texts": texts, "images": images, "check": check}[args.stage](args)


if __name__ == "__main__":
    main()
