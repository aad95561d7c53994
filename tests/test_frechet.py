"""Fréchet and kernel distance against closed forms, scipy and torchmetrics."""

import math

import numpy as np
import pytest
import torch

from flowt2i.evaluation.frechet import Moments, frechet_distance
from flowt2i.evaluation.kid import kernel_distance


def features(n: int, d: int, seed: int, shift: float = 0.0, rank: int | None = None) -> torch.Tensor:
    """Correlated features [n, d] of unequal scales; of a lower rank where asked for."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rank or d, d)) / math.sqrt(d) * np.geomspace(1, 0.05, d)
    return torch.from_numpy(rng.normal(size=(n, rank or d)) @ mix + shift).float()


def by_scipy(x: torch.Tensor, y: torch.Tensor) -> float:
    """As the first implementations did it: scipy's sqrtm of the product."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = x.double().numpy(), y.double().numpy()
    left, right = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(left) + np.trace(right) - 2 * np.trace(linalg.sqrtm(left @ right).real))


def by_samples(x: torch.Tensor, y: torch.Tensor) -> float:
    """Exact where covariances are singular too: the trace is the nuclear norm of X Yᵀ, of the centred samples themselves."""
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    overlap = torch.linalg.matrix_norm(a @ b.T, "nuc") / math.sqrt((len(a) - 1) * (len(b) - 1))
    trace = a.square().sum() / (len(a) - 1) + b.square().sum() / (len(b) - 1)
    return float((x.double().mean(0) - y.double().mean(0)).square().sum() + trace - 2 * overlap)


def test_closed_form_of_gaussians_that_commute():
    """Diagonal, and turned by one rotation: |μ|² + Σ (√a − √b)²."""
    a, b = torch.linspace(0.1, 3, 6).double(), torch.linspace(2, 0.5, 6).double()
    mean = torch.arange(6).double() / 10
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[0]
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    for rotation in (torch.eye(6).double(), turn):
        covariances = [rotation @ torch.diag(values) @ rotation.T for values in (a, b)]
        distance = frechet_distance(Moments(mean, covariances[0]), Moments(torch.zeros(6).double(), covariances[1]))
        assert distance == pytest.approx(expected.item(), rel=1e-12)


def test_closed_form_of_two_planes():
    """Rank one against rank one, at an angle: tr Σa + tr Σb − 2 |a·b|."""
    a, b = torch.tensor([2.0, 0, 0]).double(), torch.tensor([1.0, 1, 0]).double()
    zero = torch.zeros(3).double()
    distance = frechet_distance(Moments(zero, torch.outer(a, a)), Moments(zero, torch.outer(b, b)))
    assert distance == pytest.approx(4 + 2 - 2 * 2, rel=1e-12)
    assert frechet_distance(Moments(zero, torch.outer(a, a)), Moments(zero, torch.zeros(3, 3).double())) == pytest.approx(4)


@pytest.mark.parametrize("n, m, d", [(500, 400, 32), (3000, 2500, 64)])
def test_agrees_with_scipy(n, m, d):
    x, y = features(n, d, 0), features(m, d, 1, shift=0.1)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(by_scipy(x, y), rel=1e-9)


@pytest.mark.parametrize("n, m, d, rank", [(40, 30, 128, None), (500, 400, 64, 10), (20, 2000, 64, None)])
def test_singular_covariances(n, m, d, rank):
    """Fewer samples than dimensions, features of low rank: what the samples themselves give, and nothing between a set and itself."""
    x, y = features(n, d, 0, rank=rank), features(m, d, 1, shift=0.1, rank=rank)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(by_samples(x, y), rel=1e-8)
    assert frechet_distance(Moments.of(x), Moments.of(x)) < 1e-9
    x[:, 3] = 7.0  # a feature that never varies
    y[:, 3] = 7.0
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(by_samples(x, y), rel=1e-8)


def test_the_covariance_is_unbiased():
    x = features(1000, 48, 0, shift=3.0)
    assert np.allclose(Moments.of(x).covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="two samples"):
        Moments.of(x[:1])


def test_root_drops_rounding_errors():
    moments = Moments.of(features(10, 64, 0))
    assert moments.root.shape == (64, 9) and torch.allclose(moments.root @ moments.root.T, moments.covariance, atol=1e-12)


class Passing(torch.nn.Module):
    """Stands where torchmetrics wants its Inception: the 'images' are the features."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_features = dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_agrees_with_torchmetrics(torch_fidelity):
    fid, kid = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))
    x, y = features(600, 48, 0), features(500, 48, 1, shift=0.2)
    theirs = fid.FrechetInceptionDistance(feature=Passing(48), input_img_size=(1, 1, 48)).set_dtype(torch.float64)
    theirs.update(x.double().view(-1, 1, 1, 48), real=True)
    theirs.update(y.double().view(-1, 1, 1, 48), real=False)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(theirs.compute().item(), rel=1e-6)
    subsets = kid.KernelInceptionDistance(feature=Passing(48), subsets=1, subset_size=500)
    subsets.update(x[:500].view(-1, 1, 1, 48), real=True)
    subsets.update(y.view(-1, 1, 1, 48), real=False)
    assert kernel_distance(x[:500], y).value == pytest.approx(subsets.compute()[0].item(), rel=1e-4)  # theirs is float32


def test_kernel_distance_is_the_mean_over_subsets():
    """Over all pairs of subsets of 3, taken one by one: the complete statistic."""
    from itertools import combinations

    def plain(a: np.ndarray, b: np.ndarray) -> float:
        k = lambda u, v: (u @ v.T / u.shape[1] + 1) ** 3
        n, m = len(a), len(b)
        off = lambda matrix: matrix.sum() - np.trace(matrix)
        return off(k(a, a)) / (n * (n - 1)) + off(k(b, b)) / (m * (m - 1)) - 2 * k(a, b).mean()

    x, y = features(6, 5, 0).double().numpy(), features(5, 5, 1, shift=0.5).double().numpy()
    every = [plain(x[list(i)], y[list(j)]) for i in combinations(range(6), 3) for j in combinations(range(5), 3)]
    ours = kernel_distance(torch.from_numpy(x), torch.from_numpy(y)).value
    assert ours == pytest.approx(plain(x, y), rel=1e-12) == pytest.approx(np.mean(every), rel=1e-9)


def test_kernel_distance_is_unbiased_and_knows_its_error():
    """400 draws of 40 against 60 samples of one distribution: nought on average, and spread as the error says."""
    rng = np.random.default_rng(0)
    draws = [kernel_distance(*(torch.from_numpy(rng.normal(0.5, 1.0, size=(n, 8))) for n in (40, 60))) for _ in range(400)]
    values, errors = np.array(draws).T
    spread = values.std()
    assert abs(values.mean()) < 3 * spread / math.sqrt(400)
    assert 0.7 < np.sqrt((errors**2).mean()) / spread < 1.6  # at no difference a jackknife is on the safe side
    apart = [kernel_distance(*(torch.from_numpy(rng.normal(mean, 1.0, size=(n, 8))) for n, mean in ((40, 0.5), (60, 1.0)))) for _ in range(400)]
    values, errors = np.array(apart).T
    assert 0.8 < np.sqrt((errors**2).mean()) / values.std() < 1.25
    with pytest.raises(ValueError, match="three"):
        kernel_distance(torch.zeros(2, 4), torch.zeros(9, 4))
