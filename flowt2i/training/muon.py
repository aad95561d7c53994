"""Muon on stacks: matrices (or pieces of them) of one shape are made orthogonal in one batched product."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """PyTorch's Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), its many small products done as fewer large ones.

    `piece`: each matrix is cut along its longer side into pieces of so many rows, as MuonBP (2510.16981) cuts it between its whole steps, for the
    operations of Newton-Schulz go with the shorter side of what it is given. 0: whole matrices.

    State and settings are PyTorch's, and so is the update of whole matrices, to the rounding of its bf16 products. `dtype`: that of the products.
    Learning rates are scaled to AdamW's RMS.
    """

    def __init__(self, parameters: Iterable[Tensor], piece: int = 0, dtype: torch.dtype = torch.bfloat16, **settings: Any):
        super().__init__(parameters, **settings)
        self.piece, self.dtype = piece, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            rate, decay, momentum = group["lr"], group["lr"] * group["weight_decay"], group["momentum"]
            stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # by shape [m, n] of pieces: parameter, its k pieces to make orthogonal
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.grad)).lerp_(parameter.grad, 1 - momentum)
                    update = parameter.grad.lerp(mean, momentum) if group["nesterov"] else mean
                    cut = pieces(update, self.piece)
                    stacks[cut.shape[1:]].append((parameter, cut.to(self.dtype)))
            for (_, longer), stack in stacks.items():
                scale = 0.2 * longer**0.5  # Liu et al. 2025, 2502.16982, eq. 4: the update has the RMS of AdamW's
                cuts = [cut for _, cut in stack]
                updates = orthogonal(torch.cat(cuts), group["ns_coefficients"], group["ns_steps"], group["eps"]).split([len(cut) for cut in cuts])
                for (parameter, _), update in zip(stack, updates):
                    pieces(parameter, self.piece).mul_(1 - decay).add_(update, alpha=-rate * scale)


def lying(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, whichever is no higher than it is wide."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def pieces(matrix: Tensor, size: int) -> Tensor:
    """A view of the matrix as [k, m, n], m ≤ n: its longer side cut into pieces of `size` where that divides it and makes them flatter; else whole."""
    flat = lying(matrix)
    height, length = flat.shape
    if not size or length % size or size >= height:
        return flat[None]
    return flat.T.unflatten(0, (length // size, size))


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices [k, m, n], m ≤ n, their singular values brought near 1 by Newton–Schulz iterations X ← aX + b(XXᵀ)X + c(XXᵀ)²X."""
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
