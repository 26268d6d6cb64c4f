"""The selective scan against its peers, forward and backward: time and peak memory.

    python -m bench.scan                        # on the CPU, or on CUDA where it is: then the kernels too
    python -m bench.scan --sizes 2,384,16,1024 --repeat 20

Each runs in a process of its own. The peers are in PyTorch, written here from their descriptions:
    indexed     mamba-ssm's reference: all (B, D, L, N) at once, then a loop that indexes into it
    unbound     the same recurrence over unbound slices: rcldm.py's backend "reference"
    parallel    a work-efficient parallel scan (Blelloch, 1990) over (B, D, L, N), as mamba.py has it
    chunked     ours, in PyTorch alone (scan_kernels/chunked.py)
    numba       ours for a CPU (scan_kernels/numba_cpu.py)
    triton      ours for a GPU (scan_kernels/triton_gpu.py)
    mamba-ssm   the CUDA kernel, where it is installed
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import backbone
from rcldm import selective_scan
from scan_kernels import KERNELS, kernel_error


def indexed(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """u, delta (B, D, L); A (D, N); B, C (B, N, L); D (D,)."""
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    inflow = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h, ys = A.new_zeros(len(u), *A.shape), []
    for t in range(u.shape[-1]):
        h = decay[:, :, t] * h + inflow[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return torch.stack(ys, -1) + D[:, None] * u


def sweep_(a: Tensor, x: Tensor) -> None:
    """x_t ← h_t with h_t = a_t h_(t-1) + x_t, in place along axis 2, whose length is a power of two.

    Up: each node takes in its left neighbour, at strides 2, 4, …; then down: the others do. Spoils a.
    """
    length = a.shape[2]
    strides = [2**k for k in range(1, length.bit_length())]
    for stride in strides:
        left, right = slice(stride // 2 - 1, None, stride), slice(stride - 1, None, stride)
        x[:, :, right] += a[:, :, right] * x[:, :, left]
        a[:, :, right] *= a[:, :, left]
    for stride in reversed(strides[:-1]):
        left, right = slice(stride - 1, -stride // 2, stride), slice(stride + stride // 2 - 1, None, stride)
        x[:, :, right] += a[:, :, right] * x[:, :, left]
        a[:, :, right] *= a[:, :, left]


class ParallelScan(torch.autograd.Function):
    """h_t = a_t h_(t-1) + x_t along axis 2 of (B, D, L, N)."""

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor) -> Tensor:
        h = x.clone()
        sweep_(a.clone(), h)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        g, later = dh.flip(2), F.pad(a[:, :, 1:], (0, 0, 0, 1)).flip(2)  # g_t = dh_t + a_(t+1) g_(t+1)
        sweep_(later, g)
        g = g.flip(2)
        return g * F.pad(h[:, :, :-1], (0, 0, 1, 0)), g


def parallel(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    decay = torch.exp(delta[..., None] * A[:, None])  # (B, D, L, N)
    inflow = (delta * u)[..., None] * B.mT[:, None]
    h = ParallelScan.apply(decay, inflow)
    return torch.einsum("bdln,bnl->bdl", h, C) + D[:, None] * u


def _ours(backend: str):
    return lambda u, delta, A, B, C, D: selective_scan(
        u, delta, A, B[:, None], C[:, None], D, backend=backend
    )


SCANS = {
    "indexed": indexed,
    "unbound": _ours("reference"),
    "parallel": parallel,
    "chunked": _ours("chunked"),
    "numba": _ours("numba"),
    "triton": _ours("triton"),
    "mamba-ssm": _ours("mamba-ssm"),
}


def inputs(size: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Random u, delta, A, B, C, D for (B, D, N, L), with steps and rates of a VMamba block at its start."""
    batch, channels, states, length = size
    g = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(batch, channels, length, generator=g) for _ in range(2))
    A = -torch.arange(1.0, states + 1).expand(channels, -1).clone()
    B, C = (torch.randn(batch, states, length, generator=g) for _ in range(2))
    values = u, F.softplus(delta - 4), A, B, C, torch.ones(channels)
    return [x.to(device).requires_grad_() for x in values]


def resident(name: str) -> int:
    """This process's memory in bytes: now (VmRSS) or at its most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def apart(measure: Callable[..., dict], *inputs: Any, limit: float | None = None) -> dict[str, Any]:
    """`measure(*inputs)` in a process of its own, whose peak memory is its alone. Raises TimeoutError after
    `limit` seconds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, *inputs).result(limit)
        except TimeoutError:
            for process in pool._processes.values():
                process.kill()
            raise


def measure(name: str, size: tuple[int, ...], device: torch.device, repeat: int) -> dict[str, float]:
    """Seconds of the fastest forward and backward, peak bytes of the first beyond the inputs, and sums
    to compare by."""
    values, cuda, seconds = inputs(size, device), device.type == "cuda", []
    calls = 20 if cuda and repeat else 1  # in a row, as in a training step: the GPU need not wait for Python
    small = inputs((1, 64, 4, 64), device)  # what the libraries take at their first use is not the scan's
    torch.autograd.grad(SCANS[name](*small).square().sum(), small)
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    for run in range(repeat + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            y = SCANS[name](*values)
            gradients = torch.autograd.grad(y.square().sum(), values)
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
        if run == 0:  # afterwards the system's allocator keeps more and more for itself
            peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    check = [x.detach().double().norm().item() for x in (y, *gradients)]
    return {"seconds": min(seconds[1:] or seconds), "bytes": peak - before, "check": check}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scan", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["2,384,16,1024", "1,768,16,4096"], help="B,D,N,L")
    parser.add_argument(
        "--repeat", type=int, default=10, help="timed runs after one that is not; the fastest counts"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--only", nargs="+", choices=SCANS, help="these alone")
    args = parser.parse_args()
    device = backbone.pick_device(args.device)
    cuda, here = device.type == "cuda", KERNELS.get(device.type, ())
    kernels = {name for names in KERNELS.values() for name in names}
    names = args.only or [n for n in SCANS if n not in kernels or (n in here and kernel_error(n) is None)]
    ours = next((name for name in ("triton", "numba", "chunked") if name in names), names[0])
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| B, D, N, L | scan | ms | × {ours}'s | peak MiB | × {ours}'s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for size in args.sizes:
        rows: dict[str, dict[str, float]] = {}
        for name in names:
            repeat = 0 if name == "indexed" else args.repeat  # it takes minutes: once, and not warmed up
            rows[name] = apart(measure, name, tuple(map(int, size.split(","))), device, repeat)
        best = rows[ours]
        for name, row in rows.items():
            for mine, theirs in zip(best["check"], row["check"]):
                assert abs(mine - theirs) <= 1e-3 * abs(mine), f"{name} computes something else"
            milliseconds, ratio = 1e3 * row["seconds"], row["seconds"] / best["seconds"]
            numbers = (
                [f"{milliseconds:.3f}", f"{ratio:.2f}"] if cuda else [f"{milliseconds:.1f}", f"{ratio:.1f}"]
            )
            numbers += [f"{row['bytes'] / 2**20:.0f}", f"{row['bytes'] / max(1, best['bytes']):.1f}"]
            print(f"| {size.replace(',', ', ')} | {name} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
