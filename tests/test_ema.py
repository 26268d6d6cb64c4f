"""training/ema.py: the average starts as the weights, and follows them more slowly as it goes."""

import torch
from torch import nn

from training.ema import EMA


def test_the_average_is_the_first_weights_and_then_follows():
    model = nn.Linear(2, 1)
    ema = EMA(model, decay=0.5)
    wanted = None
    for n in range(20):
        with torch.no_grad():
            model.weight.fill_(float(n % 3))
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = float(n % 3) if n == 0 else decay * wanted + (1 - decay) * (n % 3)
        torch.testing.assert_close(ema.module.weight, torch.full((1, 2), wanted))
    assert not ema.module.weight.requires_grad and model.weight.requires_grad


def test_it_goes_on_from_its_state():
    model = nn.Linear(2, 1)
    one, two = EMA(model, 0.9), EMA(nn.Linear(2, 1), 0.9)
    for _ in range(3):
        one.update_parameters(model)
    two.load_state_dict(one.state_dict())
    other = nn.Linear(2, 1)
    one.update_parameters(other)
    two.update_parameters(other)
    assert int(two.n_averaged) == 4 and torch.equal(one.module.weight, two.module.weight)


def test_buffers_are_the_models():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    for _ in range(2):
        model(torch.randn(8, 2) + 5)
        ema.update_parameters(model)
    assert torch.equal(ema.module.running_mean, model.running_mean) and model.running_mean.min() > 0.1
