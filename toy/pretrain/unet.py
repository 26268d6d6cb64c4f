"""The text encoder and the text-to-image U-Net, on single scenes and 2×2 collages."""

import argparse
import random

import torch
from torch import Tensor, nn
from tqdm import tqdm

from backbone import encode_images
from pictures import from_bytes
from toy import world
from toy.pretrain.loop import fit, rendered, save
from toy.pretrain.vae import LATENT_CHANNELS
from toy.pretrain.words import CONTEXT, new_tokenizer, tokenize
from training.draws import draw_noise, step_generator


def new_text_encoder(tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    # [ours] Attention at all levels, the finest latents among them: in a 2×2 grid every place then sees its
    # counterparts in the other panels. The decoder's last level does without, since it costs the most.
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(1, 2, 3),  # heads, in truth: each of 32 channels
        norm_num_groups=8,
    )


def new_scheduler():
    from diffusers import DDIMScheduler

    # Down to pure noise: a tiny model paints flat areas in the right colour only if sampling starts where
    # training ends (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed").
    # [ours] It predicts x_0. Its decoder then draws, at every noise level, what its skip features hold, and
    # there the editor's residuals come in. One that predicts noise or velocity draws the picture at strong
    # noise only; in one trial, where more than this was changed, an editor could hardly make it draw another.
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # as pipelines ask for; without meaning where the spacing is trailing
        clip_sample=False,
        set_alpha_to_one=True,
    )


def train_unet(args: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    folder = args.out / "stable-diffusion"
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(args.device).eval().requires_grad_(False)
    rng = random.Random(args.seed + 1)
    tokenizer, scheduler = new_tokenizer(args.seed), new_scheduler()
    model = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(tokenizer)})
    model.to(args.device, memory_format=torch.channels_last)

    # The pool: strips of four pictures, the first and what three edits make of it.
    strips = []
    for _ in range(8000):
        scene = world.random_picture(rng)
        strips.append([scene] + [world.random_edit(scene, rng) for _ in range(3)])
    latents = encode_scenes(vae, [scene for strip in strips for scene in strip], args.device)
    latents = latents.unflatten(0, (-1, 4))
    blank = encode_images(vae, torch.full((1, 3, world.PANEL, world.PANEL), 0.0, device=args.device))[0].cpu()
    batch = 32

    def draw(step: int) -> tuple[Tensor, list[str]]:
        rng = random.Random(args.seed * 1_000_003 + step)
        if step % 5 == 0:  # single scenes, a cheap batch at a quarter of the size
            chosen = [(rng.randrange(len(strips)), rng.randrange(4)) for _ in range(2 * batch)]
            texts = [strips[i][j].caption() if rng.random() < 0.8 else "" for i, j in chosen]
            return torch.stack([latents[i, j] for i, j in chosen]), texts
        grids, texts = [], []
        for _ in range(batch):
            # Rows of one strip or of two; within a row the same panel twice, or two variations.
            first, second = rng.randrange(len(strips)), rng.randrange(len(strips))
            rows = (first, first) if rng.random() < 0.3 else (first, second)
            panels = [(row, rng.randrange(4)) for row in rows for _ in range(2)]
            for right in (1, 3):
                if rng.random() < 0.3:
                    panels[right] = panels[right - 1]
            tiles = [latents[i, j] for i, j in panels]
            shown = rng.choice((0, 1, 2, 3, 3, 3))
            if rng.random() < 0.1:
                tiles[:2] = [blank, blank]
                shown = 3
            grids.append(torch.cat([torch.cat(tiles[:2], -1), torch.cat(tiles[2:], -1)], -2))
            i, j = panels[shown]
            caption = f"four pictures, the {[*world.PLACES][shown]} shows {strips[i][j].caption()}"
            texts.append(caption if rng.random() < 0.75 else "")
        return torch.stack(grids), texts

    def loss(step: int) -> dict[str, Tensor]:
        x, texts = draw(step)
        x, g = x.to(args.device).float(), step_generator(args.seed + 1, step)
        noise = draw_noise(x.shape, g, args.device)
        # [ours] Three pictures in ten have hardly any noise. What this U-Net cannot give back of a clean
        # picture, an editor that steers its frozen decoder cannot draw either.
        u, weak = torch.rand(2, len(x), generator=g)
        t = torch.where(weak < 0.3, u / 10, u) * scheduler.config.num_train_timesteps
        t = t.long().to(args.device)
        states = model["text"](tokenize(tokenizer, texts, args.device)).last_hidden_state
        output = model["unet"](scheduler.add_noise(x, noise, t), t, states).sample
        error = (output - x).square().mean((1, 2, 3))
        # As if it predicted the velocity, but at weak noise no more than ten times the weight of pure noise.
        weight = (1 / (1 - scheduler.alphas_cumprod.to(t.device)[t])).clamp(max=10)
        return {"loss": (weight * error).mean(), "x_0": error.mean()}

    fit("unet", model, loss, steps=2200, lr=1e-2, runs=args.runs, ema_decay=0.997, muon=True)
    parts = {"unet": model["unet"].half(), "text_encoder": model["text"].half()}
    parts |= {"tokenizer": tokenizer, "scheduler": scheduler}
    for name, part in parts.items():
        save(folder / name, part)
    unscreened = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(vae, **parts, **unscreened).save_config(folder)


def encode_scenes(vae: nn.Module, scenes: list[world.Scene], device: torch.device) -> Tensor:
    """The scenes' latents, (N, 16, 8, 8) half floats on the CPU."""
    latents = []
    for start in tqdm(range(0, len(scenes), 250), desc="encode", mininterval=10):
        images = from_bytes(rendered(scenes[start : start + 250]).to(device))
        latents.append(encode_images(vae, images).cpu().half())
    return torch.cat(latents)
