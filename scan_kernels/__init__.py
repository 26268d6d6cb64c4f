"""The recurrence of rcldm.py, fast, and the choice among the ways to run it.

    chunked.py       in PyTorch alone: anywhere, in little memory
    numba_cpu.py     compiled by Numba, for a CPU: its default
    triton_gpu.py    in Triton, for a GPU: its default where mamba-ssm is not installed
    mamba-ssm        the CUDA extension of Mamba's authors (requirements-cuda.txt), called from here

All compute what `rcldm.selective_scan` specifies by its backend "reference". `fast_scan` is that function by
any other backend, `scan_image` the sum of four scans over one image, and `scan_backend` says which backend
"auto" takes here, and why. Tensors come in and tensors go out: nothing of the project is imported.
(Not `kernels`: transformers takes a package of that name for Hugging Face's own, and imports from it.)

Shapes: B batch · D channels · L length · N numbers of state per channel
        G groups of P = D/G channels, which share one B and C
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

MODULES = {"chunked": "chunked", "numba": "numba_cpu", "triton": "triton_gpu"}
BACKENDS = ("auto", "reference", *MODULES, "mamba-ssm")
KERNELS = {"cpu": ("numba",), "cuda": ("mamba-ssm", "triton")}  # the first that runs is the best


@torch.compiler.disable  # it would unroll the loops over time, and compile for many minutes
def fast_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`rcldm.selective_scan` by any backend but "reference", with the same arguments, shapes and result.

    "numba" takes tensors on the CPU, "triton" and "mamba-ssm" on CUDA, and what they need stands in
    requirements.txt and requirements-cuda.txt. None can be differentiated twice.

    Raises:
        ValueError: an unknown backend, shapes that do not fit, or float64 for a kernel.
    """
    if backend not in BACKENDS or backend == "reference":
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    B, C = (w.unsqueeze(1) if w.dim() == 3 else w for w in (B, C))
    shape = u.shape
    if u.dim() == 3 and u.shape[1] % B.shape[1]:
        raise ValueError(f"{u.shape[1]} channels cannot be split into the {B.shape[1]} groups of B")
    u, delta = (x.unflatten(1, (B.shape[1], -1)) if x.dim() == 3 else x for x in (u, delta))  # (B, G, P, L)
    _check_shapes(u, delta, A, B, C, D, delta_bias)
    if backend == "auto":
        backend, _ = scan_backend(u)
    elif backend != "chunked" and u.dtype == torch.float64:
        raise ValueError(f'backend "{backend}" has no float64; "chunked" has')
    if backend == "mamba-ssm":
        return _scan_mamba_ssm(u, delta, A, B, C, D, delta_bias, delta_softplus).view(shape)

    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    A, B, C = A.to(wide), B.to(wide), C.to(wide)
    D, delta_bias = (A.new_zeros(len(A)) if x is None else x.to(wide) for x in (D, delta_bias))
    return _module(backend).scan(u, delta, A, B, C, D, delta_bias, delta_softplus).reshape(shape)


def scans_images_in_place(image: Tensor) -> bool:
    """Whether `scan_image` runs for an image like this one: Numba's kernel alone reads in any order."""
    return scan_backend(image)[0] == "numba"


@torch.compiler.disable
def scan_image(image: Tensor, cross_scan: Callable, *rest: Tensor, delta_softplus: bool = False) -> Tensor:
    """One scan over the image in each order, summed at each pixel, without a copy of the image for any.

    image (B, P, H, W). cross_scan: images (B, P, H, W) → sequences (B, G, P, L), here of the pixels' numbers.
    rest: Δ (B, G, P, L), A, B, C, D and Δ's bias as `fast_scan` takes them, in the order of the steps.
    Returns the image's shape and dtype.
    """
    pixels = torch.arange(image[0, 0].numel(), device=image.device).view(1, 1, *image.shape[2:])
    orders = cross_scan(pixels)[0, :, 0]  # (G, L) int64, the pixel at each step
    u = image.flatten(2).unsqueeze(1)  # (B, 1, P, L)
    return _module("numba").scan(u, *rest, delta_softplus, orders).view_as(image)


def scan_backend(u: Tensor) -> tuple[str, str]:
    """The backend that "auto" takes for an input like `u`, and why, in words."""
    here, errors = f"the tensors are on {u.device.type}", []
    if u.dtype == torch.float64:
        return "chunked", "the kernels have no float64"
    for backend in KERNELS.get(u.device.type, ()):
        if (error := kernel_error(backend)) is None:
            return backend, "; ".join([f"{here} and {backend}'s kernel can be used", *errors])
        errors.append(f"{backend}'s does not ({error})")
    return "chunked", "; ".join([here, *(errors or ["for which there is no kernel"])])


@torch.compiler.disable
@lru_cache
def kernel_error(backend: str) -> str | None:
    """Why the kernel of a backend in `KERNELS` cannot be used here, in one line; None where it can."""
    try:
        if backend == "numba":
            _module(backend)
        elif backend == "triton":  # needs a C compiler at its first launch: only a trial can tell
            with torch.inference_mode(False), torch.enable_grad():
                _try_triton()
        else:
            # The extension itself comes first: newer mamba-ssm imports well without it.
            import selective_scan_cuda  # noqa: F401
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except Exception as error:  # an extension built for another torch fails with more than ImportError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if backend != "mamba-ssm":  # which is optional
            warnings.warn(
                f"the scan's {backend} kernel cannot be used, which is slow ({reason})", stacklevel=2
            )
        return reason
    return None


def _module(backend: str) -> ModuleType:
    """The module whose `scan` a backend is. Numba and Triton are imported where they are wanted alone."""
    return import_module(f"scan_kernels.{MODULES[backend]}")


def _scan_mamba_ssm(u, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor:
    """mamba-ssm's CUDA kernel: one dtype for u, Δ, B and C, float32 for the rest, length innermost."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta = (x.flatten(1, 2) for x in (u, delta))  # (B, D, L)
    u, delta, B, C = (x.to(u.dtype).contiguous() for x in (u, delta, B, C))
    A, D, delta_bias = (None if x is None else x.float().contiguous() for x in (A, D, delta_bias))
    return selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def _try_triton() -> None:
    """A small scan and its gradients, for each number of states that an RCLDM has by default; raises a
    RuntimeError where they are not those of "chunked"."""
    for states in (1, 4):
        g = torch.Generator().manual_seed(0)
        sizes = (1, 2, 8, 300), (1, 2, 8, 300), (16, states), (1, 2, states, 300), (1, 2, states, 300), (16,)
        inputs = [torch.rand(size, generator=g).cuda() for size in sizes]
        inputs[2].neg_()
        inputs = [x.requires_grad_() for x in (*inputs, torch.rand(16, generator=g).cuda())]
        results = []
        for backend in ("triton", "chunked"):
            y = _module(backend).scan(*inputs, True)
            results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        for ours, expected in zip(*results):
            if not (ours - expected).norm() <= 1e-4 * expected.norm():
                raise RuntimeError("it computes something else than it should")


def _check_shapes(u, delta, A, B, C, D, delta_bias) -> None:
    """Raises ValueError, since a compiled kernel would read beyond its arrays."""
    batch, groups, channels, length = u.shape
    channels, states = groups * channels, A.shape[-1]
    wanted = {"delta": (delta, u.shape), "A": (A, (channels, states))}
    wanted |= {name: (x, (batch, groups, states, length)) for name, x in (("B", B), ("C", C))}
    wanted |= {name: (x, (channels,)) for name, x in (("D", D), ("delta_bias", delta_bias))}
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"for u {(*u.shape,)}, {name} must be {(*shape,)}, got {(*x.shape,)}")
