"""Edits pictures: shown one finished edit, or told in words, or both, the model makes the same edit of yours.

    python edit.py --prompt-pair before.png after.png --input mine.jpg --output out.png
    python edit.py --instruction "make it night" --input mine.jpg --output out.png
    python edit.py --prompt-pair before.png after.png --instruction "add a hat" --input photos/ --output out/
    python edit.py --prompt-pair before.png after.png --input mine.jpg --num-images 4 --grid --output out/
    python edit.py --model runs/train/editor --instruction "add a hat" --input a.png b.png --output out/

An edit, in five lines:

    example pair, query -> Img_VPcon = [[before, after], [query, grey]] -> G_ven, once per edit
    instruction l -> U -> l' -> text encoder, once per edit
    noise x_T; for every timestep: RCLDM(x_t, l', condition) -> residuals -> frozen U-Net -> noise prediction,
        guided away from the one made without the instruction, and without the example pair; x_t -> x_(t-1)
    lower right quadrant of x_0 -> VAE decoder -> the answer

Symbols: B samples; P panel size in pixels, p in latent pixels; C latent channels. Images are in [-1, 1].
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEDULERS = {  # diffusers' names
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


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
    add("--eta", type=float, help="fresh noise at every step, 0 … 1, of ddim (default: the editor's)")
    add("--guidance-text", type=float, help="weight of the instruction, 1 for none (default: the editor's)")
    add("--guidance-visual", type=float, help="weight of the example, 1 for none (default: the editor's)")
    add("--scheduler", default="ddim", choices=SCHEDULERS, help="the sampler")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the models")
    add("--grid", action="store_true", help="write the labelled grid beside each answer")
    add("--batch", type=int, default=4, help="answers drawn at once")
    add("--compile", action="store_true", help="compile the U-Nets: slow to start, then faster")
    add("--offload", action="store_true", help="less GPU memory: parts wait in main memory till they work")
    return parser.parse_args()


if __name__ == "__main__":
    arguments()  # answers --help and misspelt options before the imports below, which take seconds

import diffusers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

import backbone
import liu
from dataset import (
    answer_panel,
    compose_grid,
    drop_example,
    image_to_tensor,
    load_image,
    mask_query,
    split_grid,
    tensor_to_image,
)

# Choice: how an editor samples unless told otherwise; `train.py` records it with what it trained. A scale of
# 1 is no guidance: one branch instead of three. On the toy world 1.5 makes a few more edits right, and what
# they leave alone more wrong. An eta of 1 is fresh noise at every step: later steps can mend what the first
# ones drew.
SAMPLING = {"steps": 20, "eta": 1.0, "guidance_text": 1.0, "guidance_visual": 1.0}


# --- The editor ---------------------------------------------------------------------------------------------


class Editor:
    """The frozen Stable Diffusion, the trained RCLDM and the unification module: load once, edit many.

    sd, rcldm: of one dtype, on one device. unifier: None leaves instructions as they stand. panel: P.
    settings: what `train.py` recorded, among it how to sample best. offload: language model, text encoder and
    VAE are on the U-Net's device only while they work. Raises BackboneError where sd and rcldm do not fit.
    """

    def __init__(
        self,
        sd: backbone.StableDiffusion,
        rcldm: nn.Module,
        unifier: liu.InstructionUnifier | None,
        panel: int,
        settings: dict[str, Any] | None = None,
        offload: bool = False,
    ) -> None:
        self.sd, self.rcldm, self.unifier, self.panel, self.offload = sd, rcldm, unifier, panel, offload
        self.settings = SAMPLING | (settings or {})
        self.factor = backbone.vae_factor(sd.vae)  # P / p
        mine, theirs = ({**model.config} for model in (rcldm.trainable_copy, sd.unet))
        for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
            if json.dumps(mine[name]) != json.dumps(theirs[name]):  # tuples and lists alike
                reason = f"its U-Net has {name} {theirs[name]}, the editor's {mine[name]}"
                raise backbone.BackboneError(f"the editor does not fit this Stable Diffusion: {reason}")
        if rcldm.config.factor != self.factor or panel % self.factor:
            reason = f"the autoencoder's factor is {self.factor}, the editor's {rcldm.config.factor}"
            raise backbone.BackboneError(f"panels of {panel} pixels do not fit: {reason}")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        llm: bool = True,
        offload: bool = False,
    ) -> Editor:
        """An editor's folder, as `train.py` saves it, with the pretrained parts that it names.

        llm: without it the language model stays unloaded, and instructions are used as they stand. offload:
        as above. Raises BackboneError.
        """
        device = backbone.pick_device(str(device))
        start = "cpu" if offload else device
        rcldm, settings = backbone.load_editor(folder, device, dtype)
        missing = {"stable_diffusion", "llm", "panel"} - set(settings)
        if missing:
            raise backbone.BackboneError(f"{folder}: instructgie.json lacks {', '.join(sorted(missing))}")
        kinds = {"panel": int, "steps": int}
        kinds |= dict.fromkeys(("eta", "guidance_text", "guidance_visual"), int | float)
        for name, kind in ({"stable_diffusion": str, "llm": str | None} | kinds).items():
            if name in settings and not isinstance(settings[name], kind):
                raise backbone.BackboneError(f"{folder}: instructgie.json has {name} {settings[name]!r}")
        sd = backbone.load_stable_diffusion(settings["stable_diffusion"], start, dtype)
        sd.unet.to(device)
        unifier = None
        if llm and settings["llm"]:  # Choice: no cache on disk here, since a greedy model only repeats itself
            unifier = liu.InstructionUnifier(*backbone.load_llm(settings["llm"], device))
            unifier.model.to(start)
        return cls(sd, rcldm, unifier, settings["panel"], settings, offload)

    @contextlib.contextmanager
    def at_work(self, part: nn.Module) -> Iterator[nn.Module]:
        """The part, on the U-Net's device; with `offload`, only for as long."""
        yield part.to(self.sd.unet.device)
        if self.offload:
            part.cpu()

    def compile(self) -> None:
        """Compiles what runs at every step, at its first step for each number of samples."""
        self.sd.unet.compile()
        self.rcldm.compile()

    def unify(self, instructions: list[str]) -> list[str]:
        """l' = U(l) of each instruction; as they stand where the editor was trained without U."""
        if self.unifier is None:
            return list(instructions)
        with self.at_work(self.unifier.model):
            return self.unifier.unify(instructions)

    @torch.no_grad()
    def sample(
        self,
        examples: Tensor,
        has_example: list[bool] | None,
        queries: Tensor,
        instructions: list[str],
        seeds: list[int],
        steps: int = SAMPLING["steps"],
        eta: float = SAMPLING["eta"],
        guidance_text: float = SAMPLING["guidance_text"],
        guidance_visual: float = SAMPLING["guidance_visual"],
        scheduler: str = "ddim",
        progress: bool = False,
    ) -> Tensor:
        """Draws the grids of B edits: latents (B, C, 2p, 2p), float32.

        Args:
            examples: (B, 2, 3, P, P) in [-1, 1], before and after. Ignored where `has_example` is false;
                None means that all samples have one.
            queries: (B, 3, P, P) in [-1, 1].
            instructions: B texts, unified already; "" for none.
            seeds: one for each sample. A sample depends on its own alone, not on the batch around it.
            eta: share of fresh noise at every step, from 0 (DDIM) to 1 (DDPM); scheduler "ddim" alone has it.
            guidance_text, guidance_visual: 1 is no guidance, 0 is no instruction and no example pair.

        Raises ValueError for lists of another length than B, more steps than there are timesteps, and an eta
        outside 0 … 1.

        Choice: two guidance scales, after InstructPix2Pix (Brooks et al., 2023, section 3.2.1). With the
        prediction e(text, pair), where 0 is an empty text or a grey example row, and the query stays:
            e = e(0, 0) + s_visual · (e(0, pair) - e(0, 0)) + s_text · (e(text, pair) - e(0, pair))
        """
        batch = len(queries)
        has_example = [True] * batch if has_example is None else has_example
        if not len(examples) == len(has_example) == len(instructions) == len(seeds) == batch:
            raise ValueError("examples, has_example, queries, instructions and seeds differ in length")
        timesteps = self.sd.scheduler.config.num_train_timesteps
        if not 1 <= steps <= timesteps:
            raise ValueError(f"the number of steps must be 1 … {timesteps}, not {steps}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 … 1, not {eta}")
        sd, rcldm, device, dtype = self.sd, self.rcldm, self.sd.unet.device, self.sd.unet.dtype

        # The formula as weights, without the branches whose weight is zero. Where no sample has a pair (or
        # a text), the first (the last) difference is zero whatever its scale: take the one that saves most.
        s_visual = guidance_visual if any(has_example) else 1.0
        s_text = guidance_text if any(instructions) else s_visual
        weights = {(False, False): 1 - s_visual, (False, True): s_visual - s_text, (True, True): s_text}
        branches = {branch: weight for branch, weight in weights.items() if weight != 0}  # K of them

        examples, queries = examples.to(device, dtype), queries.to(device, dtype)
        shown = mask_query(compose_grid(*examples.unbind(1), queries, queries))  # (B, 3, 2P, 2P)
        alone = drop_example(shown)
        has_pair = torch.tensor(has_example, device=device).view(-1, 1, 1, 1)
        shown = torch.where(has_pair, shown, alone)
        condition = torch.cat([shown if pair else alone for _, pair in branches])  # (K·B, 3, 2P, 2P)
        with self.at_work(sd.text_encoder):
            told, silent = (backbone.encode_text(sd, texts) for texts in (instructions, [""] * batch))
        states = torch.cat([told if text else silent for text, _ in branches])  # (K·B, tokens, D)
        known = None
        if rcldm.config.prompt_encoder_latents:
            with self.at_work(sd.vae) as vae:
                known = known_latents(vae, condition)
        condition, draft = rcldm.encode_condition(condition, states, known)

        solver = getattr(diffusers, SCHEDULERS[scheduler]).from_config(sd.scheduler.config)
        solver.set_timesteps(steps, device=device)
        # Drawn on the CPU, so that a seed means the same noise on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (sd.unet.config.in_channels, *[2 * self.panel // self.factor] * 2)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        x_t = noise.to(device) * solver.init_noise_sigma
        taken = inspect.signature(solver.step).parameters
        extra = {k: v for k, v in (("generator", generators), ("eta", eta)) if k in taken}
        for t in tqdm(solver.timesteps, desc="edit", unit="step", leave=False, disable=not progress):
            inputs = solver.scale_model_input(torch.cat([x_t] * len(branches)), t).to(dtype)
            down, mid = rcldm(inputs, t, states, condition, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            predictions = sd.unet(inputs, t, states, **residuals).sample.float().chunk(len(branches))
            prediction = sum(weight * e for weight, e in zip(branches.values(), predictions))
            x_t = solver.step(prediction, t, x_t, **extra).prev_sample
        if draft is None:
            return x_t
        return settle(x_t, known[-batch:], draft[-batch:])  # the last branch is told most

    def answer(self, *args: Any, **sampling: Any) -> Tensor:
        """Edits: what `sample` takes → the answers (B, 3, P, P) in [-1, 1], float32."""
        return self.decode_answers(self.sample(*args, **sampling))

    @torch.no_grad()
    def decode_answers(self, latents: Tensor) -> Tensor:
        """Latents of grids (B, C, 2p, 2p) → the answers (B, 3, P, P) in [-1, 1], float32."""
        with self.at_work(self.sd.vae):
            return backbone.decode_latents(self.sd.vae, answer_panel(latents))

    def decode_grids(self, latents: Tensor) -> Tensor:
        """Latents of grids (B, C, 2p, 2p) → all that was drawn, (B, 3, 2P, 2P) in [-1, 1], float32.

        Choice: panel by panel, as they were encoded in training, so that none shows at another's border.
        """
        empty = torch.zeros_like(answer_panel(latents))
        grids = [compose_grid(empty, empty, empty, panel) for panel in split_grid(latents)]
        return compose_grid(*map(self.decode_answers, grids))


@torch.no_grad()
def known_latents(vae: nn.Module, condition: Tensor) -> Tensor:
    """What is known of condition grids (B, 3, 2P, 2P) before an edit: latents (B, C, 2p, 2p).

    The query's stand in the answer's place too, as `repeat_query` has it in training.
    """
    before, after, query = (backbone.encode_images(vae, panel) for panel in split_grid(condition)[:3])
    return compose_grid(before, after, query, query)


def settle(drawn: Tensor, known: Tensor, draft: Tensor) -> Tensor:
    """Finished latents, without what they only add to the encoder's draft, nor that to what is known.

    drawn, known, draft: all (B, C, 2p, 2p), of about unit variance.

    Choice: where the drawn latents differ from the draft by a mean square of less than 0.04, that shows
    through, wholly where they do not differ: the frozen U-Net repeats nothing exactly, and what comes that
    near it was shown, not invented. Likewise what is known, where the draft differs by less than 0.01.
    """

    def show_through(over: Tensor, under: Tensor, difference: Tensor, limit: float) -> Tensor:
        return torch.lerp(under, over, (difference.square().mean(1, keepdim=True) / limit).clamp(max=1))

    draft = draft.float()
    return show_through(show_through(drawn, draft, drawn - draft, 0.04), known, draft - known, 0.01)


# --- Pictures of any shape ----------------------------------------------------------------------------------


def fit_panel(image: Image.Image, size: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The whole picture in a panel (3, P, P) in [-1, 1], and its box there: left, top, right, bottom.

    Choice: the long side is resized to P = `size` (Lanczos), the picture centred, and its border repeated
    to fill the square. Training crops instead; but whoever edits a picture wants all of it.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    picture = image_to_tensor(image.resize((width, height), Image.Resampling.LANCZOS))
    border = (left, size - width - left, top, size - height - top)
    return F.pad(picture, border, mode="replicate"), (left, top, left + width, top + height)


def unfit(answer: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The part (..., height, width) of a panel (..., P, P) that `fit_panel` filled with the picture.

    Choice: as drawn. It has the input's aspect ratio and a long side of P; enlarging would invent nothing.
    """
    left, top, right, bottom = box
    return answer[..., top:bottom, left:right]


def labelled_grid(panels: Tensor, instruction: str) -> Image.Image:
    """The four panels (4, 3, P, P) in the order of `compose_grid`, enlarged to 192 pixels and labelled."""
    factor = math.ceil(192 / panels.shape[-1])
    side, line, font = panels.shape[-1] * factor, 20, ImageFont.load_default(14)
    words = textwrap.wrap(instruction, width=side // 4)  # a letter is about 7 pixels wide
    sheet = Image.new("RGB", (2 * side, 2 * (side + line) + len(words) * line), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(("example before", "example after", "input", "answer")):
        x, y = i % 2 * side, i // 2 * (side + line)
        draw.text((x + 4, y + 2), label, "black", font)
        picture = tensor_to_image(panels[i]).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y + line))
    for i, text in enumerate(words):
        draw.text((4, 2 * (side + line) + i * line + 2), text, "black", font)
    return sheet


def save_png(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Writes the PNG whole or not at all, with `record` as JSON in its text chunk "instructgie"."""
    info = PngInfo()
    info.add_text("instructgie", json.dumps(record))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- The command --------------------------------------------------------------------------------------------


def pictures(sources: list[Path]) -> list[Path]:
    """The files as they are; for a folder all pictures in it, sorted. Raises ValueError for one without."""
    paths: list[Path] = []
    for source in sources:
        found = [source]
        if source.is_dir():
            endings = Image.registered_extensions()
            found = sorted(p for p in source.iterdir() if p.suffix.lower() in endings and p.name[0] != ".")
        if not found:
            raise ValueError(f"{source}: no picture in this folder")
        paths += found
    return paths


def output_paths(output: Path, inputs: list[Path], count: int, read: set[Path]) -> list[list[Path]]:
    """Where the `count` answers to each input go. Raises ValueError where `output` cannot take them, and
    where an answer, or its grid, would overwrite a picture of `read`."""
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
            written = {p.resolve() for p in (*paths, *map(grid_path, paths))}
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
    if not args.prompt_pair and not instruction:
        raise ValueError("nothing says which edit to make: give --prompt-pair, --instruction or both")
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in ("num_images", "batch", "steps") and value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, not {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number, not {value}")
    if not 0 <= args.seed < 2**63 - args.num_images:
        raise ValueError(f"--seed must be a whole number from 0 to 2^63 - 1, not {args.seed}")
    inputs = pictures(args.input)
    read = {path.resolve() for path in [*inputs, *(args.prompt_pair or [])]}
    targets = output_paths(args.output, inputs, args.num_images, read)
    for path in [*(args.prompt_pair or []), *inputs]:
        load_image(path)  # a broken picture should show before models are loaded

    transformers.logging.disable_progress_bar()  # of every part's loading
    model = args.model or backbone.PRESETS["toy"].editor
    dtype, has_words = getattr(torch, args.dtype), bool(instruction)
    editor = Editor.load(model, args.device, dtype, llm=has_words, offload=args.offload)
    if args.compile:
        editor.compile()
    size = editor.panel
    given = {name: getattr(args, name) for name in SAMPLING}
    sampler = {name: editor.settings[name] if value is None else value for name, value in given.items()}
    sampler["scheduler"] = args.scheduler

    pair = torch.zeros(2, 3, size, size)  # grey
    if args.prompt_pair:
        pair = torch.stack([fit_panel(load_image(path), size)[0] for path in args.prompt_pair])
    queries, boxes = zip(*(fit_panel(load_image(path), size) for path in inputs))
    (unified,) = editor.unify([instruction])
    if instruction:
        print(f'instruction: "{instruction}" -> "{unified}"', flush=True)

    jobs = [(i, k) for i in range(len(inputs)) for k in range(args.num_images)]
    for start in range(0, len(jobs), args.batch):
        batch = jobs[start : start + args.batch]
        n, asked = len(batch), torch.stack([queries[i] for i, _ in batch])
        has_example, seeds = [bool(args.prompt_pair)] * n, [args.seed + k for _, k in batch]
        given = pair.expand(n, -1, -1, -1, -1), has_example, asked, [unified] * n, seeds
        try:
            latents = editor.sample(*given, **sampler, progress=True)
        except RuntimeError as error:
            if not args.compile:
                raise
            raise ValueError(f"--compile: {str(error).splitlines()[0]}; edit without it") from error
        for (i, k), seed, answer in zip(batch, seeds, editor.decode_answers(latents).cpu()):
            record = {"instruction": instruction, "unified": unified, "input": str(inputs[i]), "seed": seed}
            record |= {"prompt_pair": [str(path) for path in args.prompt_pair or []], **sampler}
            record |= {"model": str(model), "dtype": args.dtype, "device": str(editor.sd.unet.device)}
            path = targets[i][k]
            save_png(tensor_to_image(unfit(answer, boxes[i])), path, record)
            if args.grid:
                grid = labelled_grid(torch.stack([*pair, queries[i], answer]), instruction)
                save_png(grid, grid_path(path), record)
            print(path, flush=True)


if __name__ == "__main__":
    main()
