"""Solvers on ODEs with closed-form solutions: order of convergence, callbacks."""

import math

import pytest
import torch

from flowt2i.guidance import classifier_free, conditional
from flowt2i.solvers import EVALUATIONS, SOLVERS, shift_times, uniform_times

ORDER = {"euler": 1, "heun": 2}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "velocity, exact",
    [(lambda z, t: -2 * z, math.exp(-2)), (lambda z, t: z * torch.cos(3 * t), math.exp(math.sin(3) / 3)), (lambda z, t: -z * z, 0.5)],
)
def test_order_of_convergence(name, velocity, exact):
    z0 = torch.ones(1, dtype=torch.float64)
    counts = [20, 40, 80, 160]
    errors = [abs(SOLVERS[name](velocity, z0, uniform_times(n).double()).item() - exact) for n in counts]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert min(slopes[1:]) > ORDER[name] - 0.25, slopes


@pytest.mark.parametrize("name", SOLVERS)
def test_straight_paths_need_one_step(name):
    z0, v = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert torch.allclose(SOLVERS[name](lambda z, t: v, z0, uniform_times(1)), z0 + v)


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_and_evaluations(name):
    calls, seen = [], []

    def velocity(z, t):
        calls.append(float(t))
        return torch.ones_like(z)

    SOLVERS[name](velocity, torch.zeros(1), uniform_times(5), lambda step, t, z, v: seen.append((step, float(t), float(z + (1 - t) * v))))
    assert [s for s, _, _ in seen] == list(range(5))
    assert len(calls) == EVALUATIONS[name](5)
    assert max(calls) < 1, "no velocity is asked for at the data"
    assert all(abs(clean - 1) < 1e-6 for _, _, clean in seen)


def test_guidance_scales_the_difference_in_one_batch():
    text, null = torch.full((2, 1, 1), 3.0), torch.full((2, 1, 1), 1.0)
    mask = torch.ones(2, 1, dtype=torch.bool)
    sizes = []

    def field(z, t, text, mask):
        sizes.append(len(z))
        return text.view(-1, 1, 1, 1).expand_as(z)

    z, t = torch.zeros(2, 1, 2, 2), torch.tensor(0.5)
    assert torch.all(classifier_free(field, text, mask, null, mask, 2.0)(z, t) == 1 + 2 * (3 - 1))
    assert torch.all(classifier_free(field, text, mask, null, mask, 1.0)(z, t) == conditional(field, text, mask)(z, t))
    assert sizes == [4, 4, 2]


def test_shifted_times_keep_their_ends_and_lie_nearer_the_noise():
    even = uniform_times(10).double()
    assert torch.equal(shift_times(even, 1.0), even)
    shifted = shift_times(even, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] < even[1:-1]).all()
    sigma = 1 - even  # the published form, in noise fractions
    assert torch.allclose(1 - shifted, 3 * sigma / (1 + 2 * sigma))
