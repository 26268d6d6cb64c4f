"""g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}: the gradient through y_t, plus the decayed gradient through all
later steps. It is the forward recurrence with time reversed, and forgets as fast.

It needs the inputs, which are there anyway, and h_{t-1} and h_t at every step. Those can be computed again:
keep the state at the start of every piece of √L steps, and run a piece forward once more before it is run
backward. That is one more forward pass, for 2√L states in memory, not L. scan_kernels/chunked.py
holds three arrays as large as a piece's states, so its pieces are shorter: ½√L steps, or more where the cache
or a GPU has room."""

import torch
from torch import Tensor


def scan_backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    length = u.shape[-1]
    a = torch.exp(delta[:, :, None] * A[:, :, None])  # (B, D, N, L)
    x = delta * u  # (B, D, L)
    hs = [torch.zeros_like(a[..., 0])]  # h_{t-1} is hs[t], h_t is hs[t + 1]
    for t in range(length):
        hs.append(a[..., t] * hs[-1] + x[:, :, None, t] * B[:, None, :, t])

    du, ddelta, dA, dB, dC = (torch.zeros_like(w) for w in (u, delta, A, B, C))
    g = torch.zeros_like(hs[0])  # exp(Δ_{t+1} A) g_{t+1}
    for t in reversed(range(length)):
        dC[..., t] = (dy[:, :, None, t] * hs[t + 1]).sum(1)  # shared by all channels
        g = g + C[:, None, :, t] * dy[:, :, None, t]  # (B, D, N), now g_t
        dB[..., t] = (g * x[:, :, None, t]).sum(1)
        dx = (g * B[:, None, :, t]).sum(-1)  # (B, D), by Δ_t u_t
        decay = g * a[..., t] * hs[t]  # by Δ_t A
        du[..., t] = dx * delta[..., t] + D * dy[..., t]
        ddelta[..., t] = dx * u[..., t] + (decay * A).sum(-1)
        dA += (decay * delta[:, :, None, t]).sum(0)
        g = a[..., t] * g
    return du, ddelta, dA, dB, dC, (dy * u).sum((0, 2))
