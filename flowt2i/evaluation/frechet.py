"""Fréchet distance between Gaussians fitted to features: FID where the net is Inception-v3 (Heusel et al. 1706.08500, eq. 6). Float64 throughout."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

LEAST = 2_048  # samples below which a score is refused: its bias, about 1/n, then outweighs what models differ by (Chong & Forsyth 1911.07023)


@dataclass
class Moments:
    """Of a Gaussian."""

    mean: Tensor  # float64 [d]
    covariance: Tensor  # float64 [d, d]

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features [n, d], the covariance unbiased. ValueError for fewer than two."""
        if len(features) < 2:
            raise ValueError("a covariance needs at least two samples")
        x = features.double()
        return cls(x.mean(0), x.T.cov())

    @cached_property
    def root(self) -> Tensor:
        """F [d, rank] with F Fᵀ = the covariance; eigenvalues that are rounding errors of the largest count as none."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
        return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μa − μb|² + tr Σa + tr Σb − 2 tr (Σa^½ Σb Σa^½)^½.

    The last trace is the sum of the singular values of Faᵀ Fb, where Σ = F Fᵀ: no square root is taken of a difference of nearly equal
    numbers, so it holds where covariances are singular (fewer samples than dimensions, constant features).
    """
    overlap = torch.linalg.svdvals(a.root.T @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(0.0, distance.item())


def transport(of: Moments, onto: Moments, floor: float = 1e-4) -> tuple[Tensor, float]:
    """How one Gaussian is carried onto another with the least mean square of moves, and that least: `frechet_distance` but for the floor.

    T [d, d], so that x goes to `onto.mean + T (x - of.mean)`: `T = F (Fᵀ Σa F)^-½ Fᵀ` with `Σb = F Fᵀ`, symmetric (Peyré & Cuturi, Computational Optimal
    Transport, 1803.00567, remark 2.31). These moves are the gradient of the distance: by the n samples x_i that `of` was fitted to, `2 / n (x_i - T(x_i))`.
    floor: of the mean eigenvalue of `onto`; so much is added to all eigenvalues of `of`, since an inverse is asked for.
    """
    root = onto.root
    covariance = of.covariance + floor * onto.covariance.trace() / len(root) * torch.eye(len(root), dtype=root.dtype)
    values, vectors = torch.linalg.eigh(root.T @ covariance @ root)
    values = values.clamp_min(1e-12 * values[-1])
    distance = (of.mean - onto.mean).square().sum() + covariance.trace() + onto.covariance.trace() - 2 * values.sqrt().sum()
    return root @ (vectors * values.rsqrt()) @ vectors.T @ root.T, max(0.0, distance.item())
