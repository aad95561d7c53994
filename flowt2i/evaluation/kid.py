"""Kernel distance between two sets of features: KID where the net is Inception-v3 (Bińkowski et al. 1801.01401). Unbiased at any number of samples."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST = 10_000  # features a side: the error is then far below what models differ by
ROWS = 1_024  # of the kernel matrix at a time


class Estimate(NamedTuple):
    value: float
    error: float  # one standard error


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """Squared maximum mean discrepancy of features x [n, d] and y [m, d] under the kernel (x·y / d + 1)³; ValueError for fewer than three.

    The unbiased estimate of 1801.01401, eq. 4. The literature averages it over random subsets of 1,000; the mean over *all* subsets of any size is the
    estimate from all samples at once, which is what is calculated here. Its error is the two-sample jackknife's (Arvesen 1969), which
    sees that samples are finite, as the spread over subsets that overlap does not. Of more than `MOST` features the first count.
    """
    x, y = x[:MOST].double(), y[:MOST].double()
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise ValueError("the kernel distance needs at least three samples a side")
    within_x, within_y = kernel_sums(x, x)[0] - _diagonal(x), kernel_sums(y, y)[0] - _diagonal(y)
    across_x, across_y = kernel_sums(x, y)
    value = (within_x.sum() / (n * (n - 1)) + within_y.sum() / (m * (m - 1)) - 2 * across_x.sum() / (n * m)).item()
    return Estimate(value, math.sqrt(_jackknife(within_x, across_x, m) + _jackknife(within_y, across_y, n)))


def kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the kernel of x [n, d] and y [m, d] over y, [n], and over x, [m]."""
    rows, columns = [], torch.zeros(len(y), dtype=x.dtype)
    for part in x.split(ROWS):
        kernel = (part @ y.T / x.shape[1] + 1).pow_(3)
        rows.append(kernel.sum(1))
        columns += kernel.sum(0)
    return torch.cat(rows), columns


def _diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3)


def _jackknife(within: Tensor, across: Tensor, others: int) -> float:
    """Variance of the estimate by leaving out one sample of this side at a time; within [n] without the sample itself, across [n] to `others` samples."""
    n = len(within)
    without = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (across.sum() - across) / ((n - 1) * others)
    return ((n - 1) / n * (without - without.mean()).square().sum()).item()
