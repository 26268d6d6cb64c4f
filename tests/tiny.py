"""Every pretrained part, an editor and a dataset, small enough to be made in a test."""

import json

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from rcldm import RCLDM
from training import loop
from training.checkpoint import save_checkpoint

P = 32  # so the grid has 64 pixels, and 8 latent pixels


def new_unet(**sizes):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        **sizes,
    )


def save_stable_diffusion(folder):
    sizes = dict(block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=4, cross_attention_dim=32)
    new_unet(**sizes, sample_size=8).save_pretrained(folder / "unet")
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
    model = RCLDM.from_unet(unet, prompt_encoder_depth=1)
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


def save_clip(folder):
    vision = {"image_size": P, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 64, "layers": 1, "width": 32, "heads": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir()
    record = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")


def new_segmenter(labels, size=P, queries=4):
    stages = [f"stage{k}" for k in range(1, 5)]
    sizes = dict(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, patch_size=4)
    swin = SwinConfig(image_size=size, out_features=stages, **sizes)
    sizes = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32)
    sizes |= dict(
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=queries
    )
    names = dict(id2label=dict(enumerate(labels)), label2id={name: k for k, name in enumerate(labels)})
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, **sizes, **names))


def save_segmenter(folder):
    new_segmenter(("person", "sky")).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": P, "width": P}, ignore_index=255).save_pretrained(folder)


def save_llm(folder):
    tokenizer = CLIPTokenizer().train_new_from_iterator(["make it night", "remove the dog"], vocab_size=600)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)


def save_data(folder, instructions=("make it night", "remove the dog"), pairs=3):
    rng = np.random.default_rng(0)
    for split in ("train", "seen"):
        (folder / split).mkdir(parents=True)
        lines = []
        for k, instruction in enumerate(i for i in instructions for _ in range(pairs)):
            names = f"{k}_before.png", f"{k}_after.png"
            for name in names:
                pixels = rng.integers(0, 256, (P, P, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name)
            keys = ("input_file_name", "output_file_name", "instruction")
            lines.append(json.dumps(dict(zip(keys, (*names, instruction)))))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def save_all(root):
    """Every part that training takes, and a dataset, under `root`, which is returned."""
    torch.manual_seed(0)
    save_stable_diffusion(root / "sd")
    save_clip(root / "clip")
    save_segmenter(root / "segmenter")
    save_llm(root / "llm")
    save_data(root / "data")
    return root


def options(parts, output, **paths):
    """Those of a tiny run of train.py; `paths` in the place of some of the parts."""
    given = {name: name for name in ("clip", "segmenter", "llm", "data")} | {"stable_diffusion": "sd"}
    sources = {name: paths.get(name, parts / folder) for name, folder in given.items()}
    argv = [str(x) for name, source in sources.items() for x in (f"--{name.replace('_', '-')}", source)]
    argv += ["--backbone", "sd15", "--panel", str(P), "--batch", "2", "--workers", "0", "--device", "cpu"]
    return [*argv, "--cache", str(parts / "cache"), "--output", str(output)]


class Stopped(Exception):
    pass


def stop_after(step, monkeypatch):
    """Ends `training.loop.fit`, which then saves at every step, as it has saved this one."""

    def save_and_stop(folder, at, *rest, **more):
        save_checkpoint(folder, at, *rest, **more)
        if at == step:
            raise Stopped

    monkeypatch.setattr(loop, "SAVE_EVERY", 0)
    monkeypatch.setattr(loop, "SAVE_AFTER", 0)
    monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)
