"""Edits a split of a dataset and keeps every answer beside what it answers, for metrics to be computed from.

    python -m evaluation.evaluate                     # the shipped editor, toy world, split `seen`
    python -m evaluation.evaluate runs/train/editor --split unseen_task --mode both pair --sheet 24
    python -m evaluation.evaluate --method sdedit --output out/sdedit    # a baseline, see baselines.py
    python -m toy.score out/eval/seen/both            # exact metrics of what is saved

Below `--output` each split and mode has a folder: `<k>.png` the answer to query k, lossless; `answers.jsonl`
with a line for each; `settings.json`; `pictures/`, where the dataset is a table, with the inputs and outputs.
A run that was stopped goes on where it stood when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import backbone
import evaluation.vit  # noqa: F401  so that its editors load
from apps.pipeline import InstructGIEPipeline
from dataset import VisualPromptDataset, read_pairs
from disk import atomic_write, locked, other_settings
from evaluation.baselines import InstructPix2Pix, PromptDiffusion, SDEdit
from pictures import TableImage, load_image, picture_digest, tensor_to_image

# What the editor is given besides the query. "other-pair" is a pair of another instruction, and no words: who
# reads examples makes that other edit, who remembers the training makes the query's own.
MODES = ("both", "pair", "instruction", "other-pair")


class Method(NamedTuple):
    """How a kind of editor is loaded, which text of a pair it is told, and what it can be given."""

    load: Callable[..., Any]
    told: str
    modes: tuple[str, ...]


def load_ours(model: str, device: str, panel: int) -> InstructGIEPipeline:
    """Its panels are as large as it learnt, whatever the preset's."""
    pipe = InstructGIEPipeline.from_pretrained(model).to(backbone.pick_device(device))
    pipe.set_progress_bar_config(disable=True)
    return pipe


METHODS = {
    "instructgie": Method(load_ours, "instruction", MODES),
    "sdedit": Method(SDEdit.load, "output_caption", ("instruction",)),
    "instruct-pix2pix": Method(InstructPix2Pix.load, "instruction", ("instruction",)),
    "prompt-diffusion": Method(PromptDiffusion.load, "instruction", MODES),
}
SAMPLING = ("steps", "guidance_text", "guidance_visual", "strength")


class Query(NamedTuple):
    """A query: the pair it asks for and the pair it shows, by index into the dataset; the noise's seed."""

    index: int
    example: int
    seed: int


def draw_queries(
    data: VisualPromptDataset, count: int, seed: int, mode: str = "both", word: str | None = None
) -> list[Query]:
    """The first `count` items of the dataset in an order that only the seed decides: nothing is picked.

    word: that the caption of the output must have; None leaves all in.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    if word is not None:
        said = re.compile(rf"\b{re.escape(word)}\b")
        order = [i for i in order if said.search(data.pairs[i].output_caption or "")]
        if not order:
            raise ValueError(f"--caption {word}: no output's caption has this word")
    order = order[:count]
    examples = [data.draw(i, epoch=0) for i in order]
    if mode == "other-pair":  # the first after the query, in an order of its own, that has other words
        turn = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + 1)).tolist()
        for k, i in enumerate(order):
            others = (
                j for j in turn[k:] + turn[:k] if data.pairs[j].instruction != data.pairs[i].instruction
            )
            examples[k] = next(others, None)
        if None in examples:
            raise ValueError("--mode other-pair: all pairs of the split have one instruction")
    return [Query(i, example, seed + k) for k, (i, example) in enumerate(zip(order, examples))]


def place(picture: str | TableImage) -> str:
    """What `answers.jsonl` calls a picture: its full path, or that of a table's from the folder of answers,
    where `keep` lays a copy."""
    if isinstance(picture, TableImage):
        return f"pictures/{quote(picture.column.column_names[0], safe='')}_{picture.row:06d}.png"
    return picture


def keep(picture: str | TableImage, folder: Path) -> None:
    """Copies a table's picture to the folder of answers, lossless: nothing else could open it by name."""
    if isinstance(picture, TableImage):
        path = folder / place(picture)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, lambda file: load_image(picture).save(file, format="PNG"))


def describe(data: VisualPromptDataset, query: Query) -> dict[str, Any]:
    """What a line of `answers.jsonl` says of the query; the metadata's further keys are kept, with null for
    what is no finite number."""
    pair, example = data.pairs[query.index], data.pairs[query.example]
    extra, example_extra = map(_finite, (pair.extra, example.extra))
    return {
        **extra,
        "input": place(pair.input),
        "output": place(pair.output),
        "input_caption": pair.input_caption,
        "output_caption": pair.output_caption,
        "example_input": place(example.input),
        "example_output": place(example.output),
        "example": example_extra,
        "instruction": pair.instruction,
        "seed": query.seed,
    }


def fingerprint_pictures(data: VisualPromptDataset, queries: list[Query]) -> str:
    """Of the bytes of every picture that the queries and their examples show."""
    shown = [data.pairs[index] for query in queries for index in (query.index, query.example)]
    digests = [picture_digest(source) for pair in shown for source in (pair.input, pair.output)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _finite(extra: dict[str, Any]) -> dict[str, Any]:
    """The same with None for NaN and infinity, which JSON does not have."""
    return json.loads(json.dumps(extra), parse_constant=lambda name: None)


# --- The file of answers ------------------------------------------------------------------------------------


def finished(answers: Path) -> set[str]:
    """Names of the answers that have a line; a last line cut by a killed run is taken off the file."""
    names = set()
    try:
        for line in answers.read_bytes().splitlines(keepends=True) if answers.exists() else ():
            if line.endswith(b"\n"):
                names.add(json.loads(line)["answer"])
            else:
                os.truncate(answers, answers.stat().st_size - len(line))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{answers}: damaged; remove its folder and start again") from None
    return names


def read_answers(folder: Path, keys: set[str]) -> list[dict[str, Any]]:
    """The lines of `answers.jsonl`, but for one that a running or killed evaluation has left half-written.

    keys: that every line must have, or a ValueError tells which does not.
    """
    path = folder / "answers.jsonl"
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        where = f"{path}:{number}"
        if line.endswith(b"\n"):
            try:
                records.append(json.loads(line))
                missing = keys - records[-1].keys()
            except (ValueError, AttributeError, RecursionError):
                raise ValueError(f"{where}: not a JSON object") from None
            if missing:
                raise ValueError(f"{where}: has no {min(missing)!r}; answers need it for this metric")
            name = records[-1].get("answer")
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{where}: {str(name)[:80]!r} is no file of the folder")
    if not records:
        raise ValueError(f"{path}: holds no answers")
    return records


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Stores the settings beside the answers; raises ValueError where answers of other settings lie there."""
    empty = not finished(folder / "answers.jsonl")
    if other := other_settings(folder / "settings.json", settings, anew=empty):
        now = ", ".join(f"{key} {there}, now {mine}" for key, (there, mine) in list(other.items())[:3])
        raise ValueError(f"{folder} holds answers of other settings ({now}); give another --output")


def fingerprint(sources: list[str]) -> str:
    """Of the files of models, so that answers of one trained anew do not mix with the old one's."""
    digest = hashlib.sha256()
    folders = filter(None, map(backbone.local_folder, sources))  # a hub id has none
    for file in (file for folder in folders for file in sorted(folder.rglob("*"))):
        if file.suffix in (".json", ".safetensors"):
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


# --- Answers ------------------------------------------------------------------------------------------------


def answer_all(
    editor: Any,
    data: VisualPromptDataset,
    queries: list[Query],
    folder: Path,
    mode: str,
    told: str,
    sampling: dict[str, Any],
    batch: int,
) -> None:
    """Answers every query that has no answer in `folder` yet: a batch's pictures first, then its lines.

    told: which text of a pair the editor is told, unless the mode withholds it: the instruction, a caption,
    or a further key of the metadata.
    """
    names = [f"{k:05d}.png" for k in range(len(queries))]
    done = finished(folder / "answers.jsonl")
    to_do = [k for k, name in enumerate(names) if name not in done]
    if not to_do:
        return
    pairs = [data.pairs[query.index] for query in queries]
    texts = [pair.extra.get(told) or getattr(pair, told, None) for pair in pairs]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the dataset has no {told!r} for some queries, and the editor is to be told it")
    unified = [""] * len(texts) if mode.endswith("pair") else editor.unify(texts)
    progress = tqdm(total=len(queries), initial=len(queries) - len(to_do), desc=folder.name, unit="answer")
    with progress, open(folder / "answers.jsonl", "a", encoding="utf-8") as lines:
        for ks in (to_do[first : first + batch] for first in range(0, len(to_do), batch)):
            shown = [data.load_panels(queries[k].example, queries[k].index) for k in ks]
            panels = torch.stack(shown)  # (B, 4, 3, P, P)
            answers = editor.answer(
                panels[:, :2],
                [mode != "instruction"] * len(ks),
                panels[:, 2],
                [unified[k] for k in ks],
                seeds=[queries[k].seed for k in ks],
                **sampling,
            )
            for k, answer in zip(ks, answers):
                image = tensor_to_image(answer)
                atomic_write(folder / names[k], lambda file, image=image: image.save(file, format="PNG"))
            for pair in (data.pairs[i] for k in ks for i in (queries[k].index, queries[k].example)):
                keep(pair.input, folder)
                keep(pair.output, folder)
            records = ({"answer": names[k], "mode": mode, "unified": unified[k]} for k in ks)
            records = [record | describe(data, queries[k]) for k, record in zip(ks, records)]
            lines.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
            lines.flush()
            progress.update(len(ks))


def contact_sheet(
    data: VisualPromptDataset, queries: list[Query], folder: Path, mode: str, side: int = 96
) -> Image.Image:
    """A row of five panels, `side` pixels each, for each query: example pair, input, answer and truth.

    Two queries stand side by side. An example that the editor was not given is left grey, and so is the
    truth where the pair is another's: the dataset does not hold it.
    """
    names = ("example before", "example after", "input", "answer", "truth")
    rows = []
    for k, query in enumerate(queries):
        panels = [tensor_to_image(panel) for panel in data.load_panels(query.example, query.index)]
        grey = Image.new("RGB", (side, side), "grey")
        if mode == "instruction":
            panels[:2] = [grey, grey]
        if mode == "other-pair":
            panels[3] = grey
        panels.insert(3, load_image(folder / f"{k:05d}.png"))
        withheld = "not told: " if mode.endswith("pair") else ""
        rows.append((withheld + data.pairs[query.index].instruction, panels))
    return panel_rows(rows, names, side, min(2, len(queries)))


def panel_rows(
    rows: list[tuple[str, list[Image.Image]]], names: tuple[str, ...], side: int, columns: int
) -> Image.Image:
    """Words above panels of `side` pixels for each row, `columns` rows side by side; `names` heads them."""
    line, gap, font = 16, 12, ImageFont.load_default(size=11)
    head, across = (line, len(names)) if names else (0, len(rows[0][1]))
    width, height = across * side + gap, side + line
    size = columns * width + gap, -(-len(rows) // columns) * height + head + gap
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for k, (words, panels) in enumerate(rows):
        x, y = gap + k % columns * width, head + k // columns * height
        for j, name in enumerate(names if k < columns else ()):
            draw.text((x + j * side + 2, 1), name, "grey", font)
        draw.text((x + 2, y + 1), words, "black", font)
        for j, panel in enumerate(panels):
            sheet.paste(panel.resize((side, side), Image.Resampling.BICUBIC), (x + j * side, y + line))
    return sheet


# --- The program --------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.evaluate",
        description="Edit a split of a dataset and keep every answer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or hub id (default: the preset's, if it has one)")
    add("--method", default="instructgie", choices=METHODS, help="what kind of editor MODEL is")
    add("--backbone", default="toy", help=f"whose defaults to take: {', '.join(backbone.PRESETS)}")
    add("--data", help="dataset: a folder or a hub id (default: the preset's)")
    add("--split", default="seen")
    add("--columns", **backbone.COLUMNS)
    add("--output", type=Path, default=Path("out/eval"), help="each split and mode gets a folder below it")
    add("--mode", nargs="+", choices=MODES, help="what is given besides the input (default: all it can take)")
    add("--told", metavar="KEY", help="another text of the metadata than the method's own, as `paraphrase`")
    add("--caption", metavar="WORD", help="only queries whose outputs' captions have this word, as `face`")
    add("--count", type=int, default=512, help="queries, or all where the split has fewer")
    add("--batch", type=int, default=32, help="edited at a time")
    add("--steps", type=int, help="of sampling (default: the editor's)")
    add("--guidance-text", type=float, help="guidance scale of the instruction (default: the editor's)")
    add("--guidance-visual", type=float, help="guidance scale of the example (default: the editor's)")
    add("--strength", type=float, help="SDEdit: how much noise, 0 … 1 (default: the editor's)")
    add("--seed", type=int, default=0, help="of the order of the queries, their examples and the noise")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--sheet", type=int, default=0, metavar="N", help="write sheet.png, with the first N queries")
    args = parser.parse_args(argv)
    backbone.check_numbers(args, {(1, math.inf): "count batch", (0, math.inf): "sheet", (0, 2**62): "seed"})
    return args


def run(args: argparse.Namespace) -> None:
    method, preset = METHODS[args.method], backbone.preset(args.backbone)
    default = {"instructgie": preset.editor, "sdedit": preset.stable_diffusion}.get(args.method)
    model, source = args.model or default, args.data or preset.data
    for name, value in (("a MODEL of this method", model), ("--data", source)):
        if value is None:
            raise ValueError(f"--method {args.method}: give {name}, --backbone {args.backbone} has none")
    modes = list(dict.fromkeys(args.mode or method.modes[:1]))
    if strange := [mode for mode in modes if mode not in method.modes]:
        raise ValueError(f"--mode {strange[0]}: {args.method} can be given {', '.join(method.modes)} alone")
    editor = method.load(model, device=args.device, panel=preset.panel)
    data = read_pairs(backbone.data_folder(source), args.split, args.columns)
    data = VisualPromptDataset(data, size=editor.panel, seed=args.seed)
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if strange := [name for name in given if name not in editor.settings]:
        raise ValueError(f"--{strange[0].replace('_', '-')}: {args.method} samples without it")
    sampling = {name: editor.settings[name] for name in SAMPLING if name in editor.settings} | given
    told = args.told or method.told
    folder, parts = backbone.local_folder(model), []
    if folder and (folder / "instructgie.json").is_file():  # an editor, whose other parts lie elsewhere
        parts = [name for name in ("stable_diffusion", "llm") if editor.settings[name]]
        parts = [str(backbone.find_part(editor.settings, name)) for name in parts]
    settings = {
        "method": args.method,
        "model": str(model),
        "model_fingerprint": fingerprint([model, *parts]),
        "data": str(source),
        "split": args.split,
        "count": min(args.count, len(data)),
        "seed": args.seed,
        "panel": editor.panel,
        "told": told,
        "caption": args.caption,
        **sampling,
    }
    for mode in modes:
        folder = args.output / args.split / mode
        queries = draw_queries(data, args.count, args.seed, mode, args.caption)
        asked = json.dumps([describe(data, query) for query in queries], sort_keys=True)
        asked = hashlib.sha256(asked.encode()).hexdigest()[:16]
        known = {"queries_fingerprint": asked, "pictures_fingerprint": fingerprint_pictures(data, queries)}
        with locked(folder):
            check_settings(folder, {**settings, **known, "mode": mode})
            answer_all(editor, data, queries, folder, mode, told, sampling, args.batch)
            if args.sheet > 0:
                sheet = contact_sheet(data, queries[: args.sheet], folder, mode)
                atomic_write(folder / "sheet.png", lambda file, sheet=sheet: sheet.save(file, format="PNG"))
        print(f"{len(queries)} answers in {folder}", flush=True)


def main(argv: list[str] | None = None) -> None:
    with backbone.one_line_errors("evaluation.evaluate"):
        run(arguments(argv))


if __name__ == "__main__":
    main()
