"""Trains InstructGIE: a ControlNet of VMamba blocks learns to draw the missing panel of a 2×2 grid.

    python train.py                                  # the toy world, on whatever this machine has
    python train.py --no-sam                         # an ablation; so --no-rcldm, --no-esm, --no-liu
    python train.py --resume --output runs/train     # goes on where a stopped run stood
    python train.py --backbone sd15 --data FOLDER --precision bf16 --batch 8 --accumulate 4
    accelerate launch train.py --backbone sd15 --data FOLDER      # several GPUs, or several machines

One step, in the words of the paper's architecture figure:

    Img_train  -> VAE -> x_0, with noise x_t        Img_VPcon -> G_ven, trainable copy, links -> residuals
    instruction l -> U -> l' -> text encoder        frozen U-Net(x_t, l', residuals) -> prediction, x̂_0
    L = L_dm + λ_es · L_es + λ_sam · L_sam

The file reads from top to bottom: settings, the losses, the prompt encoder's own lessons, the loop. What the
frozen parts make of the data, once, is in training/precompute.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import backbone
import esm
import liu
import sam_loss
from dataset import (
    COLUMNS,
    DatasetError,
    VisualPromptDataset,
    answer_panel,
    compose_grid,
    drop_example,
    mask_query,
    read_pairs,
    repeat_query,
)
from pictures import ImageError, tensor_to_image
from pipeline import SAMPLING, InstructGIEPipeline, model_card
from rcldm import RCLDM, VisualPromptEncoder
from training.checkpoint import load_checkpoint, save_checkpoint
from training.ema import new_ema
from training.files import locked, other_settings, whole_folder, write_whole
from training.monitor import LossMonitor
from training.precompute import (
    Facts,
    Frozen,
    load_batches,
    look_up,
    observe_all,
    read_instructions,
)
from training.replies import ReplyCache
from training.stopping import Stop

# ----------------------------------------------------------------------------------------------------------
# Settings: every one once, with its reason


def settings(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train InstructGIE.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--backbone", default="toy", help=f"preset of pretrained parts: {', '.join(backbone.PRESETS)}")
    for part in ("stable_diffusion", "clip", "segmenter", "llm"):
        add(f"--{part.replace('_', '-')}", help="hub id or folder instead of the preset's")
    add("--data", help="dataset: a folder or a hub id (default: the preset's)")
    add("--split", default="train", help="to train on")
    add("--validation-split", default="seen", help="to draw validation pictures from")
    add("--columns", **COLUMNS)
    add("--output", type=Path, default=Path("runs/train"), help="checkpoints, pictures and the final editor")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    add("--init", help="an editor's folder whose weights to start from, instead of the U-Net's")
    add("--init-encoder", help="an editor's folder whose prompt encoder to start from; it is taught on")
    add("--seed", type=int, default=0, help="of weights, data order and noise")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="no", choices=("no", "bf16", "fp16"), help="of autocast")

    # The contributions. Each has a switch, as in the paper's ablation.
    add("--no-rcldm", action="store_true", help="ControlNet's convolutions in place of VMamba")
    add("--encoder", default="vmamba", choices=("vmamba", "vit"), help="what the RCLDM is built of")
    add("--no-encoder-text", action="store_true", help="the figure's: words to the U-Nets alone")
    add("--no-encoder-latents", action="store_true", help="the encoder draws what stays, too")
    add("--no-esm", action="store_true", help="without editing-shift matching")
    add("--no-liu", action="store_true", help="instructions as people wrote them")
    add("--no-sam", action="store_true", help="without selective-area matching")

    # Choice: all numbers below. The paper gives none of them.
    add("--steps", type=int, default=500, help="optimiser steps; on two CPU cores about half an hour in all")
    add("--batch", type=int, default=16, help="grids per step and process")
    add("--accumulate", type=int, default=1, help="batches per optimiser step")
    add("--lr", type=float, help="peak (default: the preset's); warm-up, then cosine to a tenth of it")
    add("--warmup", type=int, default=50, help="steps")
    add("--encoder-steps", type=int, default=1000, help="before all others, of the prompt encoder alone")
    add("--encoder-batch", type=int, help="as --batch, while it is taught (default: the same)")
    add("--encoder-lr", type=float, default=0.1, help="of a taught encoder thereafter, times --lr; 0: frozen")
    add(
        "--encoder-width",
        type=int,
        help="channels of its blocks (default: as of --init, or the U-Net's first level)",
    )
    add("--auxiliary-weight", type=float, default=0.3, help="of saying what it sees, while it is taught")
    add("--noise-power", type=float, default=1.0, help="above 1: strong noise comes more often than weak")
    add("--optimizer", default="adamw", choices=("adamw", "adamw-8bit"), help="8 bit: needs bitsandbytes")
    add("--weight-decay", type=float, default=0.01)
    add("--clip-norm", type=float, default=1.0, help="largest norm of the gradient")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights, which are what is saved")
    add(
        "--answer-weight",
        type=float,
        default=4.0,
        help="of the answer panel in L_dm; the given panels have 1",
    )
    add("--edit-weight", type=float, default=1.0, help="what its edited places weigh besides, in L_dm")
    add("--es-weight", type=float, default=0.05, help="λ_es")
    add("--es-samples", type=int, default=4, help="answers decoded for L_es in a batch at most: memory, time")
    add("--tiny-decoder", help="hub id or folder of an AutoencoderTiny that decodes them, such as TAESD")
    add("--sam-weight", type=float, default=0.1, help="λ_sam")
    add("--sam-classes", nargs="+", help="names of the segmenter's classes (default: the preset's)")
    add("--sam-propose", action="store_true", help="let the language model choose the segmenter's classes")
    # Dropout makes guidance possible, and edits by the example alone or by the instruction alone.
    add("--drop-text", type=float, default=0.5, help="share of samples without the instruction")
    add("--drop-example", type=float, default=0.2, help="share of samples without the example pair")
    add("--drop-both", type=float, default=0.05, help="share of samples without either")
    add("--panel", type=int, help="P, pixels along a panel's side (default: the preset's)")

    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--workers", type=int, default=1, help="processes that decode pictures")
    add(
        "--cache",
        type=Path,
        default=Path("data/cache"),
        help="what the frozen parts computed, kept for later runs",
    )
    add("--checkpoint-every", type=int, default=100, help="steps")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--validate-every", type=int, default=500, help="steps")
    add("--validation-pictures", type=int, default=6)
    return parser.parse_args(argv)


BOUNDS = {
    (1, math.inf): "steps accumulate warmup es_samples checkpoint_every keep validate_every",
    (0, math.inf): "encoder_steps weight_decay validation_pictures auxiliary_weight "
    "answer_weight edit_weight es_weight sam_weight",
    (0, 1): "lr encoder_lr ema drop_both drop_text drop_example",
    (1e-6, math.inf): "noise_power clip_norm",
    (1, 4096): "batch encoder_batch encoder_width",
    (8, 1024): "panel",
    (0, 256): "workers",
    (0, 2**32): "seed",
}


# ----------------------------------------------------------------------------------------------------------
# One step's losses


def dropout(batch: int, drop: tuple[float, float, float], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which samples keep their instruction and which their example pair: two (B,) of bool.

    drop: shares of samples without either, without the instruction, without the example pair.
    """
    both, text, example = drop
    u = torch.rand(batch, generator=g)
    return u >= both + text, ~((u < both) | ((u >= both + text) & (u < both + text + example)))


def draw_timesteps(u: Tensor, power: float, count: int) -> Tensor:
    """Noise levels 0 … count - 1 from uniform u in [0, 1); a power above 1 makes strong noise likelier.

    Choice: all alike, as Stable Diffusion was trained.
    """
    share = 1 - (1 - u) ** power
    return (share * count).long().clamp(max=count - 1)  # a share may round to 1


def prediction_target(x_0: Tensor, noise: Tensor, t: Tensor, scheduler) -> Tensor:
    """What this scheduler's U-Net is to answer for x_t, from which `esm.predict_x0` tells x_0."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(x_0, noise, t)
    return x_0 if kind == "sample" else noise


def place_weights(query: Tensor, drawn: Tensor, answer_weight: float, edit_weight: float) -> Tensor:
    """What an error weighs by its place, (B, 1, 2p, 2p).

    query: latents of the query pairs (B, 2, C, p, p). drawn: of the model's answers to them (B, C, p, p).

    Choice: the given panels only have to be copied, so the answer's error counts for more. So do, within the
    answer, the places that the edit changes, as much in all for a smile as for a new background: by area
    alone, small edits are drowned by large ones, and not learnt. And so do those that it should not change,
    but the model does: else, in doubt which thing is meant, it pays to change both. A bound keeps one place
    from being all.
    """
    answers = torch.stack([query[:, 1], drawn.detach()], 1)
    change = (answers - query[:, :1]).square().mean(2).amax(1, keepdim=True)  # (B, 1, p, p)
    share = change / change.mean((2, 3), keepdim=True).clamp(min=1e-4)
    given = torch.ones_like(share)
    return compose_grid(given, given, given, answer_weight * (1 + edit_weight * share.clamp(max=32)))


class Losses:
    """L = L_dm + λ_es · L_es + λ_sam · L_sam, for batches of the data loader.

    decoder: of the answers for L_es; None is the VAE's. accelerator: of the processes that share a step. Each
    draws what is random for all of them, and takes its share; and a mean over samples is one over all of
    theirs. So their number does not change what is learnt, unless `--es-samples` leaves answers out.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        sd: backbone.StableDiffusion,
        frozen: Frozen,
        facts: Facts,
        texts: Tensor,
        rows: Tensor,
        decoder: nn.Module | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.args, self.sd, self.frozen, self.decoder = args, sd, frozen, decoder or sd.vae
        self.facts, self.texts, self.rows, self.accelerator = facts, texts, rows, accelerator
        self.processes = accelerator.num_processes if accelerator else 1
        self.drop = args.drop_both, args.drop_text, args.drop_example
        grey = torch.zeros(1, 2, 3, args.panel, args.panel, device=sd.vae.device)
        self.grey = Frozen(sd.vae, None, None).observe(grey).latents[0, 0]  # (C, p, p)

    def share(self, drawn: Tensor) -> Tensor:
        """This process's part of what was drawn for all of them."""
        return drawn.chunk(self.processes)[self.accelerator.process_index] if self.processes > 1 else drawn

    def draw(
        self, batch: dict, keep: tuple[Tensor, Tensor], device: torch.device
    ) -> tuple[Tensor, Tensor, Facts, Tensor]:
        """A step's condition grids, their latents x_0, facts and text embeddings (B, T, D). keep: which
        samples are told the instruction and which show their example pair, both (B,), see `dropout`."""
        count, (keep_text, keep_example) = len(batch["index"]), keep
        panels, facts = look_up(batch, self.facts, device)
        condition = mask_query(compose_grid(*panels.unbind(1)))
        latents = facts.latents.clone()
        gone = ~keep_example
        condition[gone] = drop_example(condition[gone])
        latents[:count][gone] = self.grey.to(latents)  # the model is not asked to invent an example
        x_0 = compose_grid(*latents[:count].unbind(1), *latents[count:].unbind(1))
        row = torch.where(keep_text, self.rows[batch["index"]], len(self.texts) - 1)
        states = self.texts[row.to(self.texts.device)].to(device)
        return condition, x_0, facts, states

    def over_all(self, mean: Tensor, count: Tensor | float) -> Tensor:
        """A mean over `count` things of this process, so scaled that the processes' mean is that over all."""
        if self.processes == 1:
            return mean
        count = torch.as_tensor(count, dtype=torch.float32, device=mean.device)
        return mean * count / self.accelerator.reduce(count, "mean").clamp(min=1e-9)

    def of_all(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a step of this process → those of all processes' together, without gradients."""
        if self.processes == 1:
            return losses
        return {name: self.accelerator.reduce(value.detach(), "mean") for name, value in losses.items()}

    def mean(self, error: Tensor, query: Tensor, drawn: Tensor) -> Tensor:
        """Weighted mean of the errors of drawn grids, both (B, C, 2p, 2p); query (B, 2, C, p, p) as above."""
        weights = self.args.answer_weight, self.args.edit_weight
        weight = place_weights(query, answer_panel(drawn), *weights)
        return self.over_all((weight * error).mean() / weight.mean(), weight.mean())

    def __call__(self, model: nn.Module, batch: dict, g: torch.Generator) -> dict[str, Tensor]:
        args, scheduler = self.args, self.sd.scheduler
        device = self.sd.unet.device
        count = len(batch["index"])
        of_all = count * self.processes
        keep_text, keep_example = map(self.share, dropout(of_all, self.drop, g))
        condition, x_0, facts, states = self.draw(batch, (keep_text, keep_example), device)
        noise = self.share(torch.randn(of_all, *x_0.shape[1:], generator=g)).to(device)
        timesteps = scheduler.config.num_train_timesteps
        t = self.share(draw_timesteps(torch.rand(of_all, generator=g), args.noise_power, timesteps))
        trust = esm.noise_weight(t, scheduler)  # (B,)
        chosen = trust.nonzero()[: args.es_samples, 0]  # found here, where no device has to be waited for
        t, trust, chosen = (x.to(device) for x in (t, trust, chosen))
        x_t = scheduler.add_noise(x_0, noise, t)

        down, mid = model(x_t, t, states, condition, known=repeat_query(x_0), return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        prediction = self.sd.unet(x_t, t, states, **residuals).sample.float()

        target = prediction_target(x_0, noise, t, scheduler)
        x_0_hat = esm.predict_x0(x_t, prediction, t, scheduler)
        losses = {"dm": self.mean((prediction - target).square(), facts.latents[count:], x_0_hat)}

        if not args.no_esm:
            before, after = facts.embeddings[count:][chosen].unbind(1)
            distance = 0 * losses["dm"]
            if len(chosen):
                drawn = esm.decode_answer(self.decoder, x_0_hat[chosen])
                distance = esm.editing_shift_loss(self.frozen.clip, before, drawn, after, trust[chosen])
            losses["es"] = self.over_all(distance, len(chosen))
        if not args.no_sam:
            panels, areas = (answer_panel(x_0_hat), answer_panel(x_0)), facts.areas[count:]
            error = sam_loss.selective_area_loss(*panels, areas, trust)
            losses["sam"] = self.over_all(error, ((areas.flatten(1).sum(1) > 0) & (trust > 0)).sum())
        weights = {"dm": 1.0, "es": args.es_weight, "sam": args.sam_weight}
        return {"loss": sum(weights[name] * value for name, value in losses.items()), **losses}


def place_classes(facts: Facts) -> Tensor:
    """What each place of a batch's grids shows, (B, 2p, 2p), numbers of classes."""
    example, query = facts.classes[:, :, None].long().chunk(2)  # (B, 2, 1, p, p)
    return compose_grid(*example.unbind(1), *query.unbind(1))[:, 0]


def place_changes(facts: Facts) -> Tensor:
    """Where each pair of a batch's grids differs, 1 or 0, in both its panels: (B, 2p, 2p).

    Choice: from a mean squared difference of 0.05, where latents have unit variance.
    """
    before, after = facts.latents.unbind(1)
    example, query = ((after - before).square().mean(1, keepdim=True) > 0.05).float().chunk(2)
    return compose_grid(example, example, query, query)[:, 0]


class AuxiliaryHeads(nn.Module):
    """What the prompt encoder says of each place while it is taught, by linear heads on some of its blocks.

    names: half way, what the given panels show there, where the dataset tells: one of `classes`.
    compares: half way, whether the example's panels differ there.
    points: from every second block thereafter, whether the edit will change the query there.

    Choice: to change what the example changes, and nothing else, it must know a heart from a star, see which
    of them was changed, and find its like in the query. None of these makes its guess much better without
    the others; ours, taught by the guess, and later to name things as well, did not compare the panels.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        width, depth = encoder.drawn.in_features, len(encoder.blocks)
        self.half_way = (depth // 2 - 1) | 1  # a block that sees the panels whole, as every second does
        later = range(self.half_way + 2, depth, 2)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.names, self.compares = nn.Linear(width, classes), nn.Linear(width, 1)
        self.points = nn.ModuleDict({str(i): nn.Linear(width, 1) for i in later})
        self.features: dict[int, Tensor] = {}
        blocks = {i: encoder.blocks[i] for i in (self.half_way, *later)}
        self.hooks = [block.register_forward_hook(self.listen(i)) for i, block in blocks.items()]

    def listen(self, i: int) -> Callable:
        return lambda block, inputs, output: self.features.update({i: self.norm(output.float())})

    def forward(
        self, classes: Tensor | None, changes: Tensor, keep: tuple[Tensor, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The losses of what is said of the last batch of grids that passed the encoder, each a mean, and of
        how many places.

        classes, changes: (B, 2p, 2p), see `place_classes` and `place_changes`. keep: as `Losses.draw` has it.
        """
        keep_text, keep_example = (kept.to(changes.device).view(-1, 1, 1) for kept in keep)
        upper = torch.arange(len(changes[0]), device=changes.device).view(-1, 1) < len(changes[0]) // 2
        example = (upper & keep_example).expand_as(changes)
        query = (~upper & (keep_example | keep_text)).expand_as(changes)
        seen = self.features[self.half_way]
        losses = {"compares": _yes_or_no(self.compares(seen), changes, example)}
        points = [_yes_or_no(head(self.features[int(i)]), changes, query) for i, head in self.points.items()]
        losses["points"] = sum(mean for mean, _ in points), query.sum()
        if classes is not None:
            shown = classes.masked_fill(upper & ~keep_example | ~upper & ~upper.mT, -1)
            error = F.cross_entropy(self.names(seen).permute(0, 3, 1, 2), shown, ignore_index=-1)
            losses["names"] = error, (shown >= 0).sum()
        return losses


def _yes_or_no(logits: Tensor, truth: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of logits (B, H, W, 1) over the places asked about, (B, H, W), and their number."""
    error = F.binary_cross_entropy_with_logits(logits[..., 0], truth, reduction="none")
    count = asked.sum()
    return (error * asked).sum() / count.clamp(min=1), count


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Each gradient becomes the mean of all processes', by one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


SCAN_PARAMETERS = ("A_logs", "Ds", "dt_projs_bias")  # no matrices, whatever their shape


def teach_prompt_encoder(
    model: RCLDM,
    losses_of: Losses,
    data: VisualPromptDataset,
    args: argparse.Namespace,
    is_main: bool,
    stop: Stop,
) -> None:
    """Before all else, the prompt encoder alone learns to tell the whole grid's latents from the condition.

    Choice: the paper's encoder starts from nothing, and behind a projection that is zero. It and the links,
    zero as well, then wait for each other, and a step of the whole model costs four of the encoder. So the
    encoder first learns to draft the latents of all four panels, the answer too: blurred, the mean of what
    may be right, but for that it has to read the example and find the query. `AuxiliaryHeads` help it to.
    Then its projection becomes the U-Net's first convolution (of a flat area) of the draft, and so the
    trainable copy sees the draft as it knows to see pictures; 32 times as strong, lest the noise that it is
    added to blur it. The links are zero still, and the model changes nothing.
    Choice: Muon (Jordan et al., 2024) for the blocks' matrices, AdamW for all else.
    """
    encoder, device = model.prompt_encoder, model.device
    channels = len(losses_of.grey)
    modules: dict[str, Any] = {"encoder": encoder}
    auxiliary = classes = projection = None
    if isinstance(encoder, VisualPromptEncoder):
        if args.auxiliary_weight:
            classes = losses_of.facts.classes
            count = 1 if classes is None else int(classes.max()) + 1
            modules["auxiliary_heads"] = auxiliary = AuxiliaryHeads(encoder, count).to(device)
    else:  # ControlNet's convolutions draft as well, through a head in the place of their last
        projection = encoder.conv_out
        encoder.conv_out = nn.Conv2d(projection.in_channels, channels, 3, padding=1).to(device)
    hidden, rest = [], []
    for name, parameter in (p for module in modules.values() for p in module.named_parameters()):
        is_matrix = parameter.ndim == 2 and name.startswith(("blocks.", "text_attentions."))
        (hidden if is_matrix and not name.endswith(SCAN_PARAMETERS) else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=(0.9, 0.99))]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    folder = args.output / "prompt-encoder"
    watch = modules["watch"] = LossMonitor()
    start = load_checkpoint(folder, modules, *optimizers) if args.resume else 0
    steps = range(start * args.accumulate, args.encoder_steps * args.accumulate)
    batch_size, accelerator = args.encoder_batch or args.batch, losses_of.accelerator
    shares = accelerator.process_index, accelerator.num_processes
    order = draw_order(len(data), batch_size, args.seed + 1, steps, *shares)
    loader = load_batches(data, losses_of.facts, order, args.workers)
    total = args.encoder_steps
    progress = tqdm(desc="prompt encoder", total=total, initial=start, mininterval=2, disable=not is_main)
    stop.at_work = True
    for micro, batch in zip(steps, loader):
        step = micro // args.accumulate
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / args.encoder_steps)
        g = torch.Generator().manual_seed((args.seed + 1) * 1_000_003 + micro)
        keep = dropout(batch_size * losses_of.processes, losses_of.drop, g)
        keep = tuple(map(losses_of.share, keep))
        condition, x_0, facts, states = losses_of.draw(batch, keep, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            if projection is None:  # in fp16, gradients would have to be scaled
                _, draft = encoder(condition, states, repeat_query(x_0))
            else:
                draft = encoder(condition)
        draft = draft.float()
        losses = {"draft": losses_of.mean((draft - x_0).square(), facts.latents[len(x_0) :], draft)}
        loss = losses["draft"]
        if auxiliary is not None:
            shown = None if classes is None else place_classes(facts)
            said = auxiliary(shown, place_changes(facts), keep)
            said = {name: losses_of.over_all(*mean) for name, mean in said.items()}
            loss = loss + args.auxiliary_weight * sum(said.values())
            losses |= said
        (loss / args.accumulate).backward()
        watch.see(losses_of.of_all({"loss": loss, **losses}))
        if (micro + 1) % args.accumulate:
            continue
        if losses_of.processes > 1:
            average_gradients([*hidden, *rest], accelerator)
        norm = nn.utils.get_total_norm([p.grad for p in (*hidden, *rest) if p.grad is not None])
        is_sound = watch.is_sound(norm)
        for optimizer in optimizers:
            if is_sound:
                optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or not is_sound:
            progress.set_postfix(watch.text(), refresh=False)
        step += 1
        progress.update()
        stop.agree(accelerator)
        if step % args.checkpoint_every == 0 or step == args.encoder_steps or stop.asked or watch.is_over:
            if is_main:
                save_checkpoint(folder, step, modules, *optimizers, keep=2)
            watch.check()
            if stop.asked:
                stop.end(f"step {step} of the prompt encoder's")
    progress.close()
    for hook in auxiliary.hooks if auxiliary is not None else ():
        hook.remove()
    with torch.no_grad():
        first = 32 * model.trainable_copy.conv_in.weight.sum((2, 3))  # (C0, C)
        if projection is None:
            encoder.zero_proj.weight[:, -channels:] = first
        else:
            head, encoder.conv_out = encoder.conv_out, projection
            projection.weight.copy_(torch.einsum("oc,c...->o...", first, head.weight))
            projection.bias.copy_(first @ head.bias)


# ----------------------------------------------------------------------------------------------------------
# The result


def save_editor(model: RCLDM, args: argparse.Namespace, step: int, measured: dict[str, float]) -> None:
    """The averaged weights, the settings and a model card, in the folder that `edit.py --model` takes."""
    folders = {part: backbone.local_folder(getattr(args, part)) for part in args.fingerprints}
    beside = (args.output / "editor").resolve()
    relative = {part: os.path.relpath(folder, beside) for part, folder in folders.items() if folder}
    record = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    record |= {"llm": None if args.no_liu else args.llm, "trained_steps": step} | SAMPLING
    record["relative"] = relative  # where the parts lie, seen from the editor
    with whole_folder(args.output / "editor") as folder:
        model.save_pretrained(folder)
        (folder / "instructgie.json").write_text(json.dumps(record, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(record, measured), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------
# Validation pictures


class Log:
    """TensorBoard's file."""

    def __init__(self, folder: Path) -> None:
        # On a full disk its own thread would print a traceback of what `write` raises.
        threading.excepthook = lambda error: error.exc_type is OSError or threading.__excepthook__(error)
        self.writer = SummaryWriter(folder)

    def write(self, step: int, numbers: dict[str, Tensor | float], pictures: dict[str, Tensor] | None = None):
        """numbers, pictures (3, H, W) in [-1, 1]: by their names. Raises OSError."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        for name, picture in (pictures or {}).items():
            self.writer.add_image(name, (picture + 1) / 2, step)
        self.writer.flush()


class Validation:
    """The same few queries each time, drawn by the seed from the validation split."""

    def __init__(self, data: VisualPromptDataset, unifier: liu.InstructionUnifier | None, args) -> None:
        g = torch.Generator().manual_seed(args.seed)
        items: list[dict[str, Any]] = []
        for i in torch.randperm(len(data), generator=g).tolist():
            if len(items) == args.validation_pictures:
                break
            try:
                items.append(data[0, i])
            except ImageError as error:
                print(f"left out: {error}", flush=True)
        self.panels = torch.stack([item["panels"] for item in items]) if items else None  # (N, 4, 3, P, P)
        self.texts = [item["instruction"] for item in items]
        if unifier:
            self.texts = unifier.unify(self.texts)

    def picture(self, model: RCLDM, sd: backbone.StableDiffusion) -> tuple[Tensor, float]:
        """(3, H, W) in [-1, 1]: a row per query with example before and after, input, answer, truth. And the
        answers' mean absolute error, in levels of 0 … 255."""
        panels = self.panels.to(sd.unet.device)
        pipe = InstructGIEPipeline(**sd._asdict(), rcldm=model.eval(), panel=panels.shape[-1])
        pipe.set_progress_bar_config(disable=True)
        seeds = list(range(len(panels)))
        answers = pipe.answer(panels[:, :2], None, panels[:, 2], self.texts, seeds).to(panels)
        shown = torch.stack([*panels[:, :3].unbind(1), answers, panels[:, 3]], 1)  # (N, 5, 3, P, P)
        error = 127.5 * (answers - panels[:, 3]).abs().mean().item()
        return torch.cat([torch.cat(list(row), -1) for row in shown], -2).cpu().clamp(-1, 1), error


# ----------------------------------------------------------------------------------------------------------
# Training


def draw_order(count: int, batch: int, seed: int, steps: range, rank: int, processes: int) -> Iterator[list]:
    """The items (epoch, index) of each step, one permutation an epoch; every process takes its share.

    A function of the step alone, so that a resumed run goes on with the pictures it would have seen.
    """
    permutations: dict[int, list[int]] = {}
    for step in steps:
        first = (step * processes + rank) * batch
        items = []
        for position in range(first, first + batch):
            epoch, place = divmod(position, count)
            if epoch not in permutations:
                g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                permutations = {
                    **dict(list(permutations.items())[-1:]),
                    epoch: torch.randperm(count, generator=g).tolist(),
                }
            items.append((epoch, permutations[epoch][place]))
        yield items


def learning_rate(step: int, args: argparse.Namespace) -> float:
    progress = step / max(1, args.steps)
    return args.lr * min(1, (step + 1) / args.warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, weight_decay: float, encoder_lr: float) -> list[dict]:
    """Weight decay for matrices alone: not for norms, biases and the scan's own parameters.

    Choice: a prompt encoder that has been taught learns at `encoder_lr` of the others' rate. The links need a
    high one to grow from zero, which may undo what the encoder knows; not compared with all else equal.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        share = encoder_lr if name.startswith("prompt_encoder.") else 1.0
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(SCAN_PARAMETERS) else weight_decay
        groups.setdefault((share, decay), []).append(parameter)
    return [
        {"params": parameters, "lr_share": share, "weight_decay": decay}
        for (share, decay), parameters in groups.items()
    ]


def new_adamw(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What makes that optimiser. Raises ValueError where its library is missing."""
    if name == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"--optimizer {name} needs bitsandbytes: pip install bitsandbytes ({error})"
        ) from None
    return AdamW8bit


# Settings that may change when a run is resumed, and it still ends where it would have.
INCIDENTAL = {"output", "resume", "device", "gradient_checkpointing", "workers", "cache", "checkpoint_every"}
INCIDENTAL |= {"keep", "validate_every", "validation_split", "validation_pictures"}


def note_settings(args: argparse.Namespace, processes: int) -> None:
    """Keeps the settings beside the run; says which of those that matter are others than when it began."""
    matter = {name: value for name, value in vars(args).items() if name not in INCIDENTAL}
    path = args.output / "settings.json"
    changed = other_settings(path, matter | {"processes": processes}, anew=not args.resume)
    for name, (there, now) in changed.items():
        print(f"--{name.replace('_', '-')} was {there} when this run began, and is {now}", flush=True)


def validation_data(data: VisualPromptDataset, source: str, args: argparse.Namespace) -> VisualPromptDataset:
    try:
        pairs = read_pairs(source, args.validation_split, args.columns)
        return VisualPromptDataset(pairs, args.panel, args.seed)
    except DatasetError as error:
        print(f"validation pictures are drawn from --split {args.split}: {error}", flush=True)
        return data


@backbone.one_line_errors("train.py")
def main() -> None:
    with Stop() as stop, contextlib.ExitStack() as held:
        train(settings(), stop, held)


def train(args: argparse.Namespace, stop: Stop, held: contextlib.ExitStack) -> None:
    """held: what is given back in the end, however that comes."""
    preset = backbone.preset(args.backbone)
    for setting in ("stable_diffusion", "clip", "segmenter", "llm", "panel", "data", "lr"):
        if getattr(args, setting) is None:
            setattr(args, setting, getattr(preset, setting))
    if args.data is None:
        raise ValueError(f"--backbone {args.backbone} has no dataset of its own; give one with --data")
    for part in ("stable_diffusion", "clip", "segmenter", "llm"):
        setattr(args, part, backbone.lasting_name(getattr(args, part)))
    begun = any(args.output.glob("checkpoint-*"))
    there = begun or (args.output / "prompt-encoder").exists()
    if there and not args.resume:
        raise ValueError(f"--output {args.output} holds a run already; add --resume or choose another folder")
    if args.resume and not (there or (args.output / "lock").exists()):
        raise ValueError(f"--resume: --output {args.output} holds no run; name its folder, or begin without")

    backbone.check_numbers(args, BOUNDS)

    device = backbone.pick_device(args.device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=backbone.PATIENCE)],
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    if accelerator.num_processes == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        way = "torchrun --nproc_per_node N train.py --device cpu starts N"
        print(f"one process trains: on a CPU, accelerate launch starts no more; {way}", flush=True)
    adamw = new_adamw(args.optimizer)
    device = torch.device("cpu") if device.type == "cpu" else device  # not "cpu:0", which safetensors refuses
    backbone.choose_attention(device, args.precision)
    torch.manual_seed(args.seed)
    with accelerator.main_process_first():  # the first process computes, the others find it cached
        source = backbone.data_folder(args.data)
        pairs = read_pairs(source, args.split, args.columns)
        data = VisualPromptDataset(pairs, args.panel, args.seed)
        sd = backbone.load_stable_diffusion(args.stable_diffusion, device)
        if args.panel % (unit := backbone.vae_factor(sd.vae)):
            raise ValueError(f"--panel {args.panel}: give a multiple of {unit}, as the autoencoder needs")
        clip = None if args.no_esm else backbone.load_clip(args.clip, device)
        areas = None
        if not args.no_sam:
            segmenter, processor = backbone.load_segmenter(args.segmenter, device)
            classes = args.sam_classes or preset.classes
            if args.sam_propose:
                llm = backbone.load_llm(args.llm, device)
                classes = sam_loss.propose_classes(*llm, segmenter.config.id2label.values())
            areas = sam_loss.SelectiveAreas(segmenter, processor, classes)
        frozen = Frozen(sd.vae, clip, areas)
        decoder = args.tiny_decoder and backbone.load_tiny_decoder(args.tiny_decoder, sd.vae, device)
        if is_main:
            held.enter_context(locked(args.output))
        data, facts = observe_all(data, frozen, args, device)
        unifier = None
        if not args.no_liu:
            llm = backbone.load_llm(args.llm, device)
            unifier = liu.InstructionUnifier(*llm, cache=ReplyCache(args.cache / "liu", *llm))
        texts, rows = read_instructions(data, sd, unifier)
        validation = Validation(validation_data(data, source, args), unifier, args)
        del unifier
        frozen = frozen._replace(areas=None)  # the segmenter has seen everything
    losses_of = Losses(args, sd, frozen, facts, texts, rows, decoder, accelerator)

    design = "conv" if args.no_rcldm else args.encoder
    factor = args.panel // losses_of.grey.shape[-1]
    folders = {option: getattr(args, option) for option in ("init", "init_encoder") if getattr(args, option)}
    trained = {option: backbone.load_editor(folder)[0] for option, folder in folders.items()}
    torch.manual_seed(args.seed)  # the same weights whether the facts above were computed or cached
    widths = [args.encoder_width, *(other.config.prompt_encoder_width for other in trained.values())]
    width = next(filter(None, widths), None)  # what weights are given for need not be told
    encoder = {"prompt_encoder_width": width, "prompt_encoder_text": not args.no_encoder_text}
    encoder["prompt_encoder_latents"] = not args.no_encoder_latents
    model = RCLDM.from_unet(sd.unet, design, factor=factor, panel=args.panel, **encoder).to(device)
    if design != "conv" and not args.no_encoder_text:
        model.prompt_encoder.whiten(texts[:-1])
    for option, other in trained.items():
        mine, theirs = (one if option == "init" else one.prompt_encoder for one in (model, other))
        try:
            mine.load_state_dict(theirs.state_dict())
        except RuntimeError:
            option, folder = option.replace("_", "-"), folders[option]
            raise ValueError(f"--{option} {folder}: an editor of another architecture") from None
    if is_main:
        needed = ("stable_diffusion", *(() if args.no_liu else ("llm",)))
        args.fingerprints = {part: backbone.fingerprint(getattr(args, part), part) for part in needed}
        note_settings(args, accelerator.num_processes)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
        sd.unet.enable_gradient_checkpointing()
        if clip is not None:  # L_es goes through the decoder and CLIP
            losses_of.decoder.enable_gradient_checkpointing()
            clip.set_grad_checkpointing()
    if args.encoder_steps and not args.init and not begun:
        teach_prompt_encoder(model, losses_of, data, args, is_main, stop)
    average = new_ema(model, args.ema)
    taught = args.init or args.init_encoder or args.encoder_steps
    encoder_lr = args.encoder_lr if taught else 1.0
    model.prompt_encoder.requires_grad_(encoder_lr > 0)  # frozen, it needs no way back
    groups = parameter_groups(model, args.weight_decay, encoder_lr)
    optimizer = adamw(groups, lr=args.lr, betas=(0.9, 0.99))
    modules = {"model": model, "average": average, "watch": (watch := LossMonitor())}
    start = load_checkpoint(args.output, modules, optimizer) if args.resume else 0
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    shares = accelerator.process_index, accelerator.num_processes
    steps = range(start * args.accumulate, args.steps * args.accumulate)
    order = draw_order(len(data), args.batch, args.seed, steps, *shares)
    loader = load_batches(data, facts, order, args.workers)
    log = Log(args.output / "tensorboard") if is_main else None
    progress = tqdm(total=args.steps, initial=start, desc="train", mininterval=2, disable=not is_main)
    held.callback(progress.close)  # else it would be drawn below the line of an error
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.2f} M parameters to train, {len(data)} pairs", flush=True)

    def publish(step: int) -> None:
        """The editor of this step, and what it makes of the validation queries."""
        measured = {name: value.item() for name, value in watch.averages.items()}
        if args.validation_pictures:
            picture, measured["validation error"] = validation.picture(average.module, sd)
            path = args.output / f"validation-{step:07d}.png"
            write_whole(path, lambda file: tensor_to_image(picture).save(file, "PNG"))
            log.write(step, {"validation error": measured["validation error"]}, {"validation": picture})
        save_editor(average.module, args, step, measured)

    wrapped.train()
    stop.at_work = True
    for micro, batch in zip(steps, loader):
        step = micro // args.accumulate
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + micro)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_share"] * learning_rate(step, args)
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():
                losses = losses_of(wrapped, batch, g)
            accelerator.backward(losses["loss"])
            watch.see(losses_of.of_all(losses))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), args.clip_norm)
                if is_sound := watch.is_sound(norm):
                    optimizer.step()
                elif accelerator.scaler is not None:
                    accelerator.scaler.update()  # fp16: a smaller scale may be all that it takes
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        if is_sound:
            average.update_parameters(model)
        if step % 20 == 0 or not is_sound:
            progress.set_postfix(watch.text(), refresh=False)
        step += 1
        progress.update()
        stop.agree(accelerator)
        is_over = step == args.steps or stop.asked or watch.is_over
        if is_main and step % 20 == 0:
            log.write(step, {f"loss/{name}": value for name, value in watch.averages.items()})
        if is_main and (step % args.checkpoint_every == 0 or is_over):
            save_checkpoint(args.output, step, modules, optimizer.optimizer, keep=args.keep)
        if is_main and step % args.validate_every == 0 and not is_over:
            publish(step)
        watch.check()
        if stop.asked and step < args.steps:
            stop.end(f"step {step}")
    progress.refresh()
    progress.close()
    if is_main:
        publish(args.steps)
    print(f"the editor is in {args.output / 'editor'}")


if __name__ == "__main__":
    main()
