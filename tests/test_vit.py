"""evaluation/vit.py: ViT stands where VMamba does, is trained by train.py, and is loaded by evaluate.py."""

import sys

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny import P, options

import backbone
import train
from evaluation import evaluate
from evaluation.vit import ViTRCLDM
from rcldm import RCLDM, VisualPromptEncoder
from training import validation


def test_it_starts_as_ours_does_and_differs_in_its_blocks_and_links_alone(parts):
    unet = UNet2DConditionModel.from_pretrained(parts / "sd" / "unet")
    ours, vit = RCLDM.from_unet(unet), ViTRCLDM.from_unet(unet)
    grid, x_t, states = torch.rand(2, 3, 2 * P, 2 * P), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    down, mid = vit(x_t, 7, states, grid, return_dict=False)
    assert not any(residual.any() for residual in (*down, mid))
    assert isinstance(vit.prompt_encoder, VisualPromptEncoder)

    def rest(model):
        other = "prompt_encoder.blocks.", "trainable_copy.controlnet_"
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        return {name: shape for name, shape in shapes.items() if not name.startswith(other)}

    assert rest(vit) == rest(ours)
    assert all(isinstance(link, torch.nn.Conv2d) for link in vit.trainable_copy.controlnet_down_blocks)
    count_ours, count_vit = (sum(p.numel() for p in m.prompt_encoder.parameters()) for m in (ours, vit))
    assert len(vit.prompt_encoder.blocks) == 4 and 0.8 < count_vit / count_ours < 1.25


def test_what_train_makes_of_it_evaluate_loads(parts, tmp_path, monkeypatch):
    argv = [*options(parts, tmp_path / "run"), "--no-esm", "--no-sam", "--no-liu", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["vit.py", *argv])
    monkeypatch.setattr(validation, "PICTURES", 2)
    train.main(new_model=ViTRCLDM.from_unet)
    editor = tmp_path / "run" / "editor"
    model, _ = backbone.load_editor(editor)
    assert type(model) is ViTRCLDM and model.prompt_encoder.zero_proj.weight.any()
    asked = [str(editor), "--data", str(parts / "data"), "--count", "2", "--steps", "2"]
    evaluate.main([*asked, "--output", str(tmp_path / "out")])
    answers = sorted((tmp_path / "out" / "seen" / "both").glob("*.png"))
    assert [Image.open(answer).size for answer in answers] == [(P, P)] * 2


def test_it_is_not_trained_without_what_it_compares(parts, tmp_path, monkeypatch, refused):
    argv = [*options(parts, tmp_path / "run"), "--no-rcldm", "--no-esm", "--no-sam", "--no-liu"]
    monkeypatch.setattr(sys, "argv", ["vit.py", *argv])
    assert "--no-rcldm" in refused(train.main, new_model=ViTRCLDM.from_unet)
