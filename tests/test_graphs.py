"""training/graphs.py: a recorded step is the step."""

from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs

import backbone
import train
from rcldm import RCLDM
from training.graphs import Recorded, recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU alone")
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-3), ("bf16", 3e-2)])
def test_a_replay_is_the_step_forwards_and_backwards(monkeypatch, precision, tolerance):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # a record may have other convolutions
    device = torch.device("cuda")
    sd = backbone.load_stable_diffusion(backbone.preset("toy").stable_diffusion, device)
    torch.manual_seed(0)
    model = RCLDM.from_unet(sd.unet, factor=8, panel=64).to(device).train()
    with torch.no_grad():  # past the zeros, so that every weight has a gradient
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision, kwargs_handlers=[AutocastKwargs(cache_enabled=False)]
    )
    model = accelerator.prepare(model)
    losses_of = object.__new__(train.Losses)
    losses_of.sd = sd
    replay = Recorded(losses_of.predict, model).replay
    for _ in range(3):
        inputs = torch.randn(4, 16, 16, 16), torch.randint(1000, (4,)), torch.randn(4, 64, 128)
        inputs = [x.to(device) for x in (*inputs, torch.rand(4, 3, 128, 128) * 2 - 1)]
        results = []
        for predict in (losses_of.predict, replay):
            model.zero_grad()
            with accelerator.autocast():
                prediction = predict(model, *inputs)
            prediction.square().mean().backward()
            results.append([prediction.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        with torch.no_grad():
            for p in model.parameters():  # as an optimiser does, in place
                p.mul_(0.99)
        largest = max(one.norm() for one in results[0][1:])
        for one, other in zip(*results):
            assert (one - other).norm() <= tolerance * one.norm() + 1e-2 * tolerance * largest


@pytest.mark.parametrize(
    "changed", [{"accumulate": 2}, {"gradient_checkpointing": True}, {"processes": 2}, {}]
)
def test_only_runs_whose_record_would_be_true_record(changed):
    args = {"accumulate": 1, "gradient_checkpointing": False, "processes": 1} | changed
    processes, model = args.pop("processes"), torch.nn.Linear(1, 1)
    for device, wanted in (("cuda", not changed), ("cpu", False)):
        predict = recorded(max, model, torch.device(device), Namespace(**args), processes)
        assert (predict is not max) == wanted
