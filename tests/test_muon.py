"""training/muon.py: PyTorch's Muon in float32 and for convolutions too, AdamW for all that is no matrix."""

import pytest
import torch
from torch import nn

from rcldm import SS2D
from training.checkpoint import load_checkpoint, save_checkpoint
from training.muon import Muon, orthogonalised, parameter_groups


def new_model():
    """One layer of each kind, and two matrices of one shape, which are orthogonalised together."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
    return nn.Sequential(*convolutions, nn.Flatten(2), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))


def learn(model, optimizer, steps):
    """On batches of its own for every step."""
    for step in steps:
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(5, 16, 16), (1, 8, 27), (3, 40, 7)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ orthogonalised(matrices) @ v.mT  # (K, r, r)
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.3 and values.max() < 1.3 and (values - 1).abs().mean() < 0.3
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-3
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def test_matrices_learn_as_torchs_muon_has_it_within_bfloat16():
    """Its learning rate is adjusted to Adam's, as here: 0.2 · √max(m, n)."""
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (16, 16), (8, 27), (30, 4))]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    start = [p.detach().clone() for p in mine]
    same = {"lr": 0.02, "weight_decay": 0.1}
    ours = Muon([{"params": mine, "matrices": True, **same}], 0.02)
    torchs = torch.optim.Muon(theirs, **same, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(mine, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    for p, q, first in zip(mine, theirs, start):
        assert (p - q).norm() < 0.05 * (q - first).norm()


def test_all_else_learns_as_torchs_adamw_has_it():
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in ((16,), (4, 3), ())]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    same = {"lr": 0.02, "weight_decay": 0.1}
    ours = Muon([{"params": mine, "matrices": False, **same}], 0.02)
    torchs = torch.optim.AdamW(theirs, **same, betas=(0.9, 0.99))
    for step in range(6):
        for k, (p, q) in enumerate(zip(mine, theirs)):
            p.grad = None if k == step == 1 else torch.randn(p.shape)  # one that has no part in a step
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        torchs.step()
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q)


def test_a_kernel_is_a_matrix_of_output_channels_by_all_else():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1))
    kernel.grad = torch.randn(8, 3, 3, 3)
    matrix.grad = kernel.grad.flatten(1)
    for p in (kernel, matrix):  # alone, for together they would be one stack
        Muon([{"params": [p], "matrices": True}], 0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_matrices_are_the_weights_of_layers_but_depthwise_ones():
    model = new_model().append(SS2D(16, d_state=2)).append(nn.MultiheadAttention(16, 2))
    model[0].bias.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = parameter_groups(model, weight_decay=0.1)
    assert (matrices["matrices"], rest["matrices"]) == (True, False)
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    found = {names[id(p)] for p in matrices["params"]}
    of_the_scan = {f"7.{part}.weight" for part in ("in_proj", "x_proj", "dt_projs", "out_proj")}
    of_attention = {"8.in_proj_weight", "8.out_proj.weight"}
    assert found == {"0.weight", "2.weight", "4.weight", "6.weight"} | of_the_scan | of_attention
    assert {names[id(p)] for p in rest["params"]} == set(names.values()) - found - {"0.bias"}


def test_resumed_it_ends_in_the_same_bits(tmp_path):
    def new():
        model = new_model()
        return model, Muon(parameter_groups(model, 0.01), 0.01)

    (whole, one), (cut, two), (resumed, three) = new(), new(), new()
    learn(whole, one, range(6))
    learn(cut, two, range(3))
    save_checkpoint(tmp_path, 3, {"model": cut}, two, keep=1)
    assert load_checkpoint(tmp_path, {"model": resumed}, three) == 3
    learn(resumed, three, range(3, 6))
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert not any(map(torch.equal, whole.parameters(), cut.parameters()))
