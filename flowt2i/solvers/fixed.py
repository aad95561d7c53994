"""Solvers of a fixed grid: Runge-Kutta and Adams-Bashforth methods. What they have in common is told in `flowt2i/solvers/__init__.py`."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]


class Solver(Protocol):
    def __call__(self, velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor: ...


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method (Hairer, Nørsett & Wanner, Solving ODEs I, sec. II.1): stage i asks at `t + c_i h`."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]  # row i: weights of the stages before stage i
    b: tuple[float, ...]


EULER = Tableau((0,), ((),), (1,))
MIDPOINT = Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1))
HEUN = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
HEUN3 = Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4))  # order 3, never asks at the end of the step
RK4 = Tableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def euler(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method: order 1, one evaluation a step."""
    return _one_step(velocity, z, times, callback, EULER, last=EULER)


def midpoint(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """The midpoint rule: order 2, two evaluations a step."""
    return _one_step(velocity, z, times, callback, MIDPOINT, last=MIDPOINT)


def heun(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's method (the trapezoid rule with Euler's predictor): order 2, two evaluations a step; the last step is Euler's."""
    return _one_step(velocity, z, times, callback, HEUN, last=EULER)


def rk4(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """The classical Runge-Kutta method: order 4, four evaluations a step; the last step is Heun's method of order 3."""
    return _one_step(velocity, z, times, callback, RK4, last=HEUN3)


def ab2(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Adams-Bashforth of order 2 for any spacing: one evaluation a step. The first step is Euler's."""
    return _adams_bashforth(velocity, z, times, callback, order=2, start=EULER)


def ab4(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """Adams-Bashforth of order 4 for any spacing: one evaluation a step. The first three steps are Heun's of order 3, three evaluations each."""
    return _adams_bashforth(velocity, z, times, callback, order=4, start=HEUN3)


def intervals(times: Tensor) -> Iterator[tuple[int, Tensor, float]]:
    """(step, time, length) of each interval; lengths are plain numbers, so that no step waits for a GPU."""
    for step, (t, (a, b)) in enumerate(zip(times, itertools.pairwise(times.tolist()))):
        yield step, t, b - a


def runge_kutta_stages(velocity: Velocity, z: Tensor, t: Tensor, h: float, method: Tableau, first: Tensor) -> list[Tensor]:
    """The velocities at the stages of one step, the first of which, at (z, t), is given."""
    stages = [first]
    for c, row in zip(method.c[1:], method.a[1:]):
        stages.append(velocity(advance(z, h, row, stages), t + c * h))
    return stages


def advance(z: Tensor, h: float, weights: Sequence[float], velocities: Sequence[Tensor]) -> Tensor:
    """`z + h sum_i w_i v_i`, without the terms of no weight."""
    for weight, v in zip(weights, velocities):
        if weight:
            z = z + (h * weight) * v
    return z


def _one_step(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None, method: Tableau, last: Tableau) -> Tensor:
    for step, t, h in intervals(times):
        v = velocity(z, t)
        if callback:
            callback(step, t, z, v)
        used = last if step == len(times) - 2 else method
        z = advance(z, h, used.b, runge_kutta_stages(velocity, z, t, h, used, v))
    return z


def _adams_bashforth(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None, order: int, start: Tableau) -> Tensor:
    """A start of order `order - 1` is enough: a fixed number of its steps, each wrong by O(h^order), leave an error of that order."""
    known = times.tolist()
    past: list[Tensor] = []  # velocities, the newest last
    for step, t, h in intervals(times):
        v = velocity(z, t)
        if callback:
            callback(step, t, z, v)
        past = [*past[1 - order :], v]
        if len(past) < order:
            z = advance(z, h, start.b, runge_kutta_stages(velocity, z, t, h, start, v))
        else:
            z = advance(z, h, adams_weights(known[step + 1 - order : step + 1], known[step + 1]), past)
    return z


def adams_weights(times: Sequence[float], until: float) -> list[float]:
    """Weights of the velocities at `times` (the newest last) in the mean velocity over [times[-1], until].

    They integrate every polynomial of degree under `len(times)` exactly (Hairer, Nørsett & Wanner, Solving ODEs I, sec. III.5): with
    `s_i = (t_i - t_n) / h`, `sum_i w_i s_i^m = 1 / (m + 1)`. Evenly spaced they are the textbook's, 3/2 and -1/2 at order 2.
    """
    places = (np.array(times) - times[-1]) / (until - times[-1])
    powers = np.arange(len(times))
    return np.linalg.solve(places[None, :] ** powers[:, None], 1 / (powers + 1)).tolist()
