"""The selective scan of rcldm.py for a CPU, compiled by Numba: pip installs it, no compiler is needed.

The recurrence, and the letters, are those of rcldm.py:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t

It is written as it reads: a loop over the steps, in it one over the N numbers of state, in it one over the
channels, which becomes vector instructions. No state leaves the cache but one before each T steps. The way
back takes T steps at a time, the last first: it computes their states again, and runs through the same
recurrence the other way, g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}.

A step has a place in u and y, by an order for each group. So the four scans of an image need no copies of
it: all of them read one u, each in its order, and add to one y.

Shapes: u, y (U, B, L, P), where U is G, or 1 for one u that all groups share, and one y that is their sum
        Δ (G, B, L, P) · A (G, N, P) · B, C (G, B, L, N) · D, bias (G, P) · order (G, L), places in u and y
A kernel takes the channels in S parts of W, P = S·W, so that there is work for every core.
"""

import ctypes
import math
from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

T = 32
f32, i32, u64 = np.float32, np.int32, np.uint64
LOG2_E = f32(math.log2(math.e))
SERIES = tuple(f32(math.log(2) ** k / math.factorial(k)) for k in range(8))
# A sum may be taken in any order, but a number may be anything: NaN goes in as NaN and comes out as NaN.
OPTIONS = dict(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})


@njit(**OPTIONS)
def _exp(x):
    """e^x = 2^(whole + rest): the bits of an exponent, and for the rest, at most ½, the Taylor series."""
    x *= LOG2_E
    x = f32(-127) if x < f32(-127) else f32(128) if x > f32(128) else x  # whose bits mean 0 and infinity
    whole = np.rint(x)
    r = x - whole
    a0, a1, a2, a3, a4, a5, a6, a7 = SERIES
    series = a0 + r * (a1 + r * (a2 + r * (a3 + r * (a4 + r * (a5 + r * (a6 + r * a7))))))
    return series * i32((i32(whole) + i32(127)) << i32(23)).view(f32)


@njit(**OPTIONS)
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|, and its slope, the sigmoid.

    log(1 + e) = 2 artanh(e / (2 + e)), by its series, which near 0 loses no digit to the 1.
    """
    e = _exp(-abs(x))
    z = e / (f32(2) + e)  # at most ⅓
    q = z * z
    series = f32(1 / 7) + q * (f32(1 / 9) + q * (f32(1 / 11) + q * f32(1 / 13)))
    series = f32(1) + q * (f32(1 / 3) + q * (f32(1 / 5) + q * series))
    value = (f32(0) if x < f32(0) else x) + f32(2) * z * series
    return value, (e if x < f32(0) else f32(1)) / (f32(1) + e)


@njit(**OPTIONS)
def _forward(first, last, S, u, delta, A, B, C, D, bias, softplus, order, y, entering):
    """Adds to y the scans of tasks first … last - 1; task b·S + s is part s of the channels of sample b."""
    U, _, length, P = u.shape
    N, W = A.shape[1], P // S
    h, step, x = np.empty((N, W), f32), np.empty(W, f32), np.empty(W, f32)
    for task in range(first, last):
        b, part = task // S, slice(task % S * W, task % S * W + W)
        for g in range(len(delta)):
            u_, delta_, y_, entering_ = u[g % U, b], delta[g, b], y[g % U, b], entering[g, b]
            A_, B_, C_, D_, bias_, places = A[g], B[g, b], C[g, b], D[g, part], bias[g, part], order[g]
            h[:] = 0
            for t in range(length):
                if t % T == 0:
                    entering_[t // T, :, part] = h
                place = u64(places[t])  # without a sign, which Numba would ask for at every use
                u_t, delta_t, y_t, B_t, C_t = u_[place, part], delta_[t, part], y_[place, part], B_[t], C_[t]
                for p in range(W):
                    raw = delta_t[p] + bias_[p]
                    step[p] = _softplus(raw)[0] if softplus else raw
                for p in range(W):
                    x[p] = step[p] * u_t[p]
                    y_t[p] += D_[p] * u_t[p]
                for n in range(N):
                    A_n, h_n, B_n, C_n = A_[n, part], h[n], B_t[n], C_t[n]
                    for p in range(W):
                        now = _exp(step[p] * A_n[p]) * h_n[p] + B_n * x[p]
                        h_n[p] = now
                        y_t[p] += C_n * now


@njit(**OPTIONS)
def _backward(
    first, last, S, u, delta, A, B, C, D, bias, softplus, order, dy, entering,
    du, ddelta, dA, dB, dC, dD, dbias,
):  # fmt: skip
    """The gradients by the same tasks' u, Δ, …: writes ddelta, dB and dC, and adds to the others."""
    U, _, length, P = u.shape
    N, W = A.shape[1], P // S
    # Each by itself: parts of one array might overlap, for all that the compiler knows.
    step, slope, x = np.empty((T, W), f32), np.empty((T, W), f32), np.empty((T, W), f32)
    a, h, dy_steps = np.empty((T, W), f32), np.empty((T + 1, W), f32), np.empty((T, W), f32)
    dx, dstep, g_h = np.empty((T, W), f32), np.empty((T, W), f32), np.empty((N, W), f32)
    for task in range(first, last):
        b, s = task // S, task % S
        part = slice(s * W, s * W + W)
        for g in range(len(delta)):
            u_, delta_, dy_, entering_ = u[g % U, b], delta[g, b], dy[g % U, b], entering[g, b]
            A_, B_, C_, D_, bias_, places = A[g], B[g, b], C[g, b], D[g, part], bias[g, part], order[g]
            du_, ddelta_, dB_, dC_ = du[g % U, b], ddelta[g, b], dB[s, g, b], dC[s, g, b]
            dA_, dD_, dbias_ = dA[g, b], dD[g, b, part], dbias[g, b, part]
            g_h[:] = 0  # what the steps after these T say of the last of their states
            for chunk in range((length - 1) // T, -1, -1):
                start, steps = chunk * T, min(T, length - chunk * T)
                for i in range(steps):
                    place = u64(places[start + i])
                    delta_t, u_t = delta_[start + i, part], u_[place, part]
                    step_t, slope_t, x_t = step[i], slope[i], x[i]
                    for p in range(W):
                        raw = delta_t[p] + bias_[p]
                        step_t[p], slope_t[p] = _softplus(raw) if softplus else (raw, f32(1))
                    for p in range(W):
                        x_t[p] = step_t[p] * u_t[p]
                    dy_steps[i] = dy_[place, part]
                dx[:] = 0  # by Δu
                dstep[:] = 0  # by Δ, by way of exp(ΔA)
                for n in range(N):
                    A_n, dA_n, g_n = A_[n, part], dA_[n, part], g_h[n]
                    h[0] = entering_[chunk, n, part]
                    for i in range(steps):
                        B_n = B_[start + i, n]
                        step_t, x_t, a_t, before, h_t = step[i], x[i], a[i], h[i], h[i + 1]
                        for p in range(W):
                            decay = _exp(step_t[p] * A_n[p])
                            a_t[p] = decay
                            h_t[p] = decay * before[p] + B_n * x_t[p]
                    for i in range(steps - 1, -1, -1):
                        B_n, C_n, dB_n, dC_n = B_[start + i, n], C_[start + i, n], f32(0), f32(0)
                        step_t, x_t, a_t, before, h_t = step[i], x[i], a[i], h[i], h[i + 1]
                        dy_t, dx_t, dstep_t = dy_steps[i], dx[i], dstep[i]
                        for p in range(W):
                            now = g_n[p] + C_n * dy_t[p]  # by h_t
                            dB_n += now * x_t[p]
                            dC_n += h_t[p] * dy_t[p]
                            dx_t[p] += B_n * now
                            now *= a_t[p]
                            g_n[p] = now
                            now *= before[p]  # by ΔA
                            dstep_t[p] += now * A_n[p]
                            dA_n[p] += now * step_t[p]
                        dB_[start + i, n], dC_[start + i, n] = dB_n, dC_n
                for i in range(steps):
                    place = u64(places[start + i])
                    u_t, du_t, ddelta_t = u_[place, part], du_[place, part], ddelta_[start + i, part]
                    step_t, slope_t, dy_t, dx_t, dstep_t = step[i], slope[i], dy_steps[i], dx[i], dstep[i]
                    for p in range(W):
                        now = (dstep_t[p] + dx_t[p] * u_t[p]) * slope_t[p]
                        ddelta_t[p] = now
                        dbias_[p] += now
                    for p in range(W):
                        du_t[p] += dx_t[p] * step_t[p] + D_[p] * dy_t[p]
                        dD_[p] += dy_t[p] * u_t[p]


CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# GNU's way into a parallel region, which LLVM's OpenMP has as well: in whichever PyTorch is linked with.
OPENMP = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)


def _in_parallel(kernel: Callable[..., None], tasks: int, *values: Tensor | bool) -> None:
    """kernel(first, last, *values) for all tasks, by as many threads as PyTorch takes.

    They are PyTorch's own. Between two operations these wait in a loop, for some milliseconds, and threads
    beside them would get half a core each. Where they are not OpenMP's, one thread does it all.
    """
    arrays = [x.numpy() if isinstance(x, Tensor) else x for x in values]
    threads = min(tasks, torch.get_num_threads()) if OPENMP else 1
    if threads == 1:
        return kernel(0, tasks, *arrays)
    cuts = [tasks * i // threads for i in range(threads + 1)]
    todo, done, errors = iter(range(threads)), [], []  # the threads share it, and each takes what is next

    def work(_) -> None:
        try:
            for i in todo:
                kernel(cuts[i], cuts[i + 1], *arrays)
                done.append(i)
        except BaseException as error:
            errors.append(error)

    OPENMP(CALLBACK(work), None, threads, 0)
    if len(done) < threads:  # an error outside of the try, which C has lost, is Ctrl-C's
        raise (errors or [KeyboardInterrupt()])[0]


def _parts(batch: int, channels: int) -> int:
    """S, parts of the channels: the fewest that keep threads busy to an eighth, of 16 channels or more."""
    threads = torch.get_num_threads()
    even = [parts for parts in range(1, max(1, channels // 16) + 1) if channels % parts == 0]
    load = {parts: math.ceil(batch * parts / threads) / parts for parts in even}  # of the busiest thread
    return next((s for s in even if load[s] <= 1.125 * batch / threads), min(even, key=load.get))


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, softplus: bool,
    order: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y, as u. u, Δ (B, G, P, L); A (G·P, N), B and C (B, G, N, L), D and bias (G·P,).

    order (G, L): where along L a group reads u, and writes y, at each step; else one after the other. With
    it, u (B, 1, P, L) may be all groups' u; y, of its shape, is then their sum.
    """
    groups, length = B.shape[1], u.shape[3]
    if order is None:
        order = torch.arange(length).expand(groups, -1)
    dtype = u.dtype
    u, delta, B, C = (x.permute(1, 0, 3, 2).float() for x in (u, delta, B, C))  # (·, B, L, ·)
    A, D, bias = (w.float().unflatten(0, (groups, -1)) for w in (A, D, bias))
    inputs = u, delta, A.mT, B, C, D, bias
    y = NumbaScan.apply(*(x.contiguous() for x in inputs), softplus, order.contiguous())
    return y.permute(1, 0, 3, 2).to(dtype)


class NumbaScan(torch.autograd.Function):
    """The shapes at the head of this file, without gaps in memory."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias, softplus: bool, order: Tensor) -> Tensor:
        y = torch.zeros_like(u)
        batch, length, channels = u.shape[1:]
        ctx.softplus, ctx.parts = softplus, _parts(batch, channels)
        entering = u.new_empty(len(delta), batch, math.ceil(length / T), *A.shape[1:])
        inputs = u, delta, A, B, C, D, bias
        _in_parallel(_forward, batch * ctx.parts, ctx.parts, *inputs, softplus, order, y, entering)
        ctx.save_for_backward(*inputs, order, entering)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, order, entering = ctx.saved_tensors
        u, delta, A, B, C, D, bias = inputs
        batch, parts = u.shape[1], ctx.parts
        du, ddelta = torch.zeros_like(u), torch.empty_like(delta)
        dA, dD, dbias = (x.new_zeros(len(x), batch, *x.shape[1:]) for x in (A, D, bias))
        dB, dC = (x.new_empty(parts, *x.shape) for x in (B, C))
        given = *inputs, ctx.softplus, order, dy.contiguous(), entering
        _in_parallel(_backward, batch * parts, parts, *given, du, ddelta, dA, dB, dC, dD, dbias)
        return du, ddelta, dA.sum(1), dB.sum(0), dC.sum(0), dD.sum(1), dbias.sum(1), None, None
