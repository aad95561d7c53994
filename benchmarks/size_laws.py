"""How loss, size and compute hang together: the fits of `size_fit.py`. Pure functions of measured points.

After Hoffmann et al. (Chinchilla, 2203.15556): trainings of several sizes at equal compute, a parabola in the logarithm of the size for each (approach 2),
and power laws through their lowest points.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Vertex(NamedTuple):
    """Lowest point of a parabola: where, how low, and whether it lies within what was measured (else: the best of that)."""

    at: float
    value: float
    inside: bool
    curve: tuple[float, float, float]  # value = c0 + c1 log x + c2 log² x


def lowest(xs: Sequence[float], ys: Sequence[float]) -> Vertex:
    """Least squares of a parabola in log x through three points or more. Where it has no lowest point between the least and the largest x: the best point.

    ValueError for fewer than three different xs.
    """
    if len(set(xs)) < 3:
        raise ValueError(f"a parabola needs three different sizes, and there are {len(set(xs))}")
    logs = np.log(np.asarray(xs, np.float64))
    c2, c1, c0 = np.polyfit(logs, np.asarray(ys, np.float64), 2)
    at = -c1 / (2 * c2) if c2 > 0 else math.nan
    curve = (float(c0), float(c1), float(c2))
    if c2 > 0 and logs.min() <= at <= logs.max():
        return Vertex(float(np.exp(at)), float(c0 + c1 * at + c2 * at * at), True, curve)
    best = int(np.argmin(ys))
    return Vertex(float(xs[best]), float(ys[best]), False, curve)


class PowerLaw(NamedTuple):
    """`y = floor + scale * x ^ exponent`."""

    scale: float
    exponent: float
    floor: float = 0.0

    def __call__(self, x: float) -> float:
        return self.floor + self.scale * x**self.exponent


def power_law(xs: Sequence[float], ys: Sequence[float], with_floor: bool = False) -> PowerLaw:
    """Least squares in logarithms. with_floor: the constant that straightens the points best, which needs four of them; else none.

    ValueError for fewer than two different xs, and where no y is above 0.
    """
    x, y = np.log(np.asarray(xs, np.float64)), np.asarray(ys, np.float64)
    if len(set(xs)) < 2 or y.min() <= 0:
        raise ValueError("a power law needs two different places with values above 0")
    best: tuple[float, PowerLaw] | None = None
    for floor in np.linspace(0, y.min(), 200, endpoint=False) if with_floor and len(set(xs)) >= 4 else [0.0]:
        exponent, intercept = np.polyfit(x, np.log(y - floor), 1)
        error = float(np.square(floor + np.exp(intercept + exponent * x) - y).sum())
        if best is None or error < best[0]:
            best = error, PowerLaw(float(np.exp(intercept)), float(exponent), float(floor))
    assert best is not None
    return best[1]
