"""Solvers of `dz/dt = velocity(z, t)` from noise (t = 0) to data (t = 1): pure functions of one signature.

    solver(velocity, z, times, callback=None) -> z

`velocity(z, t)` takes `z [B, C, H, W]` and a scalar tensor `t` and returns `[B, C, H, W]`; `times` is an increasing `[N + 1]`
tensor; `callback(step, t, z, v)` is called after each of the N steps with the time and state *before* it and the velocity there,
so that a preview of the clean image is `z + (1 - t) v`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]


class Solver(Protocol):
    def __call__(self, velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor: ...


def uniform_times(steps: int, device: torch.device | str = "cpu") -> Tensor:
    """`steps + 1` equally spaced times from 0 to 1."""
    return torch.linspace(0, 1, steps + 1, device=device)


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards the noise: `t / (t + shift (1 - t))` (Esser et al. 2403.03206, eq. 23, written for our direction of t).

    The larger the picture for what it says, the more of it is decided next to the noise: a flat background shows through all but the
    strongest noise. shift 1 changes nothing.
    """
    return times / (times + shift * (1 - times))


def euler(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method: order 1, one evaluation a step."""
    for step in range(len(times) - 1):
        t, h = times[step], times[step + 1] - times[step]
        v = velocity(z, t)
        if callback:
            callback(step, t, z, v)
        z = z + h * v
    return z


def heun(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's method (the trapezoid rule with Euler's predictor): order 2, two evaluations a step.

    The last step is Euler's (Karras et al. 2206.00364, alg. 1, line 6): a field made of predicted data has no velocity at t = 1.
    """
    last = len(times) - 2
    for step in range(len(times) - 1):
        t, h = times[step], times[step + 1] - times[step]
        v = velocity(z, t)
        if callback:
            callback(step, t, z, v)
        z = z + h * v if step == last else z + h / 2 * (v + velocity(z + h * v, times[step + 1]))
    return z


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}
EVALUATIONS: dict[str, Callable[[int], int]] = {"euler": lambda steps: steps, "heun": lambda steps: 2 * steps - 1}  # of the velocity, by number of steps
