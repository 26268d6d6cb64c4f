"""Stable Diffusion 1.5, CLIP ViT-L-14 and Mask2Former Swin-S: their published configurations, random weights.

They show shapes, memory, loading and time, and of quality nothing. float16, which halves the files.
"""

import dataclasses
from pathlib import Path

import torch

import backbone


def save_stable_diffusion(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    )
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    toy = backbone.find_folder(backbone.preset("toy").stable_diffusion)  # its words, to the paper's length
    tokenizer = CLIPTokenizer.from_pretrained(toy / "tokenizer", model_max_length=77)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**schedule, set_alpha_to_one=False, clip_sample=False, steps_offset=1)
    parts = vae.half(), text.half(), tokenizer, unet.half(), scheduler
    pipe = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder)


def save_clip(folder: Path) -> None:
    import open_clip
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_model

    clip = open_clip.create_model("ViT-L-14").half()
    folder.mkdir(parents=True)
    config = open_clip.get_model_config("ViT-L-14")
    save_config_for_hf(clip, folder / "open_clip_config.json", config)
    save_model(clip, str(folder / "open_clip_model.safetensors"))


def save_segmenter(folder: Path) -> None:
    import transformers

    swin = transformers.SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    labels = {0: "person"} | {k: f"class {k}" for k in range(1, 133)}  # COCO panoptic has 133 classes
    names = {"id2label": labels, "label2id": {name: k for k, name in labels.items()}}
    config = transformers.Mask2FormerConfig(backbone_config=swin, num_queries=100, **names)
    transformers.Mask2FormerForUniversalSegmentation(config).half().save_pretrained(folder)
    size = {"height": 384, "width": 384}
    transformers.Mask2FormerImageProcessor(size=size, ignore_index=255).save_pretrained(folder)


RANDOM = {"stable_diffusion": save_stable_diffusion, "clip": save_clip, "segmenter": save_segmenter}


def preset(name: str, folder: Path, parts: tuple[str, ...] = ("stable_diffusion", "clip")) -> backbone.Preset:
    """The preset, where it is not the toy with these parts, written below the folder, and the toy's language
    model, whose size is free."""
    chosen = backbone.preset(name)
    if name == "toy":
        return chosen
    torch.manual_seed(0)
    for part in parts:
        if not (folder / part).exists():
            RANDOM[part](folder / part)
    sources = {part: str(folder / part) for part in parts}
    return dataclasses.replace(chosen, llm=backbone.preset("toy").llm, **sources)
