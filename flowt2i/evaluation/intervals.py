"""Intervals and tests of shares: one share, and the difference of two that were measured on the same prompts and seeds. No simulation, no dependencies."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5th percentile: two-sided 95%


def wilson(hits: float, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson 1927, eq. 4); (0, 1) where nothing was counted."""
    if not total:
        return 0.0, 1.0
    p, n = hits / total, total
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return low if hits else 0.0, high if hits < total else 1.0  # at the ends without what rounding leaves


def tally(hits: int, total: int) -> dict[str, Any]:
    """A share with its interval: `accuracy`, `low`, `high`, `n`."""
    low, high = wilson(hits, total)
    return {"accuracy": hits / total if total else 0.0, "low": low, "high": high, "n": total}


def by_group(values: Sequence[float] | np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The mean of the values of each group [distinct groups], in order of first appearance: pictures of one caption are no independent cases, captions are."""
    number = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    place = np.array([number[group] for group in groups], np.int64)
    return np.bincount(place, np.asarray(values, np.float64), len(number)) / np.bincount(place, minlength=len(number))


def share_interval(shares: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """A mean of shares of independent groups, with Wilson's interval as if each group were one case: never too narrow, as in `tally` where each is."""
    array = np.asarray(shares, np.float64)
    mean = float(array.mean())
    low, high = wilson(float(array.sum()), len(array))
    return {"accuracy": mean, "low": low, "high": high, "n": len(array)}


def mean_interval(values: Sequence[float] | np.ndarray, z: float = Z95) -> dict[str, Any]:
    """A mean with its normal 95% interval: `mean`, `low`, `high`, `n`; for paired differences this is the paired interval. Needs two values."""
    array = np.asarray(values, np.float64)
    mean, half = float(array.mean()), z * float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.inf
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(array)}


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Share of `second` less share of `first`, measured on the same cases: `difference`, `low`, `high`, `p`, `n`, `only_first`, `only_second`.

    The 95% interval is Newcombe's hybrid score interval for paired shares (Newcombe 1998, Statistics in Medicine 17:2635, method 10): Wilson's intervals
    of both shares, put together with the correlation of the pairs. `p` is the exact McNemar test: how often a fair coin would divide the cases that
    only one of the two got right as unevenly as this. ValueError where the two are not as long as each other, or empty.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"paired cases: {len(first)} against {len(second)}")
    pairs = list(zip(map(bool, first), map(bool, second)))
    both, only_first, only_second = (pairs.count(kind) for kind in ((True, True), (True, False), (False, True)))
    n, neither = len(pairs), len(pairs) - both - only_first - only_second
    a, b = (both + only_first) / n, (both + only_second) / n
    (a_low, a_high), (b_low, b_high) = wilson(both + only_first, n), wilson(both + only_second, n)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product = both * neither - only_first * only_second
    correction = max(product - n / 2, 0.0) if product > 0 else float(product)  # Newcombe's continuity correction of phi
    phi = correction / math.sqrt(margins) if margins else 0.0
    below = _hybrid(b - b_low, a_high - a, phi)
    above = _hybrid(b_high - b, a - a_low, phi)
    difference = b - a
    return {
        "difference": difference, "low": difference - below, "high": difference + above, "p": mcnemar(only_first, only_second),
        "n": n, "only_first": only_first, "only_second": only_second,
    }  # fmt: skip


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: a fair coin over the cases that only one of two got right (McNemar 1947; binomial form)."""
    n, few = only_first + only_second, min(only_first, only_second)
    if not n:
        return 1.0
    tail = sum(math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)) for k in range(few + 1))
    return min(1.0, 2 * tail)


def _hybrid(mine: float, theirs: float, phi: float) -> float:
    return math.sqrt(max(0.0, mine * mine - 2 * phi * mine * theirs + theirs * theirs))
