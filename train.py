"""Trains InstructGIE: a ControlNet with VMamba encoder and links learns to fill in the last panel of a grid.

    python train.py                                  # the toy world, on whatever this machine has
    python train.py --no-sam                         # an ablation; also --no-rcldm, --no-esm, --no-liu
    python train.py --resume --output runs/train     # continues a stopped run
    python train.py --backbone sd15 --data FOLDER --precision bf16 --gradient-checkpointing --batch 4
    accelerate launch train.py …                     # the same on several GPUs, or several machines

[figure] One step, where Img_train is the whole 2×2 grid and Img_VPcon the same with its answer grey:

    panels of Img_train -> VAE -> x_0; with noise -> x_t     instruction l -> U, an LLM -> l' -> text encoder
    Img_VPcon -> G_ven; with x_t and l' -> trainable copy -> Zero-VMamba links -> residuals
    frozen U-Net(x_t, l', residuals) -> prediction -> x̂_0, the clean latents it implies -> L_es, L_sam
    L = L_dm + λ_es · L_es + λ_sam · L_sam

[ours] The VAE encodes each panel separately. [ours] L_es and L_sam use x̂_0 where the figure shows the output
image, and only its answer panel. [ours] The losses are summed with weights λ.
The file reads from top to bottom: settings, one step's losses, the loop. The frozen parts
process the data once, before the first step, in training/precompute.py.
Symbols: B grids of a batch; P panel size in pixels, p in latent pixels; C latent channels; T tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import backbone
import edit
import esm
import liu
import sam_loss
from dataset import VisualPromptDataset, answer_panel, compose_grid, drop_example, mask_query
from disk import locked
from pictures.pairs import read_pairs
from rcldm import RCLDM
from training.card import save_editor
from training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from training.draws import draw_noise, draw_order, draw_timesteps, keep_conditions, step_generator
from training.ema import EMA
from training.graphs import recorded
from training.hardware import checkpoint_gradients, on_every_core
from training.monitor import LossMonitor
from training.muon import Muon, parameter_groups
from training.precompute import Frozen, Precomputed, gather_batch, load_batches, precompute, read_instructions
from training.replies import ReplyCache
from training.settings import PARTS, fill_in, note_settings
from training.stopping import Stop
from training.validation import Validation

# ----------------------------------------------------------------------------------------------------------
# Settings, each once; reasons in docs/choices.md


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    parser = backbone.new_parser("train.py", __doc__)
    add = parser.add_argument
    add("--backbone", default="toy", help=f"preset of pretrained parts: {', '.join(backbone.PRESETS)}")
    for part in PARTS:
        add(f"--{part.replace('_', '-')}", help="hub id or folder instead of the preset's")
    add("--data", help="dataset with a split `train`: a folder or a hub id (default: the preset's)")
    add("--columns", **backbone.COLUMNS)
    add("--output", type=Path, default=Path("runs/train"), help="checkpoints, pictures and the final editor")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add("--init", help="folder of an editor to start from, instead of from the U-Net's weights")
    add("--seed", type=int, default=0, help="seed of weights, data order and noise")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="no", choices=("no", "bf16", "fp16"), help="number format of autocast")

    # The contributions. Each has a switch, as in the paper's ablation.
    add("--no-rcldm", action="store_true", help="ControlNet's convolutions in place of VMamba")
    add("--no-esm", action="store_true", help="without editing-shift matching")
    add("--no-liu", action="store_true", help="instructions as people wrote them")
    add("--no-sam", action="store_true", help="without selective-area matching")

    # [ours] All numbers below. The paper's summary and figures give none of them.
    add("--steps", type=int, default=1500, help="optimiser steps; on two CPU cores about half an hour")
    add("--batch", type=int, default=64, help="grids per process and pass; on a CPU, of all processes")
    add("--accumulate", type=int, default=1, help="batches per optimiser step")
    add("--lr", type=float, help="peak rate (default: the preset's); warm-up, then cosine to 1 %% of it")
    add("--answer-weight", type=float, default=4.0, help="weight of the answer panel in L_dm; others: 1")
    add("--change-weight", type=float, default=1.0, help="extra weight of changed latents, × --answer-weight")
    add("--es-weight", type=float, default=0.6, help="λ_es")
    add("--sam-weight", type=float, default=0.3, help="λ_sam")
    add("--panel", type=int, help="P, pixels along a panel's side (default: the preset's)")

    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--workers", type=int, default=1, help="processes that decode pictures")
    add("--cache", type=Path, default=Path("data/cache"), help="cached outputs of the frozen parts")
    add("--save-every", type=int, default=500, help="steps between checkpoints and validation pictures")
    return parser.parse_args(argv)


# [ours] Schedule, clipping and EMA: common values.
WARMUP = 50  # steps
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0  # the largest norm of the gradient
EMA_DECAY = 0.998
# [ours] Conditioning dropout teaches edits by the example alone and by the instruction alone (given both, a
# model may ignore one of them). It also makes guidance possible.
DROP = 0.3, 0.4, 0.05  # shares without the instruction, without the example pair, without both
# [ours] L_es decodes one in 32 answers of a batch, at least one: decoder and CLIP cost the most.
ES_EVERY = 32
CHECKPOINTS = 2  # that stay


# ----------------------------------------------------------------------------------------------------------
# One step's losses


def panel_weights(query: Tensor, answer: float, change: float) -> Tensor:
    """The weight of every latent in L_dm: latents of query pairs (B, 2, C, p, p) → (B, 1, 2p, 2p).

    [ours] The given panels only have to be copied, so they weigh 1. The answer panel weighs
    answer · (1 + change · d), where d is the length of each latent's change over the panel's mean. So a small
    edit counts like a large one.
    """
    changed = (query[:, 1] - query[:, 0]).norm(dim=1, keepdim=True)  # (B, 1, p, p)
    changed = changed / changed.mean((2, 3), keepdim=True).clamp_min(1e-6)
    return compose_grid(*[torch.ones_like(changed)] * 3, answer * (1 + change * changed))


class Losses:
    """L = L_dm + λ_es · L_es + λ_sam · L_sam, for batches of the data loader.

    precomputed: the frozen parts' outputs for every pair. texts (I + 1, T, D): embeddings of the I unified
    forms, then of the empty text; D is their width. rows: the row of `texts` for each pair.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        sd: backbone.StableDiffusion,
        clip: nn.Module | None,
        precomputed: Precomputed,
        texts: Tensor,
        rows: Tensor,
    ) -> None:
        self.args, self.sd, self.clip = args, sd, clip
        self.precomputed, self.texts, self.rows = precomputed, texts, rows
        grey = backbone.encode_images(sd.vae, torch.zeros(1, 3, args.panel, args.panel, device=sd.vae.device))
        self.grey_row = torch.cat([grey[0], grey[0]], dim=-1)  # (C, p, 2p)

    def compose(self, batch: dict, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Precomputed]:
        """The condition grids Img_VPcon, their latents x_0, l' as embeddings (B, T, D), and the precomputed
        outputs for the query pairs."""
        device = self.sd.unet.device
        panels, example, query = gather_batch(batch, self.precomputed, device)
        condition = mask_query(compose_grid(*panels.unbind(1)))  # (B, 3, 2P, 2P)
        x_0 = compose_grid(*example.latents.unbind(1), *query.latents.unbind(1))  # (B, C, 2p, 2p)
        row = self.rows[batch["index"]]

        # [ours] A missing example is grey in the target too: the model is not asked to invent one. The last
        # row is the empty text.
        keep_text, keep_example = keep_conditions(len(row), DROP, g)
        row = torch.where(keep_text, row, len(self.texts) - 1)
        condition[~keep_example] = drop_example(condition[~keep_example])
        x_0[~keep_example, :, : len(self.grey_row[0])] = self.grey_row
        return condition, x_0, self.texts[row.to(self.texts.device)].to(device), query

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, states: Tensor, condition: Tensor) -> Tensor:
        """What the frozen U-Net predicts, (B, C, 2p, 2p), with the residuals of the RCLDM `model`."""
        down, mid = model(x_t, t, states, condition, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.sd.unet(x_t, t, states, **residuals).sample.float()

    def __call__(self, model: nn.Module, batch: dict, g: torch.Generator) -> dict[str, Tensor]:
        """The weighted sum `loss`, and its terms `dm`, `es` and `sam` without their weights, all scalars.

        g: this step's random numbers.
        """
        args, scheduler, device = self.args, self.sd.scheduler, self.sd.unet.device
        condition, x_0, states, query = self.compose(batch, g)
        noise = draw_noise(x_0.shape, g, device)
        t = draw_timesteps(len(x_0), scheduler.config.num_train_timesteps, g)
        reliability = esm.reliability(t, scheduler)  # (B,)
        reliable = reliability.nonzero()[:, 0]  # S of them; on the CPU: nonzero would wait for a GPU
        to_decode = reliable[: math.ceil(len(t) / ES_EVERY)]
        t, reliability, to_decode = (x.to(device) for x in (t, reliability, to_decode))
        x_t = scheduler.add_noise(x_0, noise, t)

        prediction = self.predict(model, x_t, t, states, condition)
        error = (prediction - backbone.prediction_target(x_0, noise, t, scheduler)).square()
        weight = panel_weights(query.latents, args.answer_weight, args.change_weight)
        losses = {"dm": (weight * error).mean() / weight.mean()}

        x_0_hat = esm.predict_x0(x_t, prediction, t, scheduler)
        if not args.no_esm:
            losses["es"] = 0 * losses["dm"]  # if all are too noisy: all processes average the same losses
            if len(to_decode):
                before, after = query.embeddings[to_decode].unbind(1)
                answers = esm.decode_answer(self.sd.vae, x_0_hat[to_decode])
                of_decoded = esm.editing_shift_loss(self.clip, before, answers, after, reliability[to_decode])
                losses["es"] = len(reliable) / len(t) * of_decoded  # they represent all reliable ones
        if not args.no_sam:
            panels = answer_panel(x_0_hat), answer_panel(x_0)
            bound = sam_loss.noise_weight(t, scheduler)
            losses["sam"] = sam_loss.selective_area_loss(*panels, query.areas, bound)
        weights = {"dm": 1.0, "es": args.es_weight, "sam": args.sam_weight}
        return {"loss": sum(weights[name] * value for name, value in losses.items()), **losses}


# ----------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step: int, args: argparse.Namespace) -> float:
    cosine = (1 + math.cos(math.pi * step / max(1, args.steps))) / 2
    return args.lr * min(1, (step + 1) / WARMUP) * max(cosine, 0.01)


def prepare(
    args: argparse.Namespace, classes: tuple[str, ...] | None, device: torch.device, lock: Callable
) -> tuple[VisualPromptDataset, Losses, Validation]:
    """The pairs of `train`, the losses and the validation. Segmenter and language model have then done their
    work, and their memory is free again.

    classes: whose areas the segmenter selects; None asks the language model for them. lock: called
    once all parts are there, before the long work.
    """
    source = backbone.data_folder(args.data)
    data = VisualPromptDataset(read_pairs(source, "train", args.columns), args.panel, args.seed)
    sd = backbone.load_stable_diffusion(args.stable_diffusion, device)
    if args.panel % (factor := backbone.vae_factor(sd.vae)):
        raise ValueError(f"--panel {args.panel}: give a multiple of {factor}, as the autoencoder needs")
    clip = None if args.no_esm else backbone.load_clip(args.clip, device)
    llm = areas = unifier = None
    if not args.no_liu or not (args.no_sam or classes):
        llm = backbone.load_llm(args.llm, device)
    if not args.no_sam:
        segmenter, processor = backbone.load_segmenter(args.segmenter, device)
        classes = classes or sam_loss.propose_classes(*llm, segmenter.config.id2label.values())
        print(f"selective areas: {', '.join(classes)}", flush=True)
        areas = sam_loss.SelectiveAreas(segmenter, processor, classes)
    lock()
    data, precomputed = precompute(data, Frozen(sd.vae, clip, areas), args, device)
    if not args.no_liu:
        unifier = liu.InstructionUnifier(*llm, cache=ReplyCache(args.cache / "liu", *llm))
    texts, rows = read_instructions(data, sd, unifier)
    validation = Validation(data, source, unifier.unify if unifier else list, args)
    return data, Losses(args, sd, clip, precomputed, texts, rows), validation


def train(args: argparse.Namespace, stop: Stop, held: contextlib.ExitStack, new_model=RCLDM.from_unet):
    """Trains one RCLDM: checkpoints, validation pictures and the editor are in `args.output`.

    held: closes the lock, the progress bar and the log, also after an error. new_model: makes the RCLDM for a
    U-Net; evaluation/vit.py has another.
    """
    preset = fill_in(args)
    device = backbone.pick_device(args.device)
    options = {"mixed_precision": args.precision, "gradient_accumulation_steps": args.accumulate}
    # A CUDA graph would keep what autocast's cache holds: weights that were cast once, before training.
    handlers = [InitProcessGroupKwargs(timeout=backbone.PATIENCE), AutocastKwargs(cache_enabled=False)]
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=handlers, **options)
    held.callback(accelerator.end_training)  # its threads may abort a process that ends before them
    device, is_main = accelerator.device, accelerator.is_main_process
    device = torch.device("cpu") if device.type == "cpu" else device  # not "cpu:0", which safetensors refuses
    backbone.choose_kernels(device, args.precision)
    with accelerator.main_process_first():  # the first process computes, the others find it cached
        lock = partial(held.enter_context, locked(args.output)) if is_main else lambda: None
        data, losses_of, validation = prepare(args, preset.classes, device, lock)
    sd, clip = losses_of.sd, losses_of.clip

    torch.manual_seed(args.seed)
    design = "conv" if args.no_rcldm else "vmamba"
    model = new_model(sd.unet, design=design, factor=backbone.vae_factor(sd.vae), panel=args.panel).to(device)
    if args.init:
        load_weights(model, args.init)
    if is_main:
        note_settings(args, accelerator.num_processes, device)
    if args.gradient_checkpointing:
        checkpoint_gradients(clip, model, sd.unet, sd.vae)
    ema = EMA(model, EMA_DECAY)
    optimizer = Muon(parameter_groups(model, WEIGHT_DECAY), args.lr)
    modules = {"model": model, "ema": ema, "monitor": (monitor := LossMonitor())}
    start = load_checkpoint(args.output, modules, optimizer) if args.resume else 0
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    rank, processes = accelerator.process_index, accelerator.num_processes
    steps = range(start * args.accumulate, args.steps * args.accumulate)
    order = draw_order(len(data), args.batch, args.seed, steps, rank, processes)
    loader = load_batches(data, losses_of.precomputed, order, args.workers)
    log = held.enter_context(SummaryWriter(args.output / "tensorboard")) if is_main else None
    progress = tqdm(total=args.steps, initial=start, desc="train", mininterval=2, disable=not is_main)
    held.callback(progress.close)  # else it would be drawn below the line of an error
    accelerator.print(f"{model.num_parameters():,} parameters to train, {len(data)} pairs", flush=True)

    wrapped.train()
    # On one GPU, this replays `predict` as a CUDA graph.
    losses_of.predict = recorded(losses_of.predict, wrapped, device, args, processes)
    stop.at_work = True
    for micro, batch in zip(steps, loader):
        step = micro // args.accumulate
        g = step_generator(args.seed, micro, rank, processes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():
                losses = losses_of(wrapped, batch, g)
            accelerator.backward(losses["loss"])
            monitor.add({name: accelerator.reduce(loss.detach(), "mean") for name, loss in losses.items()})
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
                if is_sound := monitor.is_sound(norm):
                    optimizer.step()
                elif accelerator.scaler is not None:
                    accelerator.scaler.update()  # fp16: a smaller scale may be all that it takes
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        if is_sound:
            ema.update_parameters(model)
        step += 1
        if progress.update() or step == args.steps:  # when the bar is drawn: reading losses waits for the GPU
            progress.set_postfix(monitor.text())
        stop.agree(accelerator)
        is_done, stops_early = step == args.steps, bool(stop.asked or monitor.gave_up)
        saves = step % args.save_every == 0 or is_done or stops_early
        if is_main and (step % 20 == 0 or saves):
            monitor.write(log, step)
        if is_main and saves:
            if is_done or not stops_early:
                measured = {name: value.item() for name, value in monitor.averages.items()}
                answers_of = partial(answer, sd, ema.module)
                measured[validation.name] = validation.measure(answers_of, args.output, step, log)
                save_editor(ema.module, args, step, measured)
            # The checkpoint comes last: a run that is killed above goes on from the one before, and makes
            # this step's picture and editor once more.
            save_checkpoint(args.output, step, modules, optimizer.optimizer, keep=CHECKPOINTS)
        if stops_early:
            accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one ends
        monitor.check("try --resume with a lower --lr or with --precision no")
        if stop.asked and step < args.steps:
            stop.end(f"step {step}")
    progress.close()
    accelerator.print(f"the editor is in {args.output / 'editor'}")


def answer(sd: backbone.StableDiffusion, model: RCLDM, panels: Tensor, texts: list[str]) -> Tensor:
    """The answers that `edit.py` draws without guidance: panels (N, 4, 3, P, P) → (N, 3, P, P) in [-1, 1]."""
    panels = panels.to(sd.unet.device)
    grids = edit.condition_grids(panels[:, :2], panels[:, 2])
    branches = edit.encode_branches(sd, model.eval(), grids, texts, {(True, True): 1.0})
    generators = edit.seeded(range(len(panels)))
    noise = edit.initial_noise(sd, panels.shape[-1], generators).to(panels.device)
    drawn = edit.sample(sd, model, branches, noise, backbone.SAMPLING["steps"], generators)
    return edit.decode_answers(sd.vae, drawn)


def work(args: argparse.Namespace, new_model: Callable) -> None:
    with Stop() as stop, contextlib.ExitStack() as held:
        train(args, stop, held, new_model)


@backbone.one_line_errors("train.py")
def main(new_model=RCLDM.from_unet) -> None:
    on_every_core(work, settings(), new_model)


if __name__ == "__main__":
    main()
