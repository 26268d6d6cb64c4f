"""The backends of the selective scan, forward and backward: time and peak memory.

    python -m bench.scan                        # all that run here, at two sizes
    python -m bench.scan --sizes 2,384,16,1024 --only numba chunked

"reference" is the recurrence as it stands in rcldm.py; the others are those of scan_kernels/.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

import backbone
from bench.rows import in_own_process, peak_bytes, print_head, print_row, resident
from rcldm import selective_scan
from scan_kernels import BACKENDS, KERNELS, kernel_error


def inputs(size: tuple[int, ...], device: str) -> list[Tensor]:
    """Random u, delta, A, B, C, D for (B, D, N, L), with steps and rates of a VMamba block at its start."""
    batch, channels, states, length = size
    g = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(batch, channels, length, generator=g) for _ in range(2))
    A = -torch.arange(1.0, states + 1).expand(channels, -1).clone()
    B, C = (torch.randn(batch, states, length, generator=g) for _ in range(2))
    values = u, F.softplus(delta - 4), A, B, C, torch.ones(channels)
    return [x.to(device).requires_grad_() for x in values]


def measure(backend: str, size: tuple[int, ...], device: str, repeat: int) -> dict[str, float]:
    """Seconds of the fastest forward and backward, and peak bytes of the first beyond the inputs."""
    values, cuda, seconds = inputs(size, device), device == "cuda", []
    calls = 20 if cuda else 1  # in a row, as in a training step: the GPU need not wait for Python
    small = inputs((1, 64, 4, 64), device)  # what the libraries take at their first use is not the scan's
    torch.autograd.grad(selective_scan(*small, backend=backend).sum(), small)
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    for run in range(repeat + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            y = selective_scan(*values, backend=backend)
            torch.autograd.grad(y.square().sum(), values)
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
        if run == 0:  # afterwards the system's allocator keeps more and more for itself
            peak = peak_bytes(device)
    return {"seconds": min(seconds[1:]), "bytes": peak - before}


@backbone.one_line_errors("bench.scan")
def main() -> None:
    parser = backbone.new_parser("bench.scan", __doc__)
    parser.add_argument("--sizes", nargs="+", default=["2,384,16,1024", "1,768,16,4096"], help="B,D,N,L")
    parser.add_argument("--repeat", type=int, default=10, help="timed runs after one that is not")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--only", nargs="+", choices=BACKENDS[1:], help="these alone")
    args = parser.parse_args()
    device = backbone.pick_device(args.device).type
    kernels = [name for name in KERNELS.get(device, ()) if kernel_error(name) is None]
    names = args.only or [*kernels, "chunked", "reference"]
    ratio = f"× {names[0]}'s"
    print_head(device, "B, D, N, L", "scan", "ms", ratio, "peak MiB", ratio)
    for size in args.sizes:
        first = None
        for name in names:
            row = in_own_process(measure, name, tuple(map(int, size.split(","))), device, args.repeat)
            first = first or row
            times = f"{1e3 * row['seconds']:.1f}", f"{row['seconds'] / first['seconds']:.1f}"
            sizes = f"{row['bytes'] / 2**20:.0f}", f"{row['bytes'] / max(1, first['bytes']):.1f}"
            print_row(size, name, *times, *sizes)


if __name__ == "__main__":
    main()
