"""The optimiser: Muon for matrices, Adam for the rest. [ours]

Adam scales each number of a gradient alone; Muon (Jordan et al., 2024) takes a matrix as a whole: it keeps
the gradient's singular vectors and sets all its singular values to one, so that rare directions of a matrix
learn as fast as common ones. `torch.optim.Muon` does so in bfloat16, for two axes alone; here a convolution's
kernel is a matrix too, of output channels by all else, and the work is float32 (TF32 on a GPU).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan's quintic, which takes singular values into 0.7 … 1.2
MOMENTUM = 0.95  # Muon's
BETAS = 0.9, 0.99  # Adam's
EPSILON = 1e-8  # Adam's


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (K, m, n), each with its singular vectors and, nearly, singular values of one."""
    a, b, c = COEFFICIENTS
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Muon for the groups marked `matrices=True`, Adam for the others; weight decay as in AdamW.

    An update of a matrix (m, n) has the size of Adam's, 0.2 for each number (Liu et al., 2025), so that one
    learning rate serves both.
    """

    def __init__(self, params: Iterable[dict], lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            (self._step_matrices if group["matrices"] else self._step_adam)(parameters, group)

    def _step_matrices(self, parameters: list[Tensor], group: dict) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for p in parameters:
            by_shape[(p.shape[0], p[0].numel())].append(p)
        for (m, n), alike in by_shape.items():
            averages = [self._state(p, "momentum") for p in alike]
            gradients = [p.grad for p in alike]
            torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, averages, MOMENTUM)  # Nesterov's look ahead
            updates = orthogonalised(torch.stack([x.reshape(m, n).float() for x in ahead]))
            scale = -group["lr"] * 0.2 * max(m, n) ** 0.5
            torch._foreach_add_(alike, [x.view(p.shape) for x, p in zip(updates, alike)], alpha=scale)

    def _step_adam(self, parameters: list[Tensor], group: dict) -> None:
        states = ([self._state(p, name) for p in parameters] for name in ("mean", "square"))
        for p in parameters:  # on the CPU, where reading it is free; accelerate moves a loaded one
            self.state[p]["step"] = self.state[p].get("step", torch.zeros(())).cpu()
        steps = [self.state[p]["step"] for p in parameters]
        adam(
            parameters, [p.grad for p in parameters], *states, [], steps, foreach=True, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=group["lr"], weight_decay=0, eps=EPSILON, maximize=False,
        )  # fmt: skip

    def _state(self, p: Tensor, name: str) -> Tensor:
        """The parameter's running value of that name, of its shape; zero at first."""
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p)
        return state[name]


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict]:
    """What of a model is a matrix: weights of linear layers, of attention's projections to queries, keys and
    values, and of convolutions but depthwise ones.

    Weight decay is for these alone, not for norms, biases, embeddings or the scan's parameters.
    """
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    attentions = (module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    matrices |= {id(module.in_proj_weight) for module in attentions}
    learnt = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learnt if id(p) in matrices], "matrices": True, "weight_decay": weight_decay},
        {"params": [p for p in learnt if id(p) not in matrices], "matrices": False, "weight_decay": 0.0},
    ]
