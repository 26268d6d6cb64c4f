"""evaluation/readings.py: train.py trains with the exchanged losses, at every noise level."""

import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import P, options

import backbone
import esm
import sam_loss
import train
from evaluation import readings
from training import validation


def test_the_distance_is_that_of_the_two_shifts_and_reaches_the_prediction(parts):
    clip = backbone.load_clip(str(parts / "clip"))
    before, predicted, after = torch.rand(3, 2, 3, P, P) * 2 - 1
    predicted.requires_grad_()
    shifts = [esm.editing_shift(clip, before, picture) for picture in (predicted, after)]
    weight = torch.tensor([1.0, 0.5])
    loss = readings.shift_distance(clip, before, predicted, after, weight)
    distances = (shifts[0] - shifts[1]).norm(dim=1)
    assert loss.item() == pytest.approx((weight * distances).mean().item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert gradient[0].any() and gradient[1].any()
    assert readings.shift_distance(clip, before, after, after, weight) == 0


def test_train_counts_every_noise_level_by_it_alone(parts, tmp_path, monkeypatch):
    """Of pure noise, which `train.py` itself gives no weight."""
    for module, name in ((esm, "reliability"), (esm, "editing_shift_loss"), (train, "ES_EVERY")):
        monkeypatch.setattr(module, name, getattr(module, name))  # what the program exchanges is put back
    monkeypatch.setattr(train, "draw_timesteps", lambda count, *_: torch.full((count,), 999))
    monkeypatch.setattr(validation, "PICTURES", 2)
    monkeypatch.setattr(
        sam_loss.SelectiveAreas, "__call__", lambda self, images: torch.ones(len(images), 1, P, P)
    )
    terms = {}
    for name, model in (("ours", train.RCLDM.from_unet), ("reading", readings.new_model)):
        # A cache of its own: the areas made up above are no other test's, and others' are not this one's.
        argv = [
            *options(parts, tmp_path / name),
            "--no-liu",
            "--steps",
            "1",
            "--cache",
            str(tmp_path / "cache"),
        ]
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        train.main(new_model=model)
        log = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        terms[name] = {key: log.Scalars(f"loss/{key}")[0].value for key in ("es", "sam")}
    assert terms["ours"] == {"es": 0, "sam": 0}
    assert terms["reading"]["es"] > 0 and terms["reading"]["sam"] > 0
