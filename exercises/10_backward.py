"""10 · The scan's gradient, by hand                                             project, 2 hours

Autograd can differentiate the loop of exercise 05, but it then keeps every state: N numbers for each number
of the input, more than anything else in the network. Fast scans have a backward pass of their own. Write it,
given

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,    h_{-1} = 0
    y_t = C_t · h_t + D u_t

and dy_t, the gradient of some loss with respect to y_t. Begin with g_t, the gradient with respect to h_t. The
loss depends on h_t in two ways, through y_t and through h_{t+1}, so g_t follows a recurrence too, run from
the end. Everything else is local to a step: differentiate each product in h_t and y_t with respect to each of
its factors, and sum over the axes along which a factor was shared.

Question: which tensors of the forward pass does it need? How could it do without keeping all the states?

Read: `ChunkedScan.backward` in scan_kernels/chunked.py, after you have tried.
Test: pytest exercises -k 10 compares with autograd, in float64
"""

from torch import Tensor


def scan_backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients by u, delta, A, B, C and D, each of its shape.

    dy, u, delta: (B, D, L); A: (D, N); B, C: (B, N, L); D: (D,).
    """
    raise NotImplementedError
