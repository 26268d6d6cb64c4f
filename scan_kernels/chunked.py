"""The selective scan of rcldm.py in PyTorch alone: anywhere, and in little memory.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t

Shapes: B batch · G groups of P channels that share one B and C · N numbers of state · L length of the scan
        T steps held in memory at once
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, softplus: bool
) -> Tensor:
    """y, as u. u, Δ (B, G, P, L); A (G·P, N), B and C (B, G, N, L), D and bias (G·P,), float32 or float64."""
    return ChunkedScan.apply(_channels_innermost(u), _channels_innermost(delta), A, B, C, D, bias, softplus)


def _channels_innermost(x: Tensor) -> Tensor:
    """x (B, G, P, L), in memory as SS2D has it: otherwise every step of the channels is far apart."""
    return x if x.stride(2) == 1 else x.mT.contiguous().mT


class ChunkedScan(torch.autograd.Function):
    """The same recurrence, T steps at a time. u, Δ (B, G, P, L).

    All states together would be (L, B, D, N), N times the input and more than anything else in the network.
    Only T of them exist at any moment, T being ½√L or more: the forward pass keeps the state that enters
    each chunk of T steps, and the backward pass, going from the last chunk to the first, computes a chunk's
    states again. Inside a chunk everything but the recurrence itself is one operation over all T steps.
    Nothing is divided by a decay and no exponents add up, so it is as exact and stable as the recurrence,
    at any length and decay.

    Buffers are (T, B, G, N, P): a step is one contiguous block, and B_t, C_t broadcast along P.
    """

    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor,
                softplus: bool) -> Tensor:  # fmt: skip
        y = torch.empty_like(u)  # in memory as u is
        u_, delta_, y_, A_, B_, C_, D_, bias_ = _time_first(u, delta, y, A, B, C, D, bias)
        h = A.new_zeros(len(u), *A_.shape)  # (B, G, N, P)
        entering = []
        steps = _steps_at_once(u, A)
        space = A.new_empty(3, steps + 1, *h.shape)
        for t in range(0, len(u_), steps):
            now = slice(t, t + steps)
            entering.append(h)
            u_t, delta_t = u_[now].to(A.dtype), delta_[now] + bias_
            delta_t = F.softplus(delta_t) if softplus else delta_t
            _, _, hs, free = _states(h, u_t, delta_t, A_, B_[now], space)
            y_[now] = _sum_states(C_[now], hs[1:], free).addcmul_(D_, u_t)
            h = hs[-1].clone()
        ctx.softplus = softplus
        ctx.save_for_backward(u, delta, A, B, C, D, bias, torch.stack(entering))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by h_t runs through the same recurrence: g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}."""
        u, delta, A, B, C, D, bias, entering = ctx.saved_tensors
        dy = _channels_innermost(dy)
        du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
        u_, delta_, dy_, A_, B_, C_, D_, bias_ = _time_first(u, delta, dy, A, B, C, D, bias)
        du_, ddelta_, _, _, dB_, dC_, _, _ = _time_first(du, ddelta, dy, A, dB, dC, D, bias)
        dA_, dD_, dbias_ = (torch.zeros_like(x) for x in (A_, D_, bias_))
        g = torch.zeros_like(entering[0])  # what the steps after this chunk say of its last state
        steps = _steps_at_once(u, A)
        space = A.new_empty(3, steps + 1, *g.shape)
        for i in reversed(range(len(entering))):
            now = slice(i * steps, (i + 1) * steps)
            u_t, dy_t = u_[now].to(A.dtype), dy_[now].to(A.dtype)
            raw, B_t, C_t = delta_[now] + bias_, B_[now], C_[now]
            delta_t = F.softplus(raw) if ctx.softplus else raw
            a, x, hs, gs = _states(entering[i], u_t, delta_t, A_, B_t, space)  # gs is only room as yet
            dC_[now] = torch.mul(hs[1:], dy_t, out=gs).sum(-1, keepdim=True)
            torch.mul(C_t, dy_t, out=gs)
            gs[-1] += g
            _recur_(a[1:], gs[:-1], gs[-1], reverse=True)
            g = a[0] * gs[0]

            dlog_a, free = a.mul_(gs).mul_(hs[:-1]), hs[1:]  # by ΔA
            dB_[now] = torch.mul(gs, x, out=free).sum(-1, keepdim=True)
            dD_ += (dy_t * u_t).sum((0, 1))
            dx = _sum_states(B_t, gs, free)  # by Δu
            du_[now] = torch.addcmul(dx * delta_t, D_, dy_t)
            draw = _sum_states(A_, dlog_a, free).addcmul_(dx, u_t)  # by Δ
            if ctx.softplus:
                draw *= raw.sigmoid_()
            ddelta_[now] = draw
            dbias_ += draw.sum((0, 1))
            dA_ += dlog_a.mul_(delta_t).sum((0, 1))
        return du, ddelta, dA_.mT.reshape(A.shape), dB, dC, dD_.flatten(), dbias_.flatten(), None


def _steps_at_once(u: Tensor, A: Tensor) -> int:
    """T: ½√L, where the chunks' states and the states between chunks take the least memory, or more while
    those of a chunk, and what else it needs, fit into the cache (CPU) or it takes them to fill a GPU.
    """
    states = (2**19 if u.device.type == "cpu" else 2**24) // (len(u) * len(A) * max(4, A.shape[1]))
    return min(u.shape[-1], max(math.isqrt(u.shape[-1] - 1) // 2 + 1, states))


def _time_first(u, delta, y, A, B, C, D, bias) -> tuple[Tensor, ...]:
    """Views that broadcast to (L, B, G, N, P).

    u, Δ, y (L, B, G, 1, P); A (G, N, P); B, C (L, B, G, N, 1); D, bias (G, 1, P).
    """
    u, delta, y = (x.permute(3, 0, 1, 2).unsqueeze(3) for x in (u, delta, y))
    groups, channels = u.shape[2], u.shape[4]
    A = A.view(groups, channels, -1).mT.contiguous()
    B, C = (w.permute(3, 0, 1, 2).unsqueeze(4) for w in (B, C))
    return u, delta, y, A, B, C, D.view(groups, 1, channels), bias.view(groups, 1, channels)


def _states(h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, space: Tensor) -> tuple[Tensor, ...]:
    """T steps from the state h (B, G, N, P).

    Returns exp(Δ_t A) (T, B, G, N, P), Δ_t u_t (T, B, G, 1, P), the states h, h_1, …, h_T (T+1, B, G, N, P),
    and room for as much as the first. All but the second lie in `space`, which is used again for each chunk:
    to be given new pages for every operation takes longer than most of them.
    """
    a, hs, free = space[0, : len(u)], space[1, : len(u) + 1], space[2, : len(u)]
    torch.mul(delta, A / math.log(2), out=a).exp2_()  # a CPU takes 2^x in a third of the time of e^x
    x = delta * u
    torch.mul(x, B, out=hs[1:])
    hs[0] = h
    _recur_(a, hs[1:], h)
    return a, x, hs, free


def _recur_(a: Tensor, b: Tensor, h: Tensor, reverse: bool = False) -> None:
    """b_t ← h_t with h_t = a_t h_{t-1} + b_t, in place along the first axis; from its end with `reverse`."""
    steps = list(zip(a.unbind(0), b.unbind(0)))
    for a_t, b_t in reversed(steps) if reverse else steps:
        h = b_t.addcmul_(a_t, h)


def _sum_states(w: Tensor, x: Tensor, free: Tensor) -> Tensor:
    """Σ_n w x: (…, N, 1 or P), (…, N, P) → (…, 1, P). free: memory of x's shape, which is overwritten."""
    return w * x if x.shape[-2] == 1 else torch.mul(w, x, out=free).sum(-2, keepdim=True)
