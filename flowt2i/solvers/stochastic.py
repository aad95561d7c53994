"""A stochastic solver whose states have the same distribution at every time as the flow's: noise forgets what early steps got wrong."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowt2i.solvers.fixed import Callback, Velocity, intervals


def score(velocity: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """`grad log p_t(z) = (t v - z) / (1 - t)` of the straight path with Gaussian noise (Ma et al., SiT, 2401.08740, eq. 9 with alpha = t, sigma = 1 - t)."""
    return (t * velocity - z) / (1 - t)


def sde(
    velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None, *, noise: Callable[[Tensor], Tensor] = torch.randn_like
) -> Tensor:  # fmt: skip
    """Euler-Maruyama on `dz = (v + w/2 score) dt + sqrt(w) dW` with `w = 1 - t` (SiT, eq. 4 with w = sigma, written for noise at t = 0).

    With that w the drift `v + (t v - z) / 2` has no pole at the data. The last step adds no noise. One evaluation a step, strong order 1/2,
    weak order 1. `noise(like)` gives standard normal numbers of a tensor's shape.
    """
    for step, t, h in intervals(times):
        v = velocity(z, t)
        if callback:
            callback(step, t, z, v)
        if step == len(times) - 2:
            return z + h * v
        weight = 1 - float(t)
        z = z + h * (v + weight / 2 * score(v, z, t)) + (weight * h) ** 0.5 * noise(z)
    return z
