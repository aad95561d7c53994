"""Exponential moving average of the weights, in fp32, with warm-up: `decay_n = min(decay, (1 + n) / (10 + n))`.

The warm-up matters: a fixed 0.9999 still holds two thirds of the *initial* weights after 4,000 steps.
"""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Averaged copy of a model (`self.model`, eval mode, no gradients) and the number of its updates so far."""

    def __init__(self, model: M, decay: float):
        self.decay, self.updates = decay, 0
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)
        self._source = model

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        ours: list[torch.Tensor] = list(self.model.parameters())  # asked for anew: sharding a model replaces its parameters
        torch._foreach_lerp_(ours, list(self._source.parameters()), 1 - decay)
        self.updates += 1
