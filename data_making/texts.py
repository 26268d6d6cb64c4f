"""Contribution 5, phase 1, step 1: a language model writes instructions and pairs of captions.

InstructPix2Pix's generator makes edit pairs that share no instruction. Learning from an example needs several
pairs of one, so here the language model also writes further captions under the instruction that it has found.
The three programs of this folder are the steps of the paper's dataset figure, phase 1:

    python -m data_making.texts    --seeds captions.txt --out data/mine   # I0 → E0, O0 and (I1,O1) … (I4,O4)
    python -m data_making.pictures --out data/mine                        # each (Ik,Ok) → pairs of pictures
    python -m data_making.check    data/mine                              # counts, scores, faults

From a seed caption a causal language model writes an instruction, the edited caption, and four caption pairs
more for which the instruction holds too. What does not parse strictly is refused, and counted.
`--finetune FILE` first teaches the model on examples that people wrote, as the paper did with GPT-3.

Stopped at any moment and started again, `texts` and `pictures` go on: what is finished is neither lost nor
made twice. They share the work among GPUs and machines: `accelerate launch -m data_making.pictures …`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

import backbone
from disk import atomic_folder, atomic_write, other_settings
from training.loop import fit

# --- The form of what the language model writes -------------------------------------------------------------

# [ours] The paper gives no prompt. One form of lines serves base models, chat models, and people who correct
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
        except (ValueError, RecursionError):
            form = '{"instruction": "…", "pairs": [["caption", "edited caption"], …]}'
            raise ValueError(f"{where}: not an object of the form {form}") from None
    if not records:
        raise ValueError(f"{path}: is empty")
    return records


# --- The language model -------------------------------------------------------------------------------------


@torch.no_grad()
def write_replies(model: nn.Module, tokenizer: Any, captions: list[str], temperature: float) -> list[str]:
    """A reply to each caption, sampled by the global random numbers."""
    shown = [text for record in EXAMPLES for text in (as_prompt(record["pairs"][0][0]), as_reply(record))]
    if tokenizer.chat_template:
        chats = []
        for caption in captions:
            # The rules stand in the first turn: some templates know no system role.
            said = [f"{RULES}\n\n{shown[0]}", *shown[1:], as_prompt(caption)]
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

    [ours] AdamW, a cosine descent of the learning rate, no examples in the prompt, which becomes the form
    that InstructPix2Pix taught GPT-3. Checkpoints lie beside `folder`.
    """
    model.float().requires_grad_(True)
    each = -(-len(records) // batch)  # steps of an epoch

    def losses_of(steps: range) -> Iterator[dict[str, torch.Tensor]]:
        for epoch, k in (divmod(step, each) for step in steps):
            order = torch.randperm(len(records), generator=torch.Generator().manual_seed(epoch)).tolist()
            chosen = [records[i] for i in order[k * batch : (k + 1) * batch]]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                loss = writing_loss(model, tokenizer, chosen)
            yield {"loss": loss}

    checkpoints = folder.with_name(f"{folder.name}-training")
    fit("finetune", model, losses_of, checkpoints, steps=epochs * each, lr=lr, ema_decay=0, warmup=1)
    tokenizer.chat_template = OWN_TASK
    with atomic_folder(folder) as new:
        model.eval().requires_grad_(False).save_pretrained(new)
        tokenizer.save_pretrained(new)


# --- What this stage and the next write: it can be stopped at any moment ------------------------------------


def _as_lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """The whole file, or none of it."""
    atomic_write(path, lambda file: file.write_bytes(_as_lines(rows)))


def append(path: Path, rows: Iterable[dict]) -> None:
    """In a single write, after a newline, which ends a line that a killed run has cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(b"\n" + _as_lines(rows))


def read_lines(path: Path, *texts: str) -> Iterator[dict]:
    """The whole lines that `append` has written, which have a text by each of these names."""
    for _, line in lines_of(path) if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):  # cut short; it will be made again
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


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:12]


def processes(name: str) -> tuple[PartialState, torch.device]:
    """Which of how many processes this one is, and its device."""
    device = backbone.pick_device(name)
    state = PartialState(cpu=device.type == "cpu", timeout=backbone.PATIENCE)
    atexit.register(state.destroy_process_group)  # its threads may abort a process that ends before them
    return state, state.device if state.num_processes > 1 and device.type != "cpu" else device


# --- The program --------------------------------------------------------------------------------------------


def texts(args: argparse.Namespace) -> None:
    state, device = processes(args.device)
    seeds = read_seeds(args.seeds)
    preset = backbone.preset(args.backbone)
    source = args.llm or preset.writer
    examples = read_texts(args.finetune) if args.finetune else []
    taught = hash_of(examples) if examples else None
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
            torch.manual_seed(int(hash_of([args.seed, attempt, batch]), 16))
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


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = stage("data_making.texts", "captions → instructions and pairs of captions")
    add = parser.add_argument
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
        help="examples by people, in the form of texts.jsonl, to teach the model first",
    )
    add("--epochs", type=int, default=4, help="of finetuning")
    add("--finetune-lr", type=float, default=1e-5)
    add("--finetune-batch", type=int, default=8)
    args = parser.parse_args(argv)
    bounds = {(1, math.inf): "further tries batch epochs finetune_batch", (1e-6, math.inf): "temperature"}
    backbone.check_numbers(args, bounds | {(0, 1): "finetune_lr", (0, 2**62): "seed"})
    return args


def stage(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that both stages have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the dataset's folder")
    add("--backbone", default="toy", help=f"whose parts to take: {', '.join(backbone.PRESETS)}")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def main(argv: list[str] | None = None) -> None:
    with backbone.one_line_errors("data_making.texts"):
        texts(arguments(argv))


if __name__ == "__main__":
    main()
