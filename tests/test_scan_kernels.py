"""scan_kernels/: every backend of the scan computes what "reference" does, and "auto" takes one that runs."""

import math
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import scan_kernels
from rcldm import selective_scan
from scan_kernels import chunked

# On a CPU Triton's kernels are interpreted (tests/conftest.py says so).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS_HERE = ["chunked", *["triton"] * (find_spec("triton") is not None), *["numba"] * (DEVICE == "cpu")]


def scan_inputs(length, groups, state, *, batch=2, channels=8, extras=True, softplus=True, seed=0):
    """Random inputs of `selective_scan` by name, in mamba-ssm's own memory layout, that require gradients."""
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "u": torch.randn(batch, channels, length, generator=g),
        "delta": torch.rand(batch, channels, length, generator=g) * (4 if softplus else 0.3)
        - (3 if softplus else 0),
        "A": -torch.rand(channels, state, generator=g) * 2,
        "B": torch.randn(batch, groups, state, length, generator=g),
        "C": torch.randn(batch, groups, state, length, generator=g) / state,
    }
    if extras:
        inputs |= {
            "D": torch.randn(channels, generator=g),
            "delta_bias": torch.rand(channels, generator=g) * 0.1,
        }
    return {name: x.requires_grad_() for name, x in inputs.items()}


def value_and_gradients(inputs, softplus, backend):
    y = selective_scan(**inputs, delta_softplus=softplus, backend=backend)
    weights = torch.linspace(-1, 2, y.numel(), device=y.device).view_as(
        y
    )  # an upstream gradient without symmetry
    return y.detach(), torch.autograd.grad((y.float() * weights).sum(), list(inputs.values()))


def assert_backends_agree(inputs, softplus, one="reference", other="chunked"):
    y, gradients = value_and_gradients(inputs, softplus, one)
    y2, gradients2 = value_and_gradients(inputs, softplus, other)
    assert y2.shape == y.shape and y2.dtype == y.dtype
    # A GPU's kernels add up in another order, in which large states are as far off as they are large.
    size = max(1, y.abs().max().item()) if y.is_cuda else 1
    torch.testing.assert_close(y2, y, atol=1e-5 * size, rtol=1e-5)
    for name, g, g2 in zip(inputs, gradients, gradients2):
        assert g2.shape == inputs[name].shape
        assert (g2 - g).norm() <= 1e-4 * g.norm(), name


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 255, 256, 1000, 4099])
def test_chunked_agrees_with_reference(length, groups):
    for softplus, with_d, with_bias in (
        [(s, d, b) for s in (False, True) for d in (False, True) for b in (False, True)]
        if length < 100
        else [(True, True, True)]
        if length > 1000
        else [(True, True, True), (False, False, False)]
    ):
        small = dict(batch=1, channels=4) if length > 1000 else {}
        inputs = scan_inputs(length, groups, state=1 if with_d else 3, softplus=softplus, **small)
        inputs = {
            n: x for n, x in inputs.items() if (n != "D" or with_d) and (n != "delta_bias" or with_bias)
        }
        assert_backends_agree(inputs, softplus)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16, 37])  # of a chunk; the last one is shorter
def test_many_chunks_agree(monkeypatch, steps):
    monkeypatch.setattr(chunked, "_steps_at_once", lambda u, A: steps)
    assert_backends_agree(scan_inputs(63, groups=2, state=2), softplus=True)


KERNELS_HERE = [
    *["chunked"] * (DEVICE == "cuda"),
    "numba",
    "triton",
    pytest.param(
        "mamba-ssm",
        marks=pytest.mark.skipif(
            DEVICE != "cuda" or scan_kernels.kernel_error("mamba-ssm") is not None,
            reason="no CUDA kernel here",
        ),
    ),
]


@pytest.mark.parametrize("backend", KERNELS_HERE)
@pytest.mark.parametrize("groups, state", [(1, 1), (4, 4), (2, 3), (1, 16)])
@pytest.mark.parametrize("length", [1, 2, 70, *[64, 255, 1000, 4099] * (DEVICE == "cuda")])
def test_kernels_agree_with_reference(backend, length, groups, state):
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = scan_inputs(length, groups, state, batch=1 + (length < 100 and state < 16))
    device = "cpu" if backend == "numba" else DEVICE
    inputs = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    assert_backends_agree(inputs, True, other=backend)
    if backend == "mamba-ssm":
        ys = (selective_scan(**inputs, delta_softplus=True, backend=b) for b in ("auto", backend))
        assert torch.equal(*ys)


def test_the_triton_kernel_of_many_channels_in_any_memory_layout(monkeypatch):
    """Several programs for each group, the last not full; Δ and dy not laid out as u; one step before the
    end of a tile, and one after."""
    triton_gpu = pytest.importorskip("scan_kernels.triton_gpu")
    launch = triton_gpu._launch

    def small(u, A):
        (_, rows), sizes, tile = launch(u, A)
        return (-(-u.shape[2] // 2), rows), sizes, tile | {"T": 16, "P": 2}

    monkeypatch.setattr(triton_gpu, "_launch", small)
    for length in (47, 48, 49):
        inputs = scan_inputs(length, 2, 2, batch=1, channels=10)
        inputs = {name: x.detach().to(DEVICE) for name, x in inputs.items()}
        inputs["u"] = inputs["u"].mT.contiguous().mT  # channels innermost, as SS2D has them
        assert_backends_agree({n: x.requires_grad_() for n, x in inputs.items()}, True, other="triton")


@pytest.mark.parametrize("length", [31, 32, 33, 64, 255, 1000, 4099])  # T is 32
def test_numba_agrees_with_reference(length):
    for softplus in (False, True):
        inputs = scan_inputs(length, 2, 3, batch=1, softplus=softplus)
        assert_backends_agree(inputs, softplus, other="numba")
        without = {name: x for name, x in inputs.items() if name not in ("D", "delta_bias")}
        assert_backends_agree(without, softplus, other="numba")


@pytest.mark.parametrize(
    "threads, batch, channels, parts",
    [
        (1, 1, 96, 1),
        (2, 1, 96, 2),
        (2, 2, 96, 1),
        (2, 3, 34, 2),
        (3, 2, 48, 3),
        (2, 1, 31, 1),
        (8, 1, 96, 6),
        (2, 33, 96, 1),
    ],
)
def test_numba_has_a_part_of_the_channels_for_every_thread(monkeypatch, threads, batch, channels, parts):
    numba_cpu = pytest.importorskip("scan_kernels.numba_cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert numba_cpu._parts(batch, channels) == parts
    inputs = scan_inputs(40, 1, 2, batch=batch, channels=channels)
    assert_backends_agree(inputs, True, other="numba")
    monkeypatch.setattr(numba_cpu, "OPENMP", None)  # as where PyTorch has no OpenMP: one thread
    assert_backends_agree(inputs, True, other="numba")


def test_what_is_raised_in_a_thread_of_numbas_arrives(monkeypatch):
    numba_cpu = pytest.importorskip("scan_kernels.numba_cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def kernel(first, last):
        raise OSError("from a thread")

    with pytest.raises(OSError, match="from a thread"):
        numba_cpu._in_parallel(kernel, 2)
    if numba_cpu.OPENMP:  # Ctrl-C can come where nothing catches it, and C goes on
        monkeypatch.setattr(numba_cpu, "OPENMP", lambda *more: None)
        with pytest.raises(KeyboardInterrupt):
            numba_cpu._in_parallel(kernel, 2)


def test_numbas_functions_of_one_number():
    numba_cpu = pytest.importorskip("scan_kernels.numba_cpu")
    for x in [*torch.linspace(-120, 88, 2001).tolist(), 0.0, -1e-9, 1e-9, -0.3466, 0.3466]:
        x = torch.tensor(x)
        assert numba_cpu._exp(x.numpy()[()]) == pytest.approx(x.double().exp().item(), rel=1e-5)
        if x > -80:
            value, slope = numba_cpu._softplus(x.numpy()[()])
            assert value == pytest.approx(F.softplus(x.double()).item(), rel=1e-5)
            assert slope == pytest.approx(x.double().sigmoid().item(), rel=1e-5)
    small = torch.linspace(-1, 1, 501)
    errors = [numba_cpu._exp(x.numpy()[()]) / x.double().exp().item() - 1 for x in small]
    assert max(map(abs, errors)) < 3e-7
    assert numba_cpu._exp(small.new_tensor(-1e30).numpy()[()]) == 0
    assert numba_cpu._exp(small.new_tensor(1e30).numpy()[()]) == math.inf
    for function in (
        numba_cpu._exp,
        lambda x: numba_cpu._softplus(x)[0],
        lambda x: numba_cpu._softplus(x)[1],
    ):
        assert math.isnan(function(small.new_tensor(math.nan).numpy()[()]))


def test_nan_comes_out_of_the_scan_where_it_went_in():
    for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"):
        inputs = {n: x.detach().to(DEVICE) for n, x in scan_inputs(40, 1, 2, channels=4).items()}
        inputs[name].view(-1)[0] = math.nan  # of channel 0, at the first step
        for backend in ("reference", *BACKENDS_HERE):
            y = selective_scan(**inputs, delta_softplus=True, backend=backend)
            assert y[0, 0, 0].isnan() and not y.isnan().all(), (name, backend)


def test_small_steps_keep_their_digits():
    """softplus(-12) is 6e-6, and 1 + 6e-6 in float32 has two digits of it left."""
    inputs = {name: x.detach().to(DEVICE) for name, x in scan_inputs(70, 1, 2, extras=False).items()}
    inputs["delta"] = inputs["delta"] - 10
    for backend in BACKENDS_HERE:
        y, expected = (
            selective_scan(**inputs, delta_softplus=True, backend=b) for b in (backend, "reference")
        )
        assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_overwhelming_decay_stays_finite():
    inputs = {name: x.detach() for name, x in scan_inputs(300, 1, 2, softplus=False).items()}
    inputs["delta"] = inputs["delta"] * 300  # exponents of -200 a step, -60,000 over the length
    inputs = {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items()}
    expected = value_and_gradients(inputs, False, "reference")[0]
    for backend in BACKENDS_HERE:
        y, gradients = value_and_gradients(inputs, False, backend)
        assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-3)


def test_one_group_may_leave_out_its_axis_and_groups_may_be_split():
    inputs = scan_inputs(30, 1, 3)
    y = selective_scan(**inputs)
    assert torch.equal(selective_scan(**inputs | {"B": inputs["B"][:, 0], "C": inputs["C"][:, 0]}), y)
    inputs = scan_inputs(30, 4, 3)
    split = {name: inputs[name].unflatten(1, (4, 2)) for name in ("u", "delta")}
    for backend in ("reference", *BACKENDS_HERE):
        inputs, split = ({n: x.detach().to(DEVICE) for n, x in named.items()} for named in (inputs, split))
        y = selective_scan(**inputs, backend=backend)
        assert torch.equal(selective_scan(**inputs | split, backend=backend).flatten(1, 2), y)


def test_the_state_is_float32_under_bfloat16():
    inputs = {name: x.detach() for name, x in scan_inputs(500, 4, 2, softplus=False, extras=False).items()}
    inputs["u"], inputs["B"], inputs["C"] = (torch.ones_like(inputs[name]) for name in ("u", "B", "C"))
    inputs["delta"], inputs["A"] = torch.full_like(inputs["delta"], 2**-10), inputs["A"] * 0
    low = {name: x.to(DEVICE, x.dtype if name == "A" else torch.bfloat16) for name, x in inputs.items()}
    for backend in BACKENDS_HERE:  # h grows by 2^-10 a step: a bfloat16 state would stop growing at 0.25
        y = selective_scan(**low, backend=backend)
        assert y.dtype == torch.bfloat16
        assert y[0, 0, -1].item() == pytest.approx(2 * 500 / 1024, rel=1e-2)
    low = {
        n: x.detach().to(DEVICE, torch.bfloat16).requires_grad_() for n, x in scan_inputs(20, 2, 2).items()
    }
    y2, gradients2 = value_and_gradients(low, True, "reference")
    for backend in BACKENDS_HERE:
        y, gradients = value_and_gradients(low, True, backend)
        torch.testing.assert_close(y, y2, rtol=2e-2, atol=2e-2)
        for x, g, g2 in zip(low.values(), gradients, gradients2):
            assert g.dtype == x.dtype and (g - g2).norm() <= 2e-2 * g2.norm()


def test_autocast_does_not_touch_the_scan():
    inputs = {name: x.detach() for name, x in scan_inputs(40, 2, 3).items()}
    for backend in ("auto", "chunked", "numba"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = selective_scan(**inputs, backend=backend)
        assert torch.equal(y, selective_scan(**inputs, backend=backend))


def test_gradients_in_double_precision():
    inputs = {
        name: x.detach().double().requires_grad_()
        for name, x in scan_inputs(5, 2, 2, batch=1, channels=4).items()
    }

    def scan(*values):
        return selective_scan(**dict(zip(inputs, values)), delta_softplus=True, backend="chunked")

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("linear", [True, False])
def test_differentiating_twice_is_refused(linear):
    inputs = {name: x.detach().to(DEVICE).requires_grad_() for name, x in scan_inputs(6, 1, 2).items()}
    for backend in BACKENDS_HERE:
        y = selective_scan(**inputs, backend=backend)
        loss = y.sum() if linear else y.square().sum()
        (g,) = torch.autograd.grad(loss, inputs["u"], create_graph=True)
        # What goes into a linear loss gives a gradient that PyTorch takes for a constant.
        with pytest.raises(RuntimeError, match="does not require grad" if linear else "differentiate twice"):
            g.square().sum().backward()


@pytest.mark.parametrize("backend", [name for name in BACKENDS_HERE if name != "triton"])
def test_states_are_not_kept(backend):
    inputs = scan_inputs(2048, 1, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective_scan(**inputs, backend=backend)
    states = inputs["u"].numel() * 16
    assert max(kept) <= states / 4 and sum(kept) <= states / 2


def like(device, dtype=torch.float32):
    return SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", dtype=dtype)


def test_auto_takes_a_kernel_only_where_it_runs(monkeypatch):
    inputs = {name: x.detach() for name, x in scan_inputs(9, 1, 2).items()}
    assert scan_kernels.scan_backend(inputs["u"])[0] == "numba"
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="numba"))
    assert scan_kernels.scan_backend(inputs["u"].double())[0] == "chunked"
    assert scan_kernels.scan_backend(like("mps")) == (
        "chunked",
        "the tensors are on mps; for which there is no kernel",
    )
    errors = {"triton": None, "mamba-ssm": None, "numba": "ModuleNotFoundError: No module named 'numba'"}
    monkeypatch.setattr(scan_kernels, "kernel_error", errors.get)
    backend, why = scan_kernels.scan_backend(inputs["u"])
    assert backend == "chunked" and "No module named 'numba'" in why
    assert torch.equal(selective_scan(**inputs), selective_scan(**inputs, backend="chunked"))
    on_cuda = like("cuda")
    assert scan_kernels.scan_backend(on_cuda)[0] == "mamba-ssm"
    assert scan_kernels.scan_backend(like("cuda", torch.float64))[0] == "chunked"
    errors["mamba-ssm"] = "ModuleNotFoundError: No module named 'selective_scan_cuda'"
    backend, why = scan_kernels.scan_backend(on_cuda)
    assert backend == "triton" and "selective_scan_cuda" in why
    errors["triton"] = "RuntimeError: Failed to find C compiler"
    backend, why = scan_kernels.scan_backend(on_cuda)
    assert backend == "chunked" and "selective_scan_cuda" in why and "C compiler" in why


@pytest.mark.parametrize("backend", ["numba", "triton", "mamba-ssm"])
def test_a_kernel_refuses_float64(backend):
    inputs = {name: x.detach().double() for name, x in scan_inputs(4, 1, 2).items()}
    with pytest.raises(ValueError, match="no float64"):
        selective_scan(**inputs, backend=backend)


def test_a_triton_that_computes_something_else_is_not_taken(monkeypatch):
    triton_gpu = pytest.importorskip("scan_kernels.triton_gpu")
    if DEVICE != "cuda":
        monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    with torch.autocast(DEVICE, torch.bfloat16):  # as in a step of training
        scan_kernels._try_triton()
    right = triton_gpu.scan
    monkeypatch.setattr(triton_gpu, "scan", lambda *inputs: right(*inputs) * 1.001)
    with pytest.raises(RuntimeError, match="computes something else"):
        scan_kernels._try_triton()


@pytest.mark.skipif(DEVICE == "cuda", reason="the trial would pass")
def test_the_kernels_errors_are_lines():
    for backend in ("triton", "mamba-ssm"):
        assert "\n" not in scan_kernels.kernel_error(backend)


def test_bad_arguments_of_the_scan():
    inputs = scan_inputs(4, 2, 3)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        selective_scan(**inputs, backend="cuda")
    wrong = {
        "delta": {"delta": torch.ones(2, 8, 5)},
        "A": {"A": torch.ones(7, 3)},
        "C": {"C": torch.ones(2, 2, 3, 5)},
        "D": {"D": torch.ones(3)},
        "delta_bias": {"delta_bias": torch.ones(8, 1)},
        "B": {"u": torch.ones(2, 4, 2, 4), "delta": torch.ones(2, 4, 2, 4)},  # other groups
    }
    for name, changed in wrong.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            selective_scan(**inputs | changed)
    with pytest.raises(ValueError, match="8 channels cannot be split into the 3 groups"):
        selective_scan(**inputs | {"B": torch.ones(2, 3, 3, 4), "C": torch.ones(2, 3, 3, 4)})
