"""rcldm.py: the four orders, VMamba's checkpoints load, and an untrained RCLDM changes nothing."""

import itertools
import json

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import new_unet
from torch.nn import functional as F

import rcldm
import scan_kernels
from rcldm import (
    RCLDM,
    SS2D,
    VisualPromptEncoder,
    VSSBlock,
    ZeroVMamba,
    cross_merge,
    cross_scan,
    selective_scan,
)

# ------------------------------------------------------------------------------------ four orders, VMamba


def test_the_four_orders():
    image = torch.arange(6.0).view(1, 1, 2, 3)
    orders = [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert cross_scan(image)[0, :, 0].int().tolist() == orders
    assert torch.equal(cross_merge(cross_scan(image), 2, 3), 4 * image)


@settings(max_examples=20, deadline=None)
@given(*[st.integers(1, size) for size in (2, 3, 5, 5)], st.integers(0, 100))
def test_cross_merge_is_the_adjoint_of_cross_scan(b, c, h, w, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 10, (b, c, h, w), generator=g).double().requires_grad_()
    ys = torch.randint(-9, 10, (b, 4, c, h * w), generator=g).double().requires_grad_()
    places = torch.arange(float(h * w))
    orders = cross_scan(places.view(1, 1, h, w))[0, :, 0]  # (4, L)
    assert torch.equal(orders.sort().values, places.expand(4, -1))  # each place once, in each order
    assert (cross_scan(x) * ys).sum() == (x * cross_merge(ys, h, w)).sum()  # whole numbers: exact
    (gradient,) = torch.autograd.grad((cross_scan(x) * ys).sum(), x)
    assert torch.equal(gradient, cross_merge(ys, h, w))
    (gradient,) = torch.autograd.grad((cross_merge(ys, h, w) * x).sum(), ys)
    assert torch.equal(gradient, cross_scan(x))


def test_ss2d_is_what_it_says():
    """Against the plainest way to write it: one direction, one scan at a time."""
    torch.manual_seed(0)
    m = SS2D(24, d_state=3, ssm_ratio=2.0)  # 48 channels, 2 numbers of Δ
    x = torch.randn(2, 3, 5, 24)
    image = F.silu(m.conv2d(F.linear(x, m.in_proj.weight).permute(0, 3, 1, 2)))
    merged = 0
    for k in range(4):
        along = image.transpose(2, 3) if k % 2 else image
        u = along.flatten(2) if k < 2 else along.flatten(2).flip(-1)
        read = torch.einsum("bdl,cd->bcl", u, m.x_proj.weight.view(4, 8, 48)[k])
        delta = torch.einsum("brl,dr->bdl", read[:, :2], m.dt_projs.weight.view(4, 48, 2)[k])
        A, D, bias = -m.A_logs.view(4, 48, 3)[k].exp(), m.Ds.view(4, 48)[k], m.dt_projs_bias[k]
        y = selective_scan(u, delta, A, read[:, 2:5], read[:, 5:], D, bias, True, backend="reference")
        y = y if k < 2 else y.flip(-1)
        merged = merged + (y.unflatten(2, (5, 3)).transpose(2, 3) if k % 2 else y.unflatten(2, (3, 5)))
    expected = m.out_proj(m.out_norm(merged.permute(0, 2, 3, 1)))
    torch.testing.assert_close(m(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("state", [1, 4])
def test_ss2d_is_the_same_with_one_image_and_with_four_copies(monkeypatch, state):
    """Numba's kernel reads one image in four orders; the other scans read a copy in each."""
    torch.manual_seed(0)
    m = SS2D(40, d_state=state, ssm_ratio=1.0)
    x = torch.randn(2, 7, 5, 40, requires_grad=True)
    direction = torch.randn(2, 7, 5, 40)
    results = []
    for choice in (scan_kernels.KERNELS, {}):
        monkeypatch.setattr(scan_kernels, "KERNELS", choice)
        y = m(x)
        results.append((y, *torch.autograd.grad((y * direction).sum(), [x, *m.parameters()])))
    for one, four in zip(*results):
        assert (one - four).norm() <= 1e-5 * four.norm() > 0
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.undo()
        low = m(x)
    assert low.dtype == torch.bfloat16 and (low - results[0][0]).norm() <= 2e-2 * results[0][0].norm()


def vmamba_block(c, ratio, n=1, *, mlp=True, spelling):
    """Names and shapes of one block in VMamba's checkpoints (its vmamba.py), filled with random numbers."""
    d, r, k = int(c * ratio), -(-c // 16), 4
    shapes = {
        "norm.weight": (c,),
        "norm.bias": (c,),
        "op.A_logs": (k * d, n),
        "op.Ds": (k * d,),
        "op.dt_projs_bias": (k, d),
        "op.in_proj.weight": (d, c),
        "op.conv2d.weight": (d, 1, 3, 3),
        "op.out_norm.weight": (d,),
        "op.out_norm.bias": (d,),
        "op.out_proj.weight": (c, d),
    }
    if spelling == "flat":
        shapes |= {"op.x_proj.weight": (k * (r + 2 * n), d), "op.dt_projs.weight": (k * d, r)}
    else:
        shapes |= {"op.x_proj_weight": (k, r + 2 * n, d), "op.dt_projs_weight": (k, d, r)}
    if mlp:
        shapes |= {
            "norm2.weight": (c,),
            "norm2.bias": (c,),
            "mlp.fc1.weight": (4 * c, c),
            "mlp.fc1.bias": (4 * c,),
        }
        shapes |= {"mlp.fc2.weight": (c, 4 * c), "mlp.fc2.bias": (c,)}
    if spelling == "convolutions":  # channels-first models: 1×1 convolutions for linear layers
        shapes |= {
            name: (*s, 1, 1) for name, s in shapes.items() if len(s) == 2 and name.endswith("proj.weight")
        }
        shapes |= {name: (*s, 1, 1) for name, s in shapes.items() if name.startswith("mlp") and len(s) == 2}
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


RELEASES = {  # width of the first stage, ratio
    "vmamba tiny s1l8": (96, 1.0),
    "vmamba tiny s2l5": (96, 2.0),
    "vmamba base s2l15": (128, 2.0),
}


@pytest.mark.parametrize("spelling", ["flat", "stacked", "convolutions"])
@pytest.mark.parametrize("release", RELEASES)
def test_vmamba_checkpoints_load(release, spelling):
    width, ratio = RELEASES[release]
    for c in (width, 2 * width):
        weights = vmamba_block(c, ratio, spelling=spelling)
        stage = torch.nn.Sequential(VSSBlock(c, ssm_ratio=ratio))  # nested, as blocks are in a checkpoint
        stage.load_state_dict({f"0.{name}": w for name, w in weights.items()}, strict=True)
        numbers = torch.cat([w.flatten() for w in weights.values()]).sort().values
        assert torch.equal(
            torch.cat([w.flatten() for w in stage.state_dict().values()]).sort().values, numbers
        )
    stacked = vmamba_block(16, 1.0, 2, mlp=False, spelling="stacked")
    block = VSSBlock(16, 2, 1.0, mlp_ratio=0.0)
    block.load_state_dict(dict(stacked))
    assert torch.equal(block.op.x_proj.weight[5:10], stacked["op.x_proj_weight"][1])
    assert torch.equal(block.op.dt_projs.weight[32:48], stacked["op.dt_projs_weight"][2])


def test_foreign_weights_are_refused():
    block = VSSBlock(16, 2, 1.0, mlp_ratio=0.0)
    weights = vmamba_block(16, 1.0, 2, mlp=False, spelling="stacked")
    for change in ({"op.x_proj_weight": torch.ones(4, 6, 16)}, {"op.in_proj.weight": torch.ones(32, 16)}):
        with pytest.raises(RuntimeError, match="size mismatch"):
            block.load_state_dict(weights | change)
    for extra in ({"op.x_proj_bias": torch.ones(4)}, {"op.conv2d.bias": torch.ones(16)}):  # VMamba v1 has one
        with pytest.raises(RuntimeError, match="Unexpected key"):
            block.load_state_dict(weights | extra)


# -------------------------------------------------------------------------------------------------- RCLDM

DESIGNS = "vmamba", "conv"


@pytest.fixture(scope="module")
def unet():
    sizes = dict(block_out_channels=(16, 32), norm_num_groups=4, attention_head_dim=8, cross_attention_dim=12)
    return new_unet(**sizes, in_channels=16, out_channels=16).requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 16, 8, 8, generator=g), torch.randn(2, 5, 12, generator=g)
    return latents, torch.tensor([10, 900]), text


@pytest.fixture(scope="module")
def grid():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1


def edited(unet, model, inputs, condition):
    down, mid = model(*inputs, condition, return_dict=False)
    return unet(*inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample


def awake(model, seed=0):
    """The model with random numbers where it starts at zero."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.abs().max() == 0:
            p.data = torch.randn(p.shape, generator=g) * 0.1
    return model.eval()


def all_residuals(output):
    return [*output.down_block_res_samples, output.mid_block_res_sample]


@pytest.mark.parametrize("design", DESIGNS)
def test_untrained_it_changes_no_bit(unet, inputs, grid, design):
    model = RCLDM.from_unet(unet, design)
    with torch.no_grad():
        assert torch.equal(edited(unet, model, inputs, grid), unet(*inputs).sample)
        assert not model.encode_condition(grid).any()
    shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4), (2, 32, 4, 4)]
    assert [tuple(r.shape) for r in all_residuals(model(*inputs, grid))] == shapes


@pytest.mark.parametrize("design", DESIGNS)
def test_everything_learns_from_the_third_step_on(unet, inputs, grid, design):
    torch.manual_seed(0)
    model = RCLDM.from_unet(unet, design, prompt_encoder_depth=2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    with_gradient = []
    for _ in range(3):
        optimiser.zero_grad()
        (edited(unet, model, inputs, grid) - inputs[0]).square().mean().backward()
        moving = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        with_gradient.append(moving)
        optimiser.step()
    names = {name for name, _ in model.named_parameters()}
    assert with_gradient[0] and all("controlnet_" in name for name in with_gradient[0])
    assert any(name.startswith("prompt_encoder") for name in with_gradient[1])
    assert not names - with_gradient[2]
    with torch.no_grad():
        one, other = (edited(unet, model, inputs, seen) for seen in (grid, -grid))
        assert not torch.equal(one, other)


@pytest.mark.parametrize("design", DESIGNS)
def test_saved_and_loaded_it_is_the_same(unet, inputs, grid, design, tmp_path):
    options = dict(prompt_encoder_depth=1, prompt_encoder_width=24, prompt_encoder_d_state=2)
    model = awake(RCLDM.from_unet(unet, design, **options))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert json.loads((tmp_path / "config.json").read_text())["design"] == design
    loaded = RCLDM.from_pretrained(tmp_path)
    assert loaded.config.prompt_encoder_width == 24 and not loaded.training
    assert set(loaded.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        for a, b in zip(all_residuals(model(*inputs, grid)), all_residuals(loaded(*inputs, grid))):
            assert a.any() and torch.equal(a, b)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_condition_may_be_encoded_once(unet, inputs, grid, design):
    model = awake(RCLDM.from_unet(unet, design, prompt_encoder_depth=1))
    with torch.no_grad():
        encoding = model.encode_condition(grid)
        assert encoding.shape == (2, 16, 8, 8) and encoding.any()
        inline, once = (all_residuals(model(*inputs, condition)) for condition in (grid, encoding))
        assert all(torch.equal(a, b) for a, b in zip(inline, once))
        for_all = model(*inputs, encoding[:1]), model(*inputs, encoding[:1].expand(2, -1, -1, -1))
        assert all(torch.equal(a, b) for a, b in zip(*map(all_residuals, for_all)))
        halved = all_residuals(model(*inputs, encoding, conditioning_scale=0.5))
        assert all(torch.equal(a * 0.5, b) for a, b in zip(once, halved))


def test_the_prompt_encoder_has_more_state_than_the_links(unet):
    model = RCLDM.from_unet(unet, prompt_encoder_depth=1, prompt_encoder_d_state=3)
    assert model.prompt_encoder.blocks[0].op.A_logs.shape[1] == 3
    assert model.trainable_copy.controlnet_mid_block.block.op.A_logs.shape[1] == 1


def test_other_factors_and_shapes_of_the_grid(unet, inputs):
    for design, factor in itertools.product(DESIGNS, (1, 2, 4, 16)):
        model = RCLDM.from_unet(unet, design, factor=factor, prompt_encoder_depth=1)
        latents = torch.randn(1, 16, 4, 6)
        residuals = model(latents, 3, inputs[2][:1], torch.randn(1, 3, 4 * factor, 6 * factor))
        assert residuals.down_block_res_samples[0].shape == (1, 16, 4, 6)


def test_a_wrong_condition_is_one_clear_line(unet, inputs):
    model = RCLDM.from_unet(unet, prompt_encoder_depth=1)
    for shape in ((2, 3, 32, 32), (2, 3, 8, 8), (2, 4, 64, 64), (2, 16, 4, 4), (3, 3, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=r"condition (does not fit|grid must be)"):
            model(*inputs, torch.zeros(shape))
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode_condition(torch.zeros(1, 3, 56, 64))
    with pytest.raises(ValueError, match="unknown design 'swin'"):
        RCLDM.from_unet(unet, "swin")
    with pytest.raises(ValueError, match="power of two"):
        RCLDM.from_unet(unet, factor=6)


def test_one_block_sees_the_whole_grid():
    torch.manual_seed(0)
    encoder = awake(VisualPromptEncoder(16, depth=1))
    grid = torch.randn(1, 3, 64, 64, requires_grad=True)
    encoder(grid)[0, :, 1, 6].sum().backward()  # a location in the example's "after" panel
    seen = F.max_pool2d(grid.grad.abs().amax(1, keepdim=True), 8)[0, 0]
    assert (seen > 0).all()


def test_zero_vmamba_contains_the_zero_convolution():
    link = awake(ZeroVMamba(8))
    x = torch.randn(2, 8, 4, 6)
    assert not torch.equal(link(x), F.conv2d(x, link.zero_proj.weight[..., None, None], link.zero_proj.bias))
    link.block.op.out_proj.weight.data.zero_()
    convolved = F.conv2d(x, link.zero_proj.weight[..., None, None], link.zero_proj.bias)
    torch.testing.assert_close(link(x), convolved, rtol=1e-5, atol=1e-6)
    assert not ZeroVMamba(8)(x).any()


def test_it_fits_stable_diffusion_1_5():
    with torch.device("meta"):  # shapes only
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the configuration of SD 1.5
        model = RCLDM.from_unet(unet)
        residuals = model(torch.empty(1, 4, 8, 8), 1, torch.empty(1, 77, 768), torch.empty(1, 3, 64, 64))
    widths = [r.shape[1] for r in all_residuals(residuals)]
    assert widths == [320] * 4 + [640] * 3 + [1280] * 6
    links = sum(p.numel() for name, p in model.named_parameters() if "controlnet_" in name)
    assert links < 0.15 * model.num_parameters()


# -------------------------------------------------------------------- hooks of diffusers and accelerate


def residuals_of(model, inputs, grid, dtype=torch.float32):
    """All residuals of the grid, then those of its encoding, made alone."""
    latents, timestep, text = inputs
    inputs = latents.to(dtype), timestep, text.to(dtype)
    with torch.no_grad():
        encoding = model.encode_condition(grid)
        outputs = [model(*inputs, seen, return_dict=False) for seen in (grid, encoding)]
    return [residual for down, mid in outputs for residual in (*down, mid)]


def new_model(unet, design, dtype=torch.float32):
    torch.manual_seed(0)
    return awake(RCLDM.from_unet(unet, design, prompt_encoder_depth=3)).to(dtype)


@pytest.mark.parametrize(
    "storage, compute",
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16),
    ],
)
@pytest.mark.parametrize("design", DESIGNS)
def test_cast_layer_by_layer_it_has_the_stored_weights(unet, inputs, grid, design, storage, compute):
    """To the last bit those of a model whose layers are rounded; norms, scan and buffers are left alone."""
    rounded, cast = (new_model(unet, design, compute) for _ in range(2))
    cast.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    for name, layer in rounded.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            assert next(cast.get_submodule(name).parameters()).dtype == storage, name
            layer.to(storage).to(compute)
    wanted, found = (residuals_of(model, inputs, grid, compute) for model in (rounded, cast))
    assert all(w.any() and torch.equal(w, f) for w, f in zip(wanted, found))


@pytest.mark.parametrize("design", DESIGNS)
def test_cast_to_half_for_its_layers_alone_it_runs(unet, inputs, grid, design):
    wanted = residuals_of(new_model(unet, design), inputs, grid)
    cast = new_model(unet, design)
    cast.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    for w, f in zip(wanted, residuals_of(cast, inputs, grid, torch.bfloat16)):
        assert f.dtype == torch.bfloat16 and (w - f).norm() < 0.03 * w.norm()


@pytest.mark.usefixtures("nan_until_written")
@pytest.mark.parametrize("blocks", [0, 1, 2])  # a group; 0: every layer is a group of its own
@pytest.mark.parametrize("design", DESIGNS)
def test_offloaded_in_groups_it_computes_the_same(unet, inputs, grid, design, blocks, tmp_path):
    wanted = residuals_of(new_model(unet, design), inputs, grid)
    model = new_model(unet, design)
    how = {"onload_device": torch.device("cpu"), "num_blocks_per_group": blocks}
    how["offload_type"] = "block_level" if blocks else "leaf_level"
    model.enable_group_offload(**how, offload_to_disk_path=str(tmp_path))
    assert all(p.isnan().all() for p in model.parameters() if p.is_floating_point())
    for _ in range(2):
        assert all(map(torch.equal, residuals_of(model, inputs, grid), wanted))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("design", DESIGNS)
def test_offloaded_by_accelerate_it_computes_the_same(unet, inputs, grid, design, buffers):
    wanted = residuals_of(new_model(unet, design), inputs, grid)
    model = accelerate.cpu_offload(new_model(unet, design), torch.device("cpu"), offload_buffers=buffers)
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert all(map(torch.equal, residuals_of(model, inputs, grid), wanted))


@pytest.mark.slow
def test_a_compiled_block_computes_the_same():
    torch.manual_seed(0)
    block, x = rcldm.VSSBlock(16, 2), torch.randn(2, 8, 8, 16)
    y, (gradient,) = block(x), torch.autograd.grad(block(x).square().sum(), block.op.A_logs)
    compiled = torch.compile(block)
    torch.testing.assert_close(compiled(x), y, rtol=1e-4, atol=1e-5)
    (again,) = torch.autograd.grad(compiled(x).square().sum(), block.op.A_logs)
    torch.testing.assert_close(again, gradient, rtol=1e-3, atol=1e-4)


def test_the_copy_starts_from_the_unets_weights(unet):
    copy, theirs = RCLDM.from_unet(unet).trainable_copy.state_dict(), unet.state_dict()
    own = [name for name in copy if not name.startswith("controlnet_")]
    assert len(own) > 20 and all(torch.equal(copy[name], theirs[name]) for name in own)


def test_the_scan_starts_as_mambas_does():
    op = rcldm.SS2D(64, d_state=4)
    step = F.softplus(op.dt_projs_bias)  # from 0.001 to 0.1, uniform in its logarithm
    assert 0.9e-3 < step.min() < 2e-3 and 0.05 < step.max() < 0.101
    torch.testing.assert_close(op.A_logs.exp(), torch.arange(1.0, 5).expand_as(op.A_logs))
