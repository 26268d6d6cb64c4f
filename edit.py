"""Edits pictures: given one finished edit, an instruction, or both, the model makes the same edit to yours.

    python edit.py --prompt-pair before.png after.png --input mine.jpg --output out.png
    python edit.py --instruction "make it night" --input mine.jpg --output out.png
    python edit.py --prompt-pair before.png after.png --instruction "add a hat" --input photos/ --output out/
    python edit.py --model runs/train/editor --instruction "add a hat" --input a.png b.png --output out/

An edit. [figure] Its condition, U and networks; [ours] its sampling, and edits by example or words alone:

    example pair, query -> Img_VPcon = [[before, after], [query, grey]] -> G_ven, before the loop
    instruction l -> U -> l' -> text encoder, before the loop
    noise x_T; for every timestep: RCLDM(x_t, l', condition) -> residuals -> frozen U-Net -> its prediction
        (of the noise, x_0 or v, as it was trained); the sampler's step x_t -> x_(t-1)
        classifier-free guidance: away from the predictions without the instruction or the example
    lower right quadrant of x_0 -> VAE decoder -> the answer

Symbols: B samples; P panel size in pixels, p in latent pixels; C latent channels; K branches of guidance.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Edit pictures by example, by instruction, or by both.")
    add = parser.add_argument
    add("--prompt-pair", nargs=2, metavar=("BEFORE", "AFTER"), type=Path, help="the example of the edit")
    add("--instruction", default="", help="the edit in words")
    add("--input", nargs="+", type=Path, required=True, help="pictures to edit, or folders of them")
    add("--output", type=Path, required=True, help="a .png file for one answer, a folder for more")
    add("--model", help="an editor's folder, as train.py saves it (default: the toy world's)")
    add("--num-images", type=int, default=1, help="answers to each input, with seeds S, S + 1, …")
    add("--seed", type=int, default=0, help="S, the seed of the first answer to each input")
    add("--steps", type=int, help="sampling steps (default: the editor's)")
    add("--guidance-text", type=float, help="text guidance scale (default: the editor's; 1: none)")
    add("--guidance-visual", type=float, help="example guidance scale (default: the editor's; 1: none)")
    add("--scheduler", default="ddim", choices=("ddim", "euler", "euler-a", "dpm++", "unipc"), help="sampler")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the models")
    add("--grid", action="store_true", help="write the labelled grid beside each answer")
    return parser.parse_args()


if __name__ == "__main__":
    arguments()  # answers --help and misspelt options before the imports below, which take seconds

import torch
from torch import Tensor, nn

import backbone
import liu
from dataset import answer_panel, compose_grid, drop_example, mask_query
from pictures import check_finite, fit_panel, load_image, misfit, tensor_to_image, unfit
from pictures.answers import grid_path, labelled_grid, plan_answers, save_png
from pictures.pairs import clean_instruction

# --- What goes in -------------------------------------------------------------------------------------------


def condition_grids(examples: Tensor, queries: Tensor, has_example: Tensor | None = None) -> Tensor:
    """[figure] Img_VPcon: examples (B, 2, 3, P, P) and queries (B, 3, P, P) in [-1, 1] → (B, 3, 2P, 2P).

    has_example: (B,) of bool, all true if None; elsewhere the example row is grey, as in training.
    """
    grids = mask_query(compose_grid(*examples.unbind(1), queries, queries))  # the second turns grey
    if has_example is None:
        return grids
    return torch.where(has_example.to(grids.device).view(-1, 1, 1, 1), grids, drop_example(grids))


# --- Guidance -----------------------------------------------------------------------------------------------


def guidance_weights(text: float, visual: float, has_text: bool, has_pair: bool) -> dict[tuple, float]:
    """The weight of each prediction e(text, pair), by (text given, pair given); those of weight 0 left out.

    text, visual: the scales s_text and s_visual. Both 1: no guidance, e(text, pair) alone. s_text 0 ignores
    the instruction, both 0 ignore the pair too. has_text, has_pair: whether any edit has an instruction, an
    example pair. Without instructions s_text is s_visual, which spares the branch e(0, pair); without pairs
    s_visual is 1.

    [ours] Classifier-free guidance, two scales, as InstructPix2Pix (Brooks et al., 2023, section 3.2.1):
        e = e(0, 0) + s_visual · (e(0, pair) - e(0, 0)) + s_text · (e(text, pair) - e(0, pair))
    Here 0 is an empty text, or a grey example row.
    """
    visual = float(visual) if has_pair else 1.0
    text = float(text) if has_text else visual
    weights = {(False, False): 1 - visual, (False, True): visual - text, (True, True): text}
    return {branch: weight for branch, weight in weights.items() if weight != 0}


@torch.no_grad()
def encode_branches(
    sd: backbone.StableDiffusion,
    rcldm: nn.Module,
    grids: Tensor,
    instructions: list[str],
    weights: dict[tuple, float],
    device: torch.device | None = None,
) -> tuple[list[float], Tensor, Tensor]:
    """What guidance compares, K branches of B grids in one batch, encoded once for the whole loop.

    grids: condition grids (B, 3, 2P, 2P). instructions: unified. weights: of `guidance_weights`. device: of
    the text encoder, its own by default. Returns the K weights, text embeddings (K·B, T, D) and encodings of
    the condition (K·B, C0, 2p, 2p).
    """
    texts = [text if has_text else "" for has_text, _ in weights for text in instructions]
    states = backbone.encode_text(sd, texts, device)
    shown = {has_pair for _, has_pair in weights}  # branches share these grids
    encoded = {pair: rcldm.encode_condition(grids if pair else drop_example(grids)) for pair in shown}
    return [*weights.values()], states, torch.cat([encoded[has_pair] for _, has_pair in weights])


# --- The sampling loop --------------------------------------------------------------------------------------


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """A generator for each seed; on the CPU, so that a seed means the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def initial_noise(sd: backbone.StableDiffusion, panel: int, generators: list[torch.Generator]) -> Tensor:
    """x_T, each grid's by a generator of its own: (B, C, 2p, 2p), on the CPU."""
    shape = sd.unet.config.in_channels, *[2 * panel // backbone.vae_factor(sd.vae)] * 2
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


@torch.no_grad()
def sample(
    sd: backbone.StableDiffusion,
    rcldm: nn.Module,
    branches: tuple[list[float], Tensor, Tensor],
    noise: Tensor,
    steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    after_step: Callable | None = None,
) -> Tensor:
    """Draws the grids of B edits from noise (B, C, 2p, 2p): latents of that shape, float32.

    branches: of `encode_branches`. generator: of the fresh noise that some samplers add. after_step: for
    apps/pipeline.py; called with the step's number, timestep and output; returns the x_t to go on with, and
    whether to go on. Raises ValueError where latents are not finite, with the step's number.
    """
    scheduler, (weights, states, condition) = sd.scheduler, branches
    backbone.set_timesteps(scheduler, steps, noise.device)
    x_t = check_finite(noise, "the noise").float() * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(x_t.repeat(len(weights), 1, 1, 1), t).to(sd.unet.dtype)
        down, mid = rcldm(inputs, t, states, condition, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        predictions = sd.unet(inputs, t, states, **residuals).sample.float().chunk(len(weights))
        prediction = sum(weight * e for weight, e in zip(weights, predictions))  # (B, C, 2p, 2p)
        output = backbone.sampler_step(scheduler, prediction, t, x_t, generator)
        x_t = output.prev_sample
        if not x_t.isfinite().all():
            where = f"step {i + 1} of {len(scheduler.timesteps)}"
            raise ValueError(f"{where}: NaN or infinity; take float32, or another sampler or number of steps")
        if after_step is not None:
            x_t, goes_on = after_step(i, t, output)
            if not goes_on:
                break
    return check_finite(x_t, "the grid as drawn")


# --- What comes out -----------------------------------------------------------------------------------------


@torch.no_grad()
def decode_answers(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents of grids (B, C, 2p, 2p) → the answers (B, 3, P, P) in [-1, 1], float32.

    [ours] Only the answer is decoded; the figure draws the whole grid. Raises ValueError for NaN or infinity.
    """
    return check_finite(backbone.decode_latents(vae, answer_panel(latents)), "the VAE's picture")


# --- The command --------------------------------------------------------------------------------------------


@backbone.one_line_errors("edit.py")
def main() -> None:
    args = arguments()
    instruction = clean_instruction(args.instruction) if args.instruction.strip() else ""
    if not args.prompt_pair and not instruction:
        raise ValueError("nothing says which edit to make: give --prompt-pair, --instruction or both")
    backbone.check_numbers(args, {(1, 10_000): "num_images", (1, math.inf): "steps", (0, 2**62): "seed"})
    pair = tuple(map(load_image, args.prompt_pair or [])) or None
    if pair and (reason := misfit(*pair)):  # training has no such pairs
        print(f"{args.prompt_pair[1]}: {reason}; the example may teach another edit", file=sys.stderr)
    inputs, targets = plan_answers(args.input, args.output, args.num_images, args.prompt_pair or [])

    backbone.hide_progress_bars()
    device, dtype = backbone.pick_device(args.device), getattr(torch, args.dtype)
    model = args.model or backbone.PRESETS["toy"].editor
    sd, rcldm, llm, settings = backbone.load_parts(model, device, dtype, words=bool(instruction))
    sd, panel = sd._replace(scheduler=backbone.new_sampler(args.scheduler, sd.scheduler)), settings["panel"]
    given = {name: getattr(args, name) for name in backbone.SAMPLING}
    used = {name: settings[name] if value is None else value for name, value in given.items()}

    (unified,) = liu.InstructionUnifier(*llm).unify([instruction]) if llm else [instruction]
    if instruction:
        print(f'instruction: "{instruction}" -> "{unified}"', flush=True)
    for line in backbone.cut_off(sd.tokenizer, [unified]).values():
        print(line, file=sys.stderr)
    example = torch.zeros(2, 3, panel, panel)
    if pair is not None:
        example = torch.stack([fit_panel(picture, panel)[0] for picture in pair])
    scales = used["guidance_text"], used["guidance_visual"]
    weights = guidance_weights(*scales, bool(instruction), pair is not None)
    record = {"instruction": instruction, "unified": unified, **used, "model": model, "device": device}
    record |= {name: getattr(args, name) for name in ("prompt_pair", "scheduler", "dtype")}

    # [ours] One answer at a time: a batch would be faster, but its size would change an answer's last bits.
    for source, paths in zip(inputs, targets):
        query = load_image(source)
        picture, box = fit_panel(query, panel)
        grid = condition_grids(example[None], picture[None], torch.tensor([pair is not None]))
        branches = encode_branches(sd, rcldm, grid.to(device, dtype), [unified], weights)
        for seed, path in enumerate(paths, start=args.seed):
            generators = seeded([seed])
            noise = initial_noise(sd, panel, generators).to(device)
            latents = sample(sd, rcldm, branches, noise, used["steps"], generators)
            answer = tensor_to_image(unfit(decode_answers(sd.vae, latents)[0], box))
            record |= {"input": source, "seed": seed}
            save_png(answer, path, record)
            if args.grid:
                save_png(labelled_grid(pair, query, answer, instruction, panel), grid_path(path), record)
            print(path, flush=True)


if __name__ == "__main__":
    main()
