"""A Stable Diffusion, and an editor for it, small enough to be made in a test."""

import json

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rcldm import RCLDM

P = 32  # so the grid has 64 pixels, and 8 latent pixels


def save_stable_diffusion(folder):
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
    UNet2DConditionModel(
        **sizes,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
        sample_size=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    words = ["make it night", "add a hat", "remove the dog"]
    tokenizer = CLIPTokenizer().train_new_from_iterator(words, vocab_size=600)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **ids)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    return folder


def save_editor(folder, sd_folder, unet, trained=True, **settings):
    """An RCLDM as `train.py` saves it; `trained` means that its zeros have moved, at random."""
    torch.manual_seed(1)
    model = RCLDM.from_unet(unet, prompt_encoder_depth=1, prompt_encoder_latents=True)
    model.prompt_encoder.drawn.bias.data.fill_(9)  # a draft that keeps nothing of what is known
    if trained:
        for name, parameter in model.named_parameters():
            if "zero_proj" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    settings = {"stable_diffusion": str(sd_folder), "llm": None, "panel": P, "steps": 2} | settings
    (folder / "instructgie.json").write_text(json.dumps(settings))
    return folder


def save_parts(root):
    """The folders sd, editor and untrained under `root`, which is returned."""
    sd = save_stable_diffusion(root / "sd")
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    save_editor(root / "editor", sd, unet)
    save_editor(root / "untrained", sd, unet, trained=False)
    return root
