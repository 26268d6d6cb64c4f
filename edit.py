"""Edits pictures: shown one finished edit, or told in words, or both, the model makes the same edit of yours.

    python edit.py --prompt-pair before.png after.png --input mine.jpg --output out.png
    python edit.py --instruction "make it night" --input mine.jpg --output out.png
    python edit.py --prompt-pair before.png after.png --instruction "add a hat" --input photos/ --output out/
    python edit.py --prompt-pair before.png after.png --input mine.jpg --num-images 4 --grid --output out/
    python edit.py --model runs/train/editor --instruction "add a hat" --input a.png b.png --output out/

A thin shell over `InstructGIEPipeline` in pipeline.py, where an edit is made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

SCHEDULERS = {  # diffusers' names
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}

MOST_ANSWERS = 10_000  # to each input


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Edit pictures by example, by instruction, or by both.")
    add = parser.add_argument
    add("--prompt-pair", nargs=2, metavar=("BEFORE", "AFTER"), type=Path, help="the example of the edit")
    add("--instruction", default="", help="the edit in words")
    add("--input", nargs="+", type=Path, required=True, help="pictures to edit, or folders of them")
    add("--output", type=Path, required=True, help="a .png file for one answer, a folder for more")
    add("--model", help="an editor's folder, as train.py saves it (default: the toy world's)")
    add("--num-images", type=int, default=1, help="answers to each input, of seeds S, S + 1, …")
    add("--seed", type=int, default=0, help="of the first answer to each input")
    add("--steps", type=int, help="of the sampler (default: the editor's)")
    add("--guidance-text", type=float, help="weight of the instruction, 1 for none (default: the editor's)")
    add("--guidance-visual", type=float, help="weight of the example, 1 for none (default: the editor's)")
    add("--scheduler", default="ddim", choices=SCHEDULERS, help="the sampler")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the models")
    add("--grid", action="store_true", help="write the labelled grid beside each answer")
    add("--compile", action="store_true", help="compile the U-Nets: slow to start, then faster")
    add("--offload", action="store_true", help="less GPU memory: parts wait in main memory till they work")
    return parser.parse_args()


if __name__ == "__main__":
    arguments()  # answers --help and misspelt options before the imports below, which take seconds

import diffusers
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

import backbone
from dataset import LONGEST_INSTRUCTION
from pictures import ImageError, load_image
from pipeline import SAMPLING, InstructGIEPipeline, call_options, seeded
from training.files import write_whole

# --- What is written ----------------------------------------------------------------------------------------


def labelled_grid(
    pair: tuple[Image.Image, Image.Image] | None,
    query: Image.Image,
    answer: Image.Image,
    instruction: str,
    panel: int,
) -> Image.Image:
    """Example before and after, input and answer, as the model has them, but enlarged and labelled.

    pair: None is grey, as the model has that, too. panel: P; shown are squares of a multiple of it, of 192
    pixels or more, each picture as large as fits.
    """
    side, line, font = panel * math.ceil(192 / panel), 20, ImageFont.load_default(14)
    words = textwrap.wrap(instruction, width=side // 4)  # a letter is about 7 pixels wide
    sheet = Image.new("RGB", (2 * side, 2 * (side + line) + len(words) * line), "white")
    draw = ImageDraw.Draw(sheet)
    pictures = *(pair or [Image.new("RGB", (panel, panel), "grey")] * 2), query, answer
    for i, label in enumerate(("example before", "example after", "input", "answer")):
        x, y = i % 2 * side, i // 2 * (side + line)
        draw.text((x + 4, y + 2), label, "black", font)
        seen = ImageOps.contain(pictures[i], (panel, panel), Image.Resampling.LANCZOS)
        shown = ImageOps.contain(seen, (side, side), Image.Resampling.NEAREST)
        sheet.paste(shown, (x + (side - shown.width) // 2, y + line + (side - shown.height) // 2))
    for i, text in enumerate(words):
        draw.text((4, 2 * (side + line) + i * line + 2), text, "black", font)
    return sheet


def save_png(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Writes the PNG whole or not at all, with `record` as JSON in its text chunk "instructgie"."""
    info = PngInfo()
    info.add_text("instructgie", json.dumps(record))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: image.save(file, format="PNG", pnginfo=info))


# --- The command --------------------------------------------------------------------------------------------


def pictures(sources: list[Path]) -> tuple[list[Path], list[Path]]:
    """What is edited: the files as they are, and of a folder all that are pictures, sorted; and what is left
    out of the folders, each named on stderr. Of hidden files nothing is said.

    Raises ValueError for a file that is no picture, and for a folder without one.
    """
    inputs: list[Path] = []
    left_out: list[Path] = []
    for source in sources:
        is_folder = source.is_dir()
        found = sorted(path for path in source.iterdir() if path.name[0] != ".") if is_folder else [source]
        before = len(inputs)
        for path in found:
            try:
                load_image(path)  # a broken picture should show before models are loaded
                inputs.append(path)
            except ImageError as error:
                if not is_folder:
                    raise
                left_out.append(path)
                print(f"left out: {error}", file=sys.stderr, flush=True)
        if len(inputs) == before:
            raise ValueError(f"{source}: no picture in this folder")
    return inputs, left_out


def output_paths(output: Path, inputs: list[Path], count: int, read: set[str]) -> list[list[Path]]:
    """Where the `count` answers to each input go. Raises ValueError where `output` cannot take them, and
    where an answer, or its grid, would overwrite a picture of `read`, which are full paths."""
    is_file = output.suffix.lower() in Image.registered_extensions() and not output.is_dir()
    if is_file and (output.suffix.lower() != ".png" or len(inputs) * count > 1):
        raise ValueError(f"--output {output}: one answer goes to a .png file, several go to a folder")
    if not is_file and output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file; give a folder, or a name that ends in .png")
    taken, targets = set(), []
    for path in inputs:
        for again in ("", *(f"-{n + 2}" for n in range(len(inputs)))):  # two pictures may have one stem
            stems = [path.stem + again] if count == 1 else [f"{path.stem}{again}_{k}" for k in range(count)]
            paths = [output] if is_file else [output / f"{stem}.png" for stem in stems]
            written = set(map(os.path.realpath, (*paths, *map(grid_path, paths))))
            if written & read:
                raise ValueError(f"--output {output}: an answer would overwrite a picture that is read")
            if not written & taken:
                break
        for target in paths:
            above = next(folder for folder in target.parents if folder.exists())
            if target.is_dir() or not above.is_dir():
                raise ValueError(f"--output {output}: {target} cannot be written, a folder or file is there")
        taken |= written
        targets.append(paths)
    return targets


def grid_path(path: Path) -> Path:
    return path.with_stem(f"{path.stem}_grid")


@backbone.one_line_errors("edit.py")
def main() -> None:
    args = arguments()
    instruction = " ".join(args.instruction.split())
    instruction.encode()  # raises a ValueError for bytes that are no text
    if len(instruction) > LONGEST_INSTRUCTION:
        raise ValueError(f"--instruction must have at most {LONGEST_INSTRUCTION} letters")
    if not args.prompt_pair and not instruction:
        raise ValueError("nothing says which edit to make: give --prompt-pair, --instruction or both")
    bounds = {(1, MOST_ANSWERS): "num_images", (1, math.inf): "steps", (0, 2**62): "seed"}
    backbone.check_numbers(args, bounds)
    pair = tuple(map(load_image, args.prompt_pair or [])) or None
    inputs, left_out = pictures(args.input)
    read = set(map(os.path.realpath, [*inputs, *left_out, *(args.prompt_pair or [])]))
    targets = output_paths(args.output, inputs, args.num_images, read)

    transformers.logging.disable_progress_bar()  # of every part's loading
    diffusers.utils.logging.disable_progress_bar()
    model, device = args.model or backbone.PRESETS["toy"].editor, backbone.pick_device(args.device)
    wordless = {} if instruction else {"llm": None}  # nothing to unify: the language model stays unloaded
    pipe = InstructGIEPipeline.from_pretrained(model, torch_dtype=getattr(torch, args.dtype), **wordless)
    if args.offload and device.type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    if args.compile:  # what runs at every step
        pipe.unet.compile()
        pipe.rcldm.compile()
    pipe.scheduler = getattr(diffusers, SCHEDULERS[args.scheduler]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(desc="edit", unit="step", leave=False)
    given = {name: getattr(args, name) for name in SAMPLING}
    used = {name: pipe.settings[name] if value is None else value for name, value in given.items()}

    (unified,) = pipe.unify([instruction])
    if instruction:
        print(f'instruction: "{instruction}" -> "{unified}"', flush=True)

    # Choice: one answer at a time. Together they would take less, but round otherwise; so each is the same to
    # the last bit, whatever else is edited.
    for source, paths in zip(inputs, targets):
        query = load_image(source)
        for seed, path in enumerate(paths, start=args.seed):
            options = {**call_options(used), "generator": seeded([seed]), "unify": False}
            try:
                (answer,) = pipe(unified, query, pair, **options).images
            except RuntimeError as error:
                if isinstance(error, NotImplementedError):  # not every sampler knows every kind of prediction
                    raise ValueError(f"--scheduler {args.scheduler}: {error}; take another") from error
                if not args.compile:
                    raise
                raise ValueError(f"--compile: {str(error).splitlines()[0]}; edit without it") from error
            record = {"instruction": instruction, "unified": unified, "input": str(source), "seed": seed}
            record |= {"prompt_pair": [str(file) for file in args.prompt_pair or []], **used}
            record |= {"scheduler": args.scheduler, "model": str(model), "dtype": args.dtype}
            record |= {"device": str(device)}
            save_png(answer, path, record)
            if args.grid:
                grid = labelled_grid(pair, query, answer, instruction, pipe.panel)
                save_png(grid, grid_path(path), record)
            print(path, flush=True)


if __name__ == "__main__":
    main()
