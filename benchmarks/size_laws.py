"""How loss, size and compute hang together: the fits of `size_fit.py`. Pure functions of measured points.

After Hoffmann et al. (Chinchilla, 2203.15556): trainings of several sizes at equal compute, a parabola in the logarithm of the size for each (approach 2),
and power laws through their lowest points.
"""

import functools
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


def lowest_across(sizes: Sequence[float], factors: Sequence[float], ys: Sequence[float], at: Sequence[float]) -> list[Vertex]:
    """For each size of `at` the factor with the lowest y *at that size*, where a factor changes the size as well (more depth is more parameters).

    Least squares of a quadratic surface log y = q(log size, log factor) through six points or more; where its course along the factor has no lowest point
    between the least and the largest: the better end. ValueError for fewer than six points.
    """
    if len(ys) < 6:
        raise ValueError(f"a quadratic surface needs six points, and there are {len(ys)}")
    n, f = np.log(np.asarray(sizes, np.float64)), np.log(np.asarray(factors, np.float64))
    centre = n.mean()
    columns = lambda n, f: np.stack([np.ones_like(n), n - centre, (n - centre) ** 2, f, f**2, (n - centre) * f], axis=-1)
    c = np.linalg.lstsq(columns(n, f), np.log(np.asarray(ys, np.float64)), rcond=None)[0]
    found = []
    for size in np.log(np.asarray(at, np.float64)) - centre:
        curve = (c[0] + c[1] * size + c[2] * size**2, c[3] + c[5] * size, c[4])
        vertex = -curve[1] / (2 * curve[2]) if curve[2] > 0 else math.nan
        inside = bool(f.min() <= vertex <= f.max())
        best = vertex if inside else min((f.min(), f.max()), key=functools.partial(polynomial, curve))
        found.append(Vertex(math.exp(best), math.exp(polynomial(curve, best)), inside, curve))
    return found


def polynomial(coefficients: Sequence[float], x: float) -> float:
    return sum(c * x**power for power, c in enumerate(coefficients))


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


def slope_error(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Standard error of the exponent of `power_law(xs, ys)`, from how the points scatter about it; NaN for fewer than three points."""
    x, y = np.log(np.asarray(xs, np.float64)), np.log(np.asarray(ys, np.float64))
    if len(x) < 3:
        return math.nan
    residuals = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(np.sqrt(np.square(residuals).sum() / (len(x) - 2) / np.square(x - x.mean()).sum()))
