"""The editors that the paper compares itself with, trained on edits for `evaluate.py --method`.

    python -m evaluation.baselines instruct-pix2pix --steps 1500 --batch 64 --output runs/instruct-pix2pix
    python -m evaluation.evaluate runs/instruct-pix2pix/pipeline --method instruct-pix2pix
    python -m evaluation.evaluate --method sdedit    # needs no training

SDEdit (Meng et al., 2022): the query with noise, from which Stable Diffusion draws what the output's caption
says. It sees neither the instruction nor the example.

InstructPix2Pix (Brooks et al., 2023): a U-Net that reads the query's latents beside the noisy ones, all of it
taught on edits; told the instruction. It sees no example.

Prompt Diffusion (Wang et al., 2023): a ControlNet whose condition is the sum of two embeddings, of the
example pair, six channels, and of the query, three. The U-Net draws the answer alone, and its decoder
learns too. [ours] It is told the instruction, as we are; its authors told it the caption of the output.

Both of the latter are saved as diffusers' pipelines. A stopped training goes on where it stood.

Symbols: B samples; P panel size in pixels, p in latent pixels; C latent channels. Images are in [-1, 1].
"""

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from safetensors.torch import load_file
from torch import Tensor, nn

import backbone
from dataset import VisualPromptDataset
from disk import atomic_folder, locked, other_settings
from pictures import check_finite
from pictures.pairs import read_pairs
from training.draws import draw_noise, draw_order, draw_timesteps, keep_conditions, step_generator
from training.loop import fit
from training.precompute import Frozen, gather_batch, load_batches, precompute, read_instructions

# --- Editing ------------------------------------------------------------------------------------------------


class Baseline:
    """What the three share: a diffusers pipeline, told texts as they stand, that `answer` asks.

    sd: the frozen parts, of a pipeline's folder or hub id. panel: P, of the pictures given and drawn.
    settings: how it samples unless told otherwise; at first as its authors do.
    """

    kind: ClassVar[type[diffusers.DiffusionPipeline]]
    settings: ClassVar[dict[str, Any]]

    def __init__(self, sd: backbone.StableDiffusion, panel: int, **parts: nn.Module) -> None:
        self.sd, self.panel = sd, panel
        blind = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        self.pipeline = self.kind(**sd._asdict(), **parts, **blind)
        self.pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, source: str, device: str | torch.device, panel: int) -> "Baseline":
        """Raises BackboneError for what is no pipeline."""
        return cls(backbone.load_stable_diffusion(source, device), panel)

    def unify(self, texts: list[str]) -> list[str]:
        return list(texts)

    def draw(self, texts: list[str], seeds: list[int], steps: int, **inputs: Any) -> Tensor:
        """Pictures (B, 3, P, P). Each depends on its own seed, not on the batch around it."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        sampling = {"num_inference_steps": steps, "generator": generators, "output_type": "latent"}
        latents = self.pipeline(prompt=texts, **sampling, **inputs).images
        check_finite(latents, f"the latents after {steps} steps")
        return check_finite(backbone.decode_latents(self.sd.vae, latents), "the VAE's picture")


class SDEdit(Baseline):
    """The query with noise, `strength` of the way to pure noise, denoised to what the caption says."""

    kind = diffusers.StableDiffusionImg2ImgPipeline
    settings: ClassVar = {"steps": 20, "guidance_text": 7.5, "strength": 0.6}

    def answer(
        self, examples, has_example, queries, texts, seeds, guidance_text, strength, **sampling
    ) -> Tensor:
        """See `InstructGIEPipeline.answer`; texts are captions of the outputs, examples are ignored."""
        inputs = {"image": (queries + 1) / 2, "strength": strength, "guidance_scale": guidance_text}
        return self.draw(texts, seeds, **sampling, **inputs)


class InstructPix2Pix(Baseline):
    """A U-Net of twice the input channels: the noisy latents, and the query's, which are not scaled."""

    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    settings: ClassVar = {"steps": 20, "guidance_text": 7.5, "guidance_visual": 1.5}

    def answer(
        self, examples, has_example, queries, texts, seeds, guidance_text, guidance_visual, **sampling
    ) -> Tensor:
        """See `InstructGIEPipeline.answer`; examples are ignored, and `guidance_visual` is of the query."""
        if (guidance_text, guidance_visual) != (1, 1) and (guidance_text <= 1 or guidance_visual < 1):
            raise ValueError("this pipeline needs --guidance-text above 1 and --guidance-visual of 1 or more")
        scales = {"guidance_scale": guidance_text, "image_guidance_scale": guidance_visual}
        return self.draw(texts, seeds, **sampling, image=(queries + 1) / 2, **scales)


class ExampleAndQuery(nn.Module):
    """The condition of Prompt Diffusion: before, after and query (B, 9, P, P) in [0, 1] → (B, C0, p, p)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pair = ControlNetConditioningEmbedding(channels, conditioning_channels=6)
        self.query = ControlNetConditioningEmbedding(channels, conditioning_channels=3)

    def forward(self, condition: Tensor) -> Tensor:
        return self.pair(condition[:, :6]) + self.query(condition[:, 6:])


def new_control(unet: nn.Module) -> diffusers.ControlNetModel:
    """A ControlNet for this U-Net that reads an example pair and a query."""
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=9)
    control.controlnet_cond_embedding = ExampleAndQuery(unet.config.block_out_channels[0])
    return control


class PromptDiffusion(Baseline):
    """Stable Diffusion under a ControlNet that reads an example pair and a query."""

    kind = diffusers.StableDiffusionControlNetPipeline
    settings: ClassVar = {"steps": 20, "guidance_text": 7.5}

    @classmethod
    def load(cls, source: str, device: str | torch.device, panel: int) -> "PromptDiffusion":
        """Raises BackboneError for what is no such pipeline."""
        sd = backbone.load_stable_diffusion(source, device)
        control = new_control(sd.unet)
        folder = backbone.find_folder(source, ["controlnet/*"]) / "controlnet"
        with backbone.clear_errors(source, "a pipeline of Prompt Diffusion", folder):
            control.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return cls(sd, panel, controlnet=control.to(device).eval().requires_grad_(False))

    def answer(self, examples, has_example, queries, texts, seeds, guidance_text, **sampling) -> Tensor:
        """See `InstructGIEPipeline.answer`. A pair that is not given is grey, and so it was in training."""
        shown = torch.cat([*examples.unbind(1), queries], 1)
        shown[~torch.tensor(has_example), :6] = 0.0
        return self.draw(texts, seeds, **sampling, image=(shown + 1) / 2, guidance_scale=guidance_text)


# --- Training -----------------------------------------------------------------------------------------------

# Shares of samples without text, without condition, without both. InstructPix2Pix's are its authors'. [ours]
# Prompt Diffusion's are those of `train.py`, so that both learn from the same samples; its authors took 0.05.
DROP = {"instruct-pix2pix": (0.05, 0.05, 0.05), "prompt-diffusion": (0.3, 0.4, 0.05)}


class Learner(nn.Module):
    """A baseline's trained parts, and how they predict; what is frozen they only refer to."""

    def __init__(self, method: str, sd: backbone.StableDiffusion) -> None:
        super().__init__()
        self.method, self.scaling = method, sd.vae.config.scaling_factor
        self.unet = copy.deepcopy(sd.unet)
        if method == "instruct-pix2pix":
            old = self.unet.conv_in
            self.unet.register_to_config(in_channels=2 * old.in_channels)
            self.unet.conv_in = nn.Conv2d(2 * old.in_channels, old.out_channels, 3, padding=1)
            with torch.no_grad():  # nothing is read of the query yet
                self.unet.conv_in.weight[:] = torch.cat([old.weight, torch.zeros_like(old.weight)], 1)
                self.unet.conv_in.bias[:] = old.bias
            self.unet.requires_grad_(True)
        else:
            self.control = new_control(sd.unet).requires_grad_(True)
            # Its authors' script unlocks the decoder of the U-Net.
            for part in (self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out):
                part.requires_grad_(True)

    def forward(self, x_t: Tensor, t: Tensor, states: Tensor, panels: Tensor, query: Tensor, keep: Tensor):
        """Prediction (B, C, p, p) from noisy latents of the answer.

        panels: (B, 4, 3, P, P) in the order of a grid. query: latents (B, C, p, p). keep: (B,), whether the
        condition is given; where not, it is zero, grey.
        """
        shown = keep.view(-1, 1, 1, 1).to(x_t)
        if self.method == "instruct-pix2pix":
            return self.unet(torch.cat([x_t, shown * query / self.scaling], 1), t, states).sample
        pair, query_panel = panels[:, :2].flatten(1, 2) * shown, panels[:, 2]
        condition = (torch.cat([pair, query_panel], 1) + 1) / 2
        down, mid = self.control(x_t, t, states, condition, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.unet(x_t, t, states, **residuals).sample

    def save(self, sd: backbone.StableDiffusion, folder: Path) -> None:
        """As a pipeline's folder that `evaluate.py --method` takes, whole or not at all."""
        sd = sd._replace(unet=self.unet)
        if self.method == "instruct-pix2pix":
            learnt = InstructPix2Pix(sd, panel=0)
        else:
            learnt = PromptDiffusion(sd, panel=0, controlnet=self.control)
        with atomic_folder(folder) as new:
            learnt.pipeline.save_pretrained(new)


def train(args: argparse.Namespace) -> None:
    """The same pairs, drawn in the same order, as `train.py` shows to ours with this seed and batch."""
    preset = backbone.preset(args.backbone)
    device = backbone.pick_device(args.device)
    held = {k: str(v) for k, v in vars(args).items() if k not in ("device", "workers", "cache", "output")}
    for name, (there, now) in other_settings(args.output / "settings.json", held).items():
        raise ValueError(f"--output {args.output}: a run with {name} {there}, not {now}; give another folder")
    backbone.choose_kernels(device, args.precision)
    args.data = args.data or preset.data
    if args.data is None:
        raise ValueError(f"--backbone {args.backbone} has no dataset of its own; give one with --data")
    data = read_pairs(backbone.data_folder(args.data), "train")
    data = VisualPromptDataset(data, preset.panel, seed=args.seed)
    sd = backbone.load_stable_diffusion(preset.stable_diffusion, device)
    data, precomputed = precompute(data, Frozen(sd.vae, None, None), args, device)
    texts, rows = read_instructions(data, sd, unifier=None)
    torch.manual_seed(args.seed)
    learner = Learner(args.method, sd).to(device)
    timesteps = sd.scheduler.config.num_train_timesteps

    def losses_of(steps: range) -> Iterator[dict[str, Tensor]]:
        order = draw_order(len(data), args.batch, args.seed, steps, 0, 1)
        for step, batch in zip(steps, load_batches(data, precomputed, order, args.workers)):
            g = step_generator(args.seed, step)
            panels, _, seen = gather_batch(batch, precomputed, device)
            query, answer = seen.latents.unbind(1)
            keep_text, keep_condition = keep_conditions(len(panels), DROP[args.method], g)
            row = torch.where(keep_text, rows[batch["index"]], len(texts) - 1)
            states = texts[row.to(texts.device)].to(device)
            noise = draw_noise(answer.shape, g, device)
            t = draw_timesteps(len(panels), timesteps, g).to(device)
            x_t = sd.scheduler.add_noise(answer, noise, t)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                prediction = learner(x_t, t, states, panels, query, keep_condition.to(device)).float()
            target = backbone.prediction_target(answer, noise, t, sd.scheduler)
            yield {"loss": (prediction - target).square().mean()}

    # As ours learns.
    options = {"weight_decay": 0.01, "ema_decay": 0.998, "warmup": 50, "muon": True}
    fit(args.method, learner, losses_of, args.output, steps=args.steps, lr=args.lr, **options)
    learner.save(sd, args.output / "pipeline")
    print(f"the baseline is in {args.output / 'pipeline'}")


@backbone.one_line_errors("evaluation.baselines")
def main(argv: list[str] | None = None) -> None:
    parser = backbone.new_parser("evaluation.baselines", __doc__)
    add = parser.add_argument
    add("method", choices=("instruct-pix2pix", "prompt-diffusion"))
    add("--backbone", default="toy", help=f"preset of pretrained parts: {', '.join(backbone.PRESETS)}")
    add("--data", help="dataset with a split `train`: a folder or a hub id (default: the preset's)")
    add("--output", type=Path, required=True, help="checkpoints, and the pipeline")
    add("--steps", type=int, default=1500, help="optimiser steps")
    add("--batch", type=int, default=16, help="edits per step")
    add("--lr", type=float, default=1e-2, help="peak; warm-up, then down to a hundredth. 1e-5 at full size")
    add("--seed", type=int, default=0, help="of weights, data order and noise")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", default="no", choices=("no", "bf16"), help="of autocast")
    add("--workers", type=int, default=1, help="processes that decode pictures")
    add("--cache", type=Path, default=Path("data/cache"), help="what the frozen parts computed")
    args = parser.parse_args(argv)
    bounds = {(1, math.inf): "steps", (1, 4096): "batch", (0, 1): "lr"}
    backbone.check_numbers(args, bounds | {(0, 256): "workers", (0, 2**32): "seed"})
    with locked(args.output):
        train(args)


if __name__ == "__main__":
    main()
