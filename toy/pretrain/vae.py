"""AutoencoderKL: 64×64 pictures <-> 8×8 latents of 16 channels."""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pictures import from_bytes
from toy import world
from toy.pretrain.loop import fit, pictures, save
from training.draws import draw_noise, step_generator

LATENT_CHANNELS = 16


def new_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    # One group for GroupNorm: with two channels a group it would wash out what makes a flat area red.
    return AutoencoderKL(
        block_out_channels=(16, 24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=world.PANEL,
    )


class LinearShell:
    """The VAE with nothing but its samplers, shortcuts and outer convolutions: a linear autoencoder.

    Flat colours are a linear matter, and the deep network takes long to find that out.  So the convolutions
    are trained alone first, at a tenth of the cost, and `grow` then adds the rest such that the function
    stays almost the same: residual branches start at zero, and the outer GroupNorm and SiLU are brought
    into a range where they are straight lines, by two channels of constant value and a large bias.
    """

    def __init__(self, vae: nn.Module) -> None:
        from diffusers.models.resnet import ResnetBlock2D

        self.vae, self.ends = vae, (vae.encoder, vae.decoder)
        self.blocks = [m for m in vae.modules() if isinstance(m, ResnetBlock2D)]
        for block in self.blocks:
            block.forward = lambda x, temb=None, skip=block.conv_shortcut: skip(x) if skip else x
        for end in self.ends:  # the last two channels are kept free for the constants
            end.conv_norm_out.forward = lambda x: F.pad(x[:, :-2], (0, 0, 0, 0, 0, 2))
            end.conv_act.forward = lambda x: x

    @torch.no_grad()
    def grow(self, images: Tensor) -> None:
        seen: list[Tensor] = []
        for end in self.ends:
            end.conv_norm_out.register_forward_hook(lambda _, __, x: seen.append(x))
        self.vae(images)
        for module in [*self.blocks, *(m for end in self.ends for m in (end.conv_norm_out, end.conv_act))]:
            del module.forward
            module._forward_hooks.clear()
        for block in self.blocks:
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
        last = self.vae.encoder.down_blocks[-1].resnets[0], self.vae.decoder.up_blocks[-1].resnets[0]
        for end, block, x in zip(self.ends, last, seen):
            content, channels = x[:, :-2].std(), x.shape[1]
            constant, gain, bias = 20 * content, 0.5 / content, 4.0
            block.conv_shortcut.weight[-2:] = 0
            block.conv_shortcut.bias[-2:] = torch.stack([constant, -constant])
            nn.init.constant_(end.conv_norm_out.weight, gain * constant * math.sqrt(2 / channels))
            nn.init.constant_(end.conv_norm_out.bias, bias)
            end.conv_out.weight[:, -2:] = 0
            end.conv_out.weight /= gain
            end.conv_out.bias -= bias * end.conv_out.weight.sum((1, 2, 3))


def train_vae(args: argparse.Namespace) -> None:
    vae = new_vae().to(args.device, memory_format=torch.channels_last)
    pool, _ = pictures(60_000, seed=args.seed)
    batch = 8

    def loss(step: int) -> dict[str, Tensor]:
        g = step_generator(args.seed, step)
        x = from_bytes(pool[torch.randint(len(pool), (batch,), generator=g)].to(args.device))
        posterior = vae.encode(x).latent_dist
        # [ours] Noise of one fixed strength on the latents and a whisper of a penalty on their size, in
        # place of a learned variance. Both only keep the latents' scale in bounds and their space smooth.
        z = posterior.mean + 0.05 * draw_noise(posterior.mean.shape, g, x.device)
        error = vae.decode(z).sample - x
        pixel = error.abs().mean() / 4 + error.square().mean()
        return {"loss": pixel + 2e-4 * posterior.mean.square().mean(), "mse": error.square().mean()}

    shell = LinearShell(vae)
    fit("vae-linear", vae, loss, steps=2000, lr=3e-3, runs=args.runs, ema_decay=0.99)
    shell.grow(from_bytes(pool[:64].to(args.device)))
    fit("vae", vae, loss, steps=12_000, lr=1e-3, runs=args.runs, ema_decay=0.99)

    # Last and longest, the decoder alone, for latents without noise: it is what every answer passes.
    def sharpness(step: int) -> dict[str, Tensor]:
        g = step_generator(args.seed + 1, step)
        x = from_bytes(pool[torch.randint(len(pool), (batch,), generator=g)].to(args.device))
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        error = vae.decode(z).sample - x
        return {"loss": error.abs().mean() / 8 + error.square().mean(), "mse": error.square().mean()}

    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    vae.post_quant_conv.requires_grad_(False)
    fit("vae-decoder", vae, sharpness, steps=40_000, lr=1e-3, runs=args.runs, ema_decay=0.999)
    with torch.no_grad():
        quant = vae.quant_conv
        # The noise that an AutoencoderKL reports is the same for every picture, and small.
        quant.weight[LATENT_CHANNELS:] = 0
        quant.bias[LATENT_CHANNELS:] = 2 * math.log(0.05)
        z = vae.encode(from_bytes(pool[:512].to(args.device))).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    save(args.out / "stable-diffusion" / "vae", vae.half())
