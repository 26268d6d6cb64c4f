"""The selective scan of rcldm.py for a GPU, in Triton, which comes with PyTorch: nothing to install.

The recurrence, and the letters, are those of rcldm.py:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t

One program takes P channels through all of time, T steps at once. A step is a map h → a h + x, and two in a
row are another: so an associative scan (Blelloch, 1990) has all T states at once, which stay in registers.
Memory sees u, Δ, B, C and y, and for the way back the one state that enters each T steps. So does mamba-ssm's
kernel, which wants the length innermost in memory; this one takes any order, as SS2D's of channels innermost.

The gradient by h_t runs through the same recurrence the other way, g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1},
and the states are computed again beside it.

`TRITON_INTERPRET=1` runs it on a CPU, slowly, as the tests do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, softplus: bool
) -> Tensor:
    """y, as u. u, Δ (B, G, P, L); A (G·P, N), B and C (B, G, N, L), D and bias (G·P,), float32.

    Δ has no axis of N states: autograd may as well do the bias's part and the softplus's.
    """
    delta = delta.to(bias.dtype) + bias.view(*delta.shape[1:3], 1)
    return TritonScan.apply(u, F.softplus(delta) if softplus else delta, A, B, C, D)


@triton.jit
def _then(a, x, b, y):
    """h → a h + x, then h → b h + y."""
    return a * b, b * x + y


@triton.jit
def _channels(pointer, t, p, length, channels, stride_t, stride_p):
    """(T, P) of u, Δ or dy; zero outside. A step with Δ = 0 leaves the state as it is."""
    inside = (t >= 0)[:, None] & (t < length)[:, None] & (p < channels)[None]
    return tl.load(pointer + t[:, None] * stride_t + p[None] * stride_p, inside, other=0).to(tl.float32)


@triton.jit
def _weights(pointer, t, n, length, states):
    """(T, 1, N) of B or C; zero outside."""
    inside = (t >= 0)[:, None] & (t < length)[:, None] & (n < states)[None]
    return tl.load(pointer + n[None] * length + t[:, None], inside, other=0)[:, None]


@triton.jit
def _forward(
    u, delta, A, B, C, D, y, entering,
    length, channels, groups, states, stride_b, stride_g, stride_p, stride_t,
    T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)  # b·G + g
    group, chunks = row % groups, tl.cdiv(length, T)
    p, n, step = tl.program_id(0) * P + tl.arange(0, P), tl.arange(0, N), tl.arange(0, T)
    here = row // groups * stride_b + group * stride_g
    states_at = p[:, None] * states + n[None]
    is_state = (p < channels)[:, None] & (n < states)[None]
    A_ = tl.load(A + group * channels * states + states_at, is_state, other=0)[None]  # (1, P, N)
    D_ = tl.load(D + group * channels + p, p < channels, other=0)[None]
    B += row * states * length
    C += row * states * length
    h = tl.zeros((P, N), tl.float32)
    for chunk in range(chunks):
        t = chunk * T + step
        tl.store(entering + (row * chunks + chunk) * channels * states + states_at, h, is_state)
        u_t = _channels(u + here, t, p, length, channels, stride_t, stride_p)
        delta_t = _channels(delta + here, t, p, length, channels, stride_t, stride_p)
        a = tl.exp(delta_t[:, :, None] * A_)  # (T, P, N)
        x = (delta_t * u_t)[:, :, None] * _weights(B, t, n, length, states)
        decay, hs = tl.associative_scan((a, x), 0, _then)
        hs += decay * h[None]
        y_t = tl.sum(hs * _weights(C, t, n, length, states), 2) + D_ * u_t
        inside = (t < length)[:, None] & (p < channels)[None]
        tl.store(y + here + t[:, None] * stride_t + p[None] * stride_p, y_t, inside)
        h = tl.sum(tl.where((step == T - 1)[:, None, None], hs, 0.0), 0)


@triton.jit
def _backward(
    u, delta, A, B, C, D, dy, entering, du, ddelta, dA, dB, dC, dD,
    length, channels, groups, states, stride_b, stride_g, stride_p, stride_t,
    T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    group, chunks = row % groups, tl.cdiv(length, T)
    p, n, step = tl.program_id(0) * P + tl.arange(0, P), tl.arange(0, N), tl.arange(0, T)
    here = row // groups * stride_b + group * stride_g
    states_at = p[:, None] * states + n[None]
    is_state = (p < channels)[:, None] & (n < states)[None]
    A_ = tl.load(A + group * channels * states + states_at, is_state, other=0)[None]
    D_ = tl.load(D + group * channels + p, p < channels, other=0)[None]
    B += row * states * length
    C += row * states * length
    dB += row * states * length
    dC += row * states * length
    dA_, dD_ = tl.zeros((P, N), tl.float32), tl.zeros((P,), tl.float32)
    g = tl.zeros((P, N), tl.float32)  # what the steps after this chunk say of its last state
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * T + step
        u_t = _channels(u + here, t, p, length, channels, stride_t, stride_p)
        delta_t = _channels(delta + here, t, p, length, channels, stride_t, stride_p)
        dy_t = _channels(dy + here, t, p, length, channels, stride_t, stride_p)
        B_t, C_t = _weights(B, t, n, length, states), _weights(C, t, n, length, states)

        # h_{t-1}, the state before each step: of the steps one earlier, the first of them no step at all.
        earlier = tl.where(step == 0, -1, t - 1)
        u_e = _channels(u + here, earlier, p, length, channels, stride_t, stride_p)
        delta_e = _channels(delta + here, earlier, p, length, channels, stride_t, stride_p)
        x_e = (delta_e * u_e)[:, :, None] * _weights(B, earlier, n, length, states)
        decay, hs = tl.associative_scan((tl.exp(delta_e[:, :, None] * A_), x_e), 0, _then)
        h = tl.load(entering + (row * chunks + chunk) * channels * states + states_at, is_state, other=0)
        kept = tl.exp(delta_t[:, :, None] * A_) * (hs + decay * h[None])  # exp(Δ_t A) h_{t-1}

        delta_l = _channels(delta + here, t + 1, p, length, channels, stride_t, stride_p)
        a_l = tl.exp(delta_l[:, :, None] * A_)
        decay, gs = tl.associative_scan((a_l, C_t * dy_t[:, :, None]), 0, _then, reverse=True)
        gs += decay * g[None]
        g = tl.sum(tl.where((step == 0)[:, None, None], gs, 0.0), 0)

        x = delta_t * u_t
        dx = tl.sum(gs * B_t, 2)
        dlog_a = gs * kept
        dA_ += tl.sum(dlog_a * delta_t[:, :, None], 0)
        dD_ += tl.sum(dy_t * u_t, 0)
        at = here + t[:, None] * stride_t + p[None] * stride_p
        inside = (t < length)[:, None] & (p < channels)[None]
        tl.store(du + at, dx * delta_t + D_ * dy_t, inside)
        tl.store(ddelta + at, tl.sum(dlog_a * A_, 2) + dx * u_t, inside)
        # All channels of the group share B and C: programs add to the same places.
        at, inside = n[None] * length + t[:, None], (t < length)[:, None] & (n < states)[None]
        tl.atomic_add(dB + at, tl.sum(gs * x[:, :, None], 1), inside)
        tl.atomic_add(dC + at, tl.sum((kept + x[:, :, None] * B_t) * dy_t[:, :, None], 1), inside)
    tl.store(dA + row * channels * states + states_at, dA_, is_state)
    tl.store(dD + row * channels + p, dD_, p < channels)


class TritonScan(torch.autograd.Function):
    """u (B, G, P, L); Δ likewise, float32; A (G·P, N), B and C (B, G, N, L), D (G·P,), float32 → y, as u.

    The gradients by B and C are sums that programs make together, in no fixed order: their last bits vary.
    """

    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        u = u if torch.empty_like(u).stride() == u.stride() else u.contiguous()  # no gaps, no overlaps
        delta = _laid_out_as(u, delta)
        A, B, C, D = (w.contiguous() for w in (A, B, C, D))
        y, (grid, sizes, tile) = torch.empty_like(u), _launch(u, A)
        chunks = triton.cdiv(u.shape[3], tile["T"])
        entering = A.new_empty(*u.shape[:2], chunks, u.shape[2], A.shape[1])
        with torch.cuda.device_of(u):
            _forward[grid](u, delta, A, B, C, D, y, entering, *sizes, **tile)
        ctx.save_for_backward(u, delta, A, B, C, D, entering)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, D, entering = ctx.saved_tensors
        dy, (grid, sizes, tile) = _laid_out_as(u, dy), _launch(u, A)
        du, ddelta = torch.empty_like(u), torch.empty_like(delta)
        dB, dC = torch.zeros_like(B), torch.zeros_like(C)
        dA, dD = A.new_empty(len(u), *A.shape), D.new_empty(len(u), *D.shape)
        gradients = du, ddelta, dA, dB, dC, dD
        with torch.cuda.device_of(u):
            _backward[grid](u, delta, A, B, C, D, dy, entering, *gradients, *sizes, **tile)
        return du, ddelta, dA.sum(0), dB, dC, dD.sum(0)


def _laid_out_as(u: Tensor, x: Tensor) -> Tensor:
    """x itself if it lies in memory as u does, or a copy that does."""
    return x if x.stride() == u.stride() else torch.empty_like(u, dtype=x.dtype).copy_(x)


def _launch(u: Tensor, A: Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """The grid of programs, their sizes and strides, and the tile of T·P·N states that each has at once."""
    batch, groups, channels, length = u.shape
    states = A.shape[1]
    N = triton.next_power_of_2(states)
    P = max(1, min(8, 32 // N, triton.next_power_of_2(channels)))
    T = 256 if N == 1 else 32  # of the tiles tried on an H100, among the fastest
    sizes = length, channels, groups, states, *u.stride()
    return (triton.cdiv(channels, P), batch * groups), sizes, {"T": T, "P": P, "N": N}
