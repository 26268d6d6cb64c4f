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


@pytest.mark.parametrize("reading", list(readings.READINGS))
def test_train_counts_the_other_noise_levels_by_it_alone(reading, parts, tmp_path, monkeypatch):
    """Of pure noise, where `train.py` itself gives L_sam a weight, and none to L_es."""
    for module, name, _ in readings.READINGS[reading]:
        monkeypatch.setattr(module, name, getattr(module, name))  # what the program exchanges is put back
    monkeypatch.setattr(train, "draw_timesteps", lambda count, *_: torch.full((count,), 999))
    monkeypatch.setattr(validation, "PICTURES", 2)
    monkeypatch.setattr(
        sam_loss.SelectiveAreas, "__call__", lambda self, images: torch.ones(len(images), 1, P, P)
    )
    counted = {}
    for name, main, first in (("ours", train.main, []), ("reading", readings.main, [reading])):
        # A cache of its own: the areas made up above are no other test's, and others' are not this one's.
        own = "--cache", str(tmp_path / "cache")
        argv = ["a program", *first, *options(parts, tmp_path / name), "--no-liu", "--steps", "1", *own]
        monkeypatch.setattr(sys, "argv", argv)
        main()
        log = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        counted[name] = {key for key in ("es", "sam") if log.Scalars(f"loss/{key}")[0].value > 0}
    assert counted["ours"] == {"sam"}
    assert counted["reading"] == ({"es", "sam"} if reading == "esm-everywhere" else set())


def test_a_reading_comes_first(monkeypatch, refused):
    monkeypatch.setattr(sys, "argv", ["evaluation.readings", "--steps", "1"])
    assert "esm-everywhere or sam-at-low-noise" in refused(readings.main)
