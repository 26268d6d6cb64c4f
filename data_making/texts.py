"""The dataset, phase 1, step 1: a language model writes instructions and pairs of captions.

InstructPix2Pix's generator makes edit pairs that share no instruction. Learning from an example needs several
pairs of one, so here the language model also writes further captions under the instruction that it has found.
Two programs make phase 1 of the paper's dataset figure, and a third looks at the result [ours]:

    python -m data_making.texts    --seeds captions.txt --out data/mine   # I0 → E0, O0 and (I1,O1) … (I4,O4)
    python -m data_making.pictures --out data/mine                        # each (Ik,Ok) → pairs of pictures
    python -m data_making.check    data/mine                              # counts, scores, faults

From a seed caption a causal language model writes an instruction, the edited caption, and four caption pairs
more for which the instruction holds too. What does not parse strictly is refused, and counted.
`--finetune FILE` first teaches the model on examples that people wrote, as the paper did with GPT-3.

Stopped at any moment and started again, `texts` and `pictures` go on: what is finished is neither lost nor
made twice. They share the work among GPUs and machines: `accelerate launch -m data_making.pictures …`.
"""

import argparse
import contextlib
import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, cycle, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import backbone
from data_making.stage import hash_of, processes, same_settings, stage
from disk import as_lines, atomic_folder, write_text
from training.draws import draw_order
from training.loop import fit

# --- The form of what the language model writes -------------------------------------------------------------

# [ours] The paper gives no prompt. One form of lines serves base models, chat models, and people who correct
# the file by hand; examples teach it better than rules do. They are those of examples.jsonl.
RULES = (
    "From the caption of a picture, invent an edit that a person might ask for. Write the instruction, and "
    "the caption of the edited picture, which keeps every word that the edit leaves true. Then write four "
    "captions of quite other pictures for which the same instruction makes sense, each with its edited "
    "caption. Keep to the form of the examples."
)
# The chat template of a model that was trained for this one task: it needs neither rules nor examples.
OWN_TASK = "{{ messages[-1]['content'] }}"
# That of a base model, which goes on with one text; a blank line ends each example.
ONE_TEXT = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
)


def read_texts(path: Path) -> list[dict]:
    """The lines of texts.jsonl, or of a file of examples. Raises ValueError, which names the line."""
    records = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            instruction, pairs = record["instruction"], record["pairs"]
            if not pairs or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                raise ValueError
            if not all(isinstance(text, str) and text.strip() for text in (instruction, *chain(*pairs))):
                raise ValueError
            records.append({"instruction": instruction, "pairs": pairs})
        except (ValueError, TypeError, KeyError):
            form = '{"instruction": "…", "pairs": [["caption", "edited caption"], …]}'
            raise ValueError(f"{path}:{number}: not an object of the form {form}") from None
    if not records:
        raise ValueError(f"{path}: is empty")
    return records


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save it as UTF-8") from None


EXAMPLES = read_texts(Path(__file__).with_name("examples.jsonl"))


def as_prompt(caption: str) -> str:
    return f"Caption: {caption}\n"


def as_reply(record: dict) -> str:
    """The reply that the model should write for `record`, a line of texts.jsonl:
    {"instruction": E0, "pairs": [[I0, O0], [I1, O1], …]}."""
    (_, edited), *more = record["pairs"]
    further = "".join(f"Caption: {before}\nEdited: {after}\n" for before, after in more)
    return f"Instruction: {record['instruction']}\nEdited: {edited}\n{further}"


class Refusal(ValueError):
    """A reply that is no use. The message says why, in the same words for all of its kind."""


FURTHER = 4  # [figure] pairs of captions beside the seed's
LONGEST = 30, 60  # words of an instruction, of a caption
LONGEST_REPLY = 448  # tokens


def parse_reply(caption: str, reply: str) -> dict:
    """The record that a reply writes for its caption; of too many further pairs the first. Raises Refusal."""
    labels = ["Instruction", "Edited"] + ["Caption", "Edited"] * FURTHER
    texts = []
    for label, line in zip(labels, reply.splitlines()):
        if not line.startswith(f"{label}: "):
            raise Refusal("it is not in the form of the examples")
        texts.append(" ".join(line.removeprefix(f"{label}: ").split()))
    if len(texts) < len(labels):
        raise Refusal(f"it has fewer than {FURTHER} further pairs")
    if not all(texts):
        raise Refusal("a text of it is empty")
    instruction, *captions = texts[0], caption, *texts[1:]
    if len(instruction.split()) > LONGEST[0] or any(len(text.split()) > LONGEST[1] for text in captions):
        raise Refusal("a text of it is too long")
    pairs = [list(pair) for pair in zip(captions[::2], captions[1::2])]
    if any(_plain(before) == _plain(after) for before, after in pairs):
        raise Refusal("an edited caption says what the caption says")
    if len({_plain(before) for before, _ in pairs}) < len(pairs):
        raise Refusal("a caption occurs twice")
    return {"instruction": instruction, "pairs": pairs}


def _plain(text: str) -> str:
    return text.strip(" .!?").lower()


# --- The language model -------------------------------------------------------------------------------------


@torch.no_grad()
def write_replies(model: nn.Module, tokenizer: Any, captions: list[str]) -> list[str]:
    """A reply to each caption, sampled by the global random numbers."""
    shown = [text for record in EXAMPLES for text in (as_prompt(record["pairs"][0][0]), as_reply(record))]
    chats = []
    for caption in captions:
        # The rules stand in the first turn: some templates know no system role.
        said = [f"{RULES}\n\n{shown[0]}", *shown[1:], as_prompt(caption)]
        roles = zip(cycle(("user", "assistant")), said)
        chats.append([{"role": role, "content": text} for role, text in roles])
    inputs = tokenizer.apply_chat_template(
        chats,
        chat_template=tokenizer.chat_template or ONE_TEXT,
        add_generation_prompt=True,
        enable_thinking=False,  # for the templates of reasoning models; the others ignore it
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    ids, mask = (inputs[key].to(model.device) for key in ("input_ids", "attention_mask"))
    # InstructPix2Pix's temperature; the rest undoes what a model's own generation_config.json may say.
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "num_beams": 1}
    sampling |= {"repetition_penalty": 1.0, "max_new_tokens": LONGEST_REPLY}
    pad = tokenizer.pad_token_id
    output = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **sampling)
    output = output[:, ids.shape[1] :]
    ended = torch.isin(output[:, -1], torch.tensor(tokenizer.all_special_ids, device=output.device))
    ended |= output.shape[1] < LONGEST_REPLY  # all have, by whatever token their model ends a turn
    replies = []
    for text, is_whole in zip(tokenizer.batch_decode(output, skip_special_tokens=True), ended):
        reply, *more = text.lstrip().split("\n\n")  # behind a blank line a base model begins another
        # A reply of the greatest length was cut anywhere in its last line.
        replies.append(reply.rstrip() if is_whole or more else reply.rpartition("\n")[0])
    return replies


def writing_loss(model: nn.Module, tokenizer: Any, records: list[dict]) -> Tensor:
    """Cross-entropy of the tokens of the replies, and of their end, to prompts without rules and examples."""
    texts = [(as_prompt(record["pairs"][0][0]), as_reply(record)) for record in records]
    rows = [[tokenizer(text, add_special_tokens=False).input_ids for text in pair] for pair in texts]
    return reply_loss(model, tokenizer, rows)


def reply_loss(model: nn.Module, tokenizer: Any, rows: Iterable[tuple[list[int], list[int]]]) -> Tensor:
    """Cross-entropy of replies and of their end. rows: the tokens of each prompt and of its reply."""
    rows = [(prompt, [*reply, tokenizer.eos_token_id]) for prompt, reply in rows]
    ids = [torch.tensor(prompt + reply) for prompt, reply in rows]
    labels = [torch.tensor([-100] * len(prompt) + reply) for prompt, reply in rows]
    ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.eos_token_id).to(model.device)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(model.device)
    return model(input_ids=ids, labels=labels).loss


def finetune(
    model: nn.Module, tokenizer: Any, records: list[dict], folder: Path, epochs=4, lr=1e-5, batch=8
) -> None:
    """Teaches all weights on the records and saves `folder`.

    [ours] AdamW, a cosine descent of the learning rate, no examples in the prompt, which becomes the form
    that InstructPix2Pix taught GPT-3. Checkpoints, of three times the model's size in float32, lie beside
    `folder` until it is there.
    """
    model.float().requires_grad_(True)

    def losses_of(steps: range) -> Iterator[dict[str, Tensor]]:
        order = draw_order(len(records), batch, 0, steps, 0, 1)
        for step, chosen in zip(steps, order):
            torch.manual_seed(step)  # of dropout, where the model has some
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                loss = writing_loss(model, tokenizer, [records[i] for _, i in chosen])
            yield {"loss": loss}  # outside: its gradient is not computed under autocast

    checkpoints, steps = folder.with_name(f"{folder.name}-training"), math.ceil(epochs * len(records) / batch)
    fit("finetune", model, losses_of, checkpoints, steps=steps, lr=lr, ema_decay=0, warmup=1)
    tokenizer.chat_template = OWN_TASK
    with atomic_folder(folder) as new:
        model.eval().requires_grad_(False).save_pretrained(new)
        tokenizer.save_pretrained(new)
    shutil.rmtree(checkpoints)


# --- The program --------------------------------------------------------------------------------------------

TRIES = 4  # replies to a caption until one will do


def texts(args: argparse.Namespace, held: contextlib.ExitStack) -> None:
    lines = _read(args.seeds).splitlines()
    lines = list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    seeds = [line for line in lines if len(line.split()) <= LONGEST[1]]
    if not seeds:
        raise ValueError(f"{args.seeds}: holds no caption of at most {LONGEST[1]} words")
    source = args.llm or backbone.preset(args.backbone).writer
    examples = read_texts(args.finetune) if args.finetune else None
    if examples and any(len(record["pairs"]) <= FURTHER for record in examples):
        raise ValueError(f"--finetune {args.finetune}: each example needs {1 + FURTHER} pairs of captions")
    state, device = processes(args, held)
    settings = {"llm": source, "finetuned on": hash_of(examples) if examples else None}
    same_settings(args.out / "texts.settings.json", settings, state)
    if examples:
        writer = args.out / "writer"
        if state.is_main_process and not writer.exists():
            finetune(*backbone.load_llm(source, device), examples, writer)
        state.wait_for_everyone()
        source = str(writer)
    model, tokenizer = backbone.load_llm(source, device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    finished = args.out / "texts.jsonl"
    lines_before = read_texts(finished) if finished.exists() and finished.stat().st_size else ()
    owners = [record["pairs"][0][0] for record in lines_before]  # they keep their instructions
    for attempt in range(TRIES):
        replies = read_replies(args.out)
        state.wait_for_everyone()  # so that all share out the same
        records, _ = usable(replies, owners)
        to_do = [text for text in seeds if text not in records and len(replies[text]) <= attempt]
        mine = sorted(to_do[state.process_index :: state.num_processes], key=len)
        batches = range(0, len(mine), args.batch)
        for first in tqdm(batches, desc=f"texts, try {attempt + 1}", unit="batch", disable=not mine):
            batch = mine[first : first + args.batch]
            torch.manual_seed(int(hash_of([args.seed, attempt, batch]), 16))
            rows = zip(batch, write_replies(model, tokenizer, batch))
            rows = as_lines({"caption": caption, "reply": reply} for caption, reply in rows)
            file = args.out / "replies" / f"{state.process_index:05d}.jsonl"
            file.parent.mkdir(exist_ok=True)
            with open(file, "a", encoding="utf-8") as log:
                log.write(f"\n{rows}")  # a newline ends the line that a killed run has cut short
        state.wait_for_everyone()
    if state.is_main_process:
        replies = read_replies(args.out)  # of earlier seeds, too
        records, refused = usable(replies, owners)
        write_text(finished, as_lines(records.values()))
        pairs = sum(len(record["pairs"]) for record in records.values())
        print(f"{len(replies)} captions: {len(records)} instructions with {pairs} pairs of captions")
        if longer := len(lines) - len(seeds):
            print(f"left out {longer} captions of more than {LONGEST[1]} words")
        for reason, count in refused.most_common():
            print(f"refused {count:5} replies: {reason}")
    state.wait_for_everyone()


def read_replies(out: Path) -> dict[str, list[str]]:
    """All replies to each caption, of all processes that ever wrote."""
    replies = defaultdict(list)
    for path in sorted((out / "replies").glob("*.jsonl")):
        for line in path.read_text("utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:  # blank, or cut short; that reply will be made again
                continue
            replies[row["caption"]].append(row["reply"])
    return replies


def usable(replies: dict[str, list[str]], owners: Iterable[str] = ()) -> tuple[dict[str, dict], Counter[str]]:
    """caption → the record of its first usable reply; and how many were refused, by reason.

    [ours] Each instruction counts once, so that a common one does not outweigh the others. The captions of
    `owners` choose first, then all others, by their first replies before their second.
    """
    first = [(caption, reply) for caption in owners for reply in replies.get(caption, ())]
    rounds = zip_longest(*replies.values())
    others = (
        (caption, reply) for tries in rounds for caption, reply in zip(replies, tries) if reply is not None
    )
    records, refused, taken = {}, Counter(), set()
    for caption, reply in chain(first, others):
        if caption in records:
            continue
        try:
            record = parse_reply(caption, reply)
            if (instruction := _plain(record["instruction"])) in taken:
                raise Refusal("its instruction is there already")
        except Refusal as reason:
            refused[str(reason)] += 1
            continue
        taken.add(instruction)
        records[caption] = record
    return records, refused


@backbone.one_line_errors("data_making.texts")
def main(argv: list[str] | None = None) -> None:
    parser = stage("data_making.texts", __doc__)
    add = parser.add_argument
    add("--seeds", type=Path, required=True, help="a text file, one caption a line")
    add("--llm", help="causal language model: a folder or hub id (default: the preset's)")
    add("--batch", type=int, default=16, help="captions at a time")
    add("--finetune", type=Path, help="examples in the form of texts.jsonl, to teach the model first")
    args = parser.parse_args(argv)
    backbone.check_numbers(args, {(1, math.inf): "batch", (0, 2**62): "seed"})
    with contextlib.ExitStack() as held:
        texts(args, held)


if __name__ == "__main__":
    main()
