"""Muon on stacks: matrices of one shape are made orthogonal in one batched product."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """PyTorch's Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), its many small products done as fewer large ones.

    State and settings are PyTorch's, and so is the update, to the rounding of its bf16 products. `dtype`: that of the products.
    Learning rates are scaled to AdamW's RMS.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype = torch.bfloat16, **settings: Any):
        super().__init__(parameters, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            rate, decay, momentum = group["lr"], group["lr"] * group["weight_decay"], group["momentum"]
            stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # by shape [m, n]: parameter, what to make orthogonal
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.grad)).lerp_(parameter.grad, 1 - momentum)
                    update = parameter.grad.lerp(mean, momentum) if group["nesterov"] else mean
                    update = lying(update).to(self.dtype)
                    stacks[update.shape].append((parameter, update))
            for (_, longer), stack in stacks.items():
                scale = 0.2 * longer**0.5  # Liu et al. 2025, 2502.16982, eq. 4: the update has the RMS of AdamW's
                updates = orthogonal(torch.stack([update for _, update in stack]), group["ns_coefficients"], group["ns_steps"], group["eps"])
                for (parameter, _), update in zip(stack, updates):
                    lying(parameter).mul_(1 - decay).add_(update, alpha=-rate * scale)


def lying(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, whichever is no higher than it is wide."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices [k, m, n], m ≤ n, their singular values brought near 1 by Newton–Schulz iterations X ← aX + b(XXᵀ)X + c(XXᵀ)²X."""
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
