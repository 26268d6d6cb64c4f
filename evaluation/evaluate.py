"""Edits a split of a dataset and keeps every answer beside what it answers, for metrics to be computed from.

    python -m evaluation.evaluate                     # the shipped editor, toy world, split `seen`
    python -m evaluation.evaluate runs/train/editor --split unseen_task --mode both pair --sheet 24
    python -m evaluation.evaluate --method sdedit --output out/sdedit    # a baseline, see baselines.py
    python -m toy.score out/eval/seen/both            # exact metrics of what is saved

Below `--output` each split and mode has a folder: `<k>.png` the answer to query k, lossless; `answers.jsonl`
with a line for each, written when all are drawn; `settings.json`; `pictures/`, where the dataset is a table,
with the inputs and outputs. Answers that lie there already are replaced.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from PIL import Image
from tqdm import tqdm

import backbone
import evaluation.vit  # noqa: F401  so that its editors load
from apps.pipeline import InstructGIEPipeline
from dataset import VisualPromptDataset
from disk import as_lines, locked, write_text
from evaluation.baselines import InstructPix2Pix, PromptDiffusion, SDEdit
from pictures import ImageError, TableImage, load_image, tensor_to_image
from pictures.answers import panel_rows, save_png
from pictures.pairs import read_pairs

# What the editor is given besides the query. "other-pair" is a pair of another instruction, and no words: who
# reads examples makes that other edit, who remembers the training makes the query's own.
MODES = ("both", "pair", "instruction", "other-pair")


class Method(NamedTuple):
    """How a kind of editor is loaded, which text of a pair it is told, and what it can be given."""

    load: Callable[..., Any]
    told: str
    modes: tuple[str, ...]


def load_ours(model: str, device: torch.device, panel: int) -> InstructGIEPipeline:
    """Its panels are as large as it learnt, whatever the preset's."""
    pipe = InstructGIEPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


METHODS = {
    "instructgie": Method(load_ours, "instruction", MODES),
    "sdedit": Method(SDEdit.load, "output_caption", ("instruction",)),
    "instruct-pix2pix": Method(InstructPix2Pix.load, "instruction", ("instruction",)),
    "prompt-diffusion": Method(PromptDiffusion.load, "instruction", MODES),
}
TEXTS = ("instruction", "input_caption", "output_caption")  # of an EditPair; further ones are in its `extra`
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


def is_readable(data: VisualPromptDataset, query: Query) -> bool:
    """Whether its pictures can be read; says so where they cannot."""
    try:
        data.load_panels(query.example, query.index)
    except ImageError as error:
        print(f"left out: {error}", flush=True)
        return False
    return True


# --- The folder of answers ----------------------------------------------------------------------------------


def saved_picture(picture: str | TableImage, folder: Path) -> str:
    """What `answers.jsonl` calls a picture: its full path. Of a table's picture it is the path of a lossless
    copy, seen from the folder of answers."""
    if not isinstance(picture, TableImage):
        return picture
    name = f"pictures/{quote(picture.column.column_names[0], safe='')}_{picture.row:06d}.png"
    save_png(load_image(picture), folder / name)
    return name


def describe(data: VisualPromptDataset, query: Query, folder: Path) -> dict[str, Any]:
    """What a line of `answers.jsonl` says of the query; the metadata's further keys are kept."""
    pair, example = data.pairs[query.index], data.pairs[query.example]
    record = {
        **pair.extra,
        "input": saved_picture(pair.input, folder),
        "output": saved_picture(pair.output, folder),
        "input_caption": pair.input_caption,
        "output_caption": pair.output_caption,
        "example_input": saved_picture(example.input, folder),
        "example_output": saved_picture(example.output, folder),
        "example": example.extra,
        "instruction": pair.instruction,
        "seed": query.seed,
    }
    # null for NaN and infinity, which JSON does not have: a table's number may be one.
    return json.loads(json.dumps(record), parse_constant=lambda name: None)


def read_answers(folder: Path, keys: set[str]) -> list[dict[str, Any]]:
    """The lines of `answers.jsonl`. keys: that every line must have, or a ValueError tells which does not."""
    path, records = folder / "answers.jsonl", []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
                missing = keys - records[-1].keys()
            except (ValueError, AttributeError):
                raise ValueError(f"{path}:{number}: not a JSON object") from None
            if missing:
                raise ValueError(f"{path}:{number}: has no {min(missing)!r}; answers need it for this metric")
    return records


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
    """Answers every query: its picture goes to `folder` as it is drawn, the lines when all are.

    told: which text of a pair the editor is told, unless the mode withholds it: the instruction, a caption,
    or a further key of the metadata.
    """
    pairs = [data.pairs[query.index] for query in queries]
    texts = [getattr(pair, told) if told in TEXTS else pair.extra.get(told) for pair in pairs]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the dataset has no {told!r} for some queries, and the editor is to be told it")
    for name in ("answers.jsonl", "sheet.png"):  # the pictures that they show are replaced
        (folder / name).unlink(missing_ok=True)
    unified = [""] * len(texts) if mode.endswith("pair") else editor.unify(texts)
    records: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(queries), batch), desc=folder.name, unit="batch"):
        now, words = queries[start : start + batch], unified[start : start + batch]
        panels = torch.stack([data.load_panels(query.example, query.index) for query in now])
        answers = editor.answer(
            panels[:, :2],  # (B, 2, 3, P, P)
            [mode != "instruction"] * len(now),
            panels[:, 2],  # (B, 3, P, P)
            words,
            seeds=[query.seed for query in now],
            **sampling,
        )
        for query, text, answer in zip(now, words, answers):
            name = f"{len(records):05d}.png"
            save_png(tensor_to_image(answer), folder / name)
            records.append({"answer": name, "mode": mode, "unified": text} | describe(data, query, folder))
    write_text(folder / "answers.jsonl", as_lines(records))


def contact_sheet(data: VisualPromptDataset, queries: list[Query], folder: Path, mode: str) -> Image.Image:
    """A row of five panels for each query: example pair, input, answer and truth.

    Two queries stand side by side. An example that the editor was not given is left grey, and so is the
    truth where the pair is another's: the dataset does not hold it.
    """
    names = ("example before", "example after", "input", "answer", "truth")
    rows = []
    for k, query in enumerate(queries):
        panels = [tensor_to_image(panel) for panel in data.load_panels(query.example, query.index)]
        grey = Image.new("RGB", panels[0].size, "grey")
        if mode == "instruction":
            panels[:2] = [grey, grey]
        if mode == "other-pair":
            panels[3] = grey
        panels.insert(3, load_image(folder / f"{k:05d}.png"))
        withheld = "not told: " if mode.endswith("pair") else ""
        rows.append((withheld + data.pairs[query.index].instruction, panels))
    return panel_rows(rows, names, side=96, columns=min(2, len(queries)))


@backbone.one_line_errors("evaluation.evaluate")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("evaluation.evaluate", __doc__)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or hub id (default: the preset's, if it has one)")
    add("--method", default="instructgie", choices=METHODS, help="what kind of editor MODEL is")
    add("--backbone", default="toy", help=f"whose defaults to take: {', '.join(backbone.PRESETS)}")
    add("--data", help="dataset: a folder or a hub id (default: the preset's)")
    add("--split", default="seen")
    add("--columns", **backbone.COLUMNS)
    add("--output", type=Path, default=Path("out/eval"), help="each split and mode gets a folder below it")
    add("--mode", nargs="+", choices=MODES, help="what is given besides the input (default: by method)")
    add("--told", metavar="KEY", help="a text of the metadata instead of the method's, as `paraphrase`")
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
    bounds = {(1, math.inf): "count batch", (0, math.inf): "sheet", (0, 2**62): "seed"}
    backbone.check_numbers(args, bounds)
    method, preset = METHODS[args.method], backbone.preset(args.backbone)
    default = {"instructgie": preset.editor, "sdedit": preset.stable_diffusion}.get(args.method)
    model, source = args.model or default, args.data or preset.data
    for name, value in (("a MODEL of this method", model), ("--data", source)):
        if value is None:
            raise ValueError(f"--method {args.method}: give {name}, --backbone {args.backbone} has none")
    modes = args.mode or method.modes[:1]
    if strange := [mode for mode in modes if mode not in method.modes]:
        raise ValueError(f"--mode {strange[0]}: {args.method} can be given {', '.join(method.modes)} alone")
    editor = method.load(model, backbone.pick_device(args.device), preset.panel)
    data = read_pairs(backbone.data_folder(source), args.split, args.columns)
    data = VisualPromptDataset(data, size=editor.panel, seed=args.seed)
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if strange := [name for name in given if name not in editor.settings]:
        raise ValueError(f"--{strange[0].replace('_', '-')}: {args.method} samples without it")
    sampling = {name: editor.settings[name] for name in SAMPLING if name in editor.settings} | given
    told = args.told or method.told
    settings = vars(args) | {"model": model, "data": source, "told": told, "panel": editor.panel} | sampling
    for mode in modes:
        folder = args.output / args.split / mode
        queries = draw_queries(data, args.count, args.seed, mode, args.caption)
        queries = [query for query in queries if is_readable(data, query)]
        with locked(folder):
            answer_all(editor, data, queries, folder, mode, told, sampling, args.batch)
            text = json.dumps(settings | {"mode": mode}, indent=2, default=str) + "\n"
            write_text(folder / "settings.json", text)
            if args.sheet:
                save_png(contact_sheet(data, queries[: args.sheet], folder, mode), folder / "sheet.png")
        print(f"{len(queries)} answers in {folder}", flush=True)


if __name__ == "__main__":
    main()
