"""Solvers on ODEs with closed-form solutions: order of convergence on even and uneven grids, callbacks, evaluations, the end of the path."""

import math

import numpy as np
import pytest
import torch

from flowt2i.flow import to_velocity
from flowt2i.schedules import shift_times, uniform_times
from flowt2i.solvers import EVALUATIONS, SOLVERS, ToleranceError, dopri5, sde
from flowt2i.solvers.adaptive import DOPRI5, FOURTH
from flowt2i.solvers.fixed import HEUN3, _one_step, adams_weights

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2, "rk4": 4, "ab4": 4}
PROBLEMS = {  # (velocity, z(0), z(1))
    "decay": (lambda z, t: -2 * z, 1.0, math.exp(-2)),
    "growth in time": (lambda z, t: z * torch.exp(t), 1.0, math.exp(math.e - 1)),
    "logistic": (lambda z, t: 3 * z * (1 - z), 0.1, 1 / (1 + 9 * math.exp(-3))),
}


def slope(solve, velocity, start, exact, shift, counts):
    """The order of convergence: least squares through the log-log points of error against steps."""
    z0 = torch.full((1,), start, dtype=torch.float64)
    errors = [abs(solve(velocity, z0, shift_times(uniform_times(n).double(), shift)).item() - exact) for n in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ORDER)
def test_order_of_convergence(name, problem, shift):
    found = slope(SOLVERS[name], *PROBLEMS[problem], shift, [80, 160, 320])
    assert found > ORDER[name] - 0.4, found


@pytest.mark.parametrize("name, method, order", [("Heun of order 3", HEUN3, 3), ("Dormand-Prince", DOPRI5, 5), ("its order 4", DOPRI5._replace(b=FOURTH), 4)])
def test_order_of_the_methods_inside(name, method, order):
    orders = [slope(lambda v, z, t: _one_step(v, z, t, None, method, method), *PROBLEMS[p], 1.0, [8, 16, 32]) for p in PROBLEMS]
    assert min(orders) > order - 0.4 and min(orders) < order + 0.7, orders


def test_adams_weights_are_the_textbooks_when_even_and_exact_for_polynomials_when_not():
    assert np.allclose(adams_weights([0.0, 1.0], 2.0), [-1 / 2, 3 / 2])
    assert np.allclose(np.array(adams_weights([0.0, 1.0, 2.0, 3.0], 4.0)) * 24, [-9, 37, -59, 55])
    times, until = [0.0, 0.1, 0.4, 0.5], 0.9
    weights = adams_weights(times, until)
    for power in range(4):
        mean = (until ** (power + 1) - times[-1] ** (power + 1)) / ((power + 1) * (until - times[-1]))
        assert math.isclose(sum(w * t**power for w, t in zip(weights, times)), mean)


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"sde"}))
def test_straight_paths_need_one_step(name):
    z0, v = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert torch.allclose(SOLVERS[name](lambda z, t: v, z0, uniform_times(1)), z0 + v, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", SOLVERS)
def test_callback_and_evaluations(name, steps):
    calls, seen = [], []

    def velocity(z, t):
        calls.append(float(t))
        return torch.ones_like(z)

    times = shift_times(uniform_times(steps), 2.0)
    SOLVERS[name](velocity, torch.zeros(1), times, lambda step, t, z, v: seen.append((step, float(t), float(z + (1 - t) * v))))
    assert [s for s, _, _ in seen] == list(range(steps)) and np.allclose([t for _, t, _ in seen], times[:-1])
    if name in EVALUATIONS:
        assert len(calls) == EVALUATIONS[name](steps)
    assert max(calls) < 1, "no velocity is asked for at the data"
    if name != "sde":
        assert all(abs(clean - 1) < 1e-5 for _, _, clean in seen)


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"sde"}))
def test_a_field_of_predicted_data_lands_on_it(name):
    """v = (x - z) / (1 - t) has a pole at t = 1; its paths are straight, so that every solver must be exact."""
    data, noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    z = SOLVERS[name](lambda z, t: to_velocity(data, z, t.expand(len(z)), "x"), noise, shift_times(uniform_times(7), 3.0))
    assert torch.allclose(z, data, atol=1e-4)


class TestDopri5:
    def test_error_follows_the_tolerance(self):
        velocity, start, exact = PROBLEMS["growth in time"]
        tolerances = [1e-3, 1e-4, 1e-5]
        z0 = torch.full((1,), start, dtype=torch.float64)
        errors = [abs(dopri5(velocity, z0, uniform_times(1), rtol=r, atol=r).item() - exact) for r in tolerances]
        assert all(error < 20 * tolerance for error, tolerance in zip(errors, tolerances)), errors
        assert errors[2] < errors[0] / 10

    def test_evaluations_grow_with_the_accuracy_asked_for(self):
        def count(tolerance):
            calls = []
            dopri5(lambda z, t: calls.append(t) or torch.sin(20 * t) * z, torch.ones(1), uniform_times(4), rtol=tolerance, atol=tolerance)
            return len(calls)

        loose, tight = count(1e-2), count(1e-5)
        assert loose < tight < 300 and (tight - 2) % 6 == 0  # two for the first step, six a try

    def test_callbacks_are_on_the_curve_between_its_steps(self):
        seen = []
        times = uniform_times(20).double()
        note = lambda step, t, z, v: seen.append((float(t), z.item(), v.item()))
        dopri5(lambda z, t: z * torch.exp(t), torch.ones(1, dtype=torch.float64), times, note, rtol=1e-6, atol=1e-6)
        for t, z, v in seen:
            exact = math.exp(math.exp(t) - 1)
            assert abs(z - exact) < 2e-3 and abs(v - exact * math.exp(t)) < 3e-2

    def test_its_first_trial_stays_before_the_end(self):
        """Large values at a slow field make the first guess long; a short rest of the way must not be left by it."""
        calls = []
        dopri5(lambda z, t: calls.append(float(t)) or 0.1 * torch.ones_like(z), torch.full((3,), 50.0), torch.tensor([0.99, 1.0]))
        assert max(calls) < 1

    @pytest.mark.parametrize("velocity", [lambda z, t: z / 0 * 0, lambda z, t: torch.randn_like(z) * 1e6])
    def test_a_field_that_cannot_be_followed_is_told(self, velocity):
        with pytest.raises(ToleranceError):
            dopri5(velocity, torch.ones(3), uniform_times(4), rtol=1e-6, atol=1e-6)


class TestSde:
    MEAN, DEVIATION = 1.5, 0.3

    def velocity(self, z, t):
        """E[data - noise | z_t = z] where the data are N(m, s^2)."""
        variance = (1 - t) ** 2 + (t * self.DEVIATION) ** 2
        return self.MEAN + (t * self.DEVIATION**2 - (1 - t)) / variance * (z - t * self.MEAN)

    def test_mean_and_variance_at_every_time(self):
        g = torch.Generator().manual_seed(0)
        noise = lambda z: torch.randn(z.shape, generator=g, dtype=z.dtype)
        states = {}
        z = sde(self.velocity, torch.randn(40_000, generator=g, dtype=torch.float64), uniform_times(100), lambda s, t, z, v: states.update({s: z}), noise=noise)
        for t, state in [(0.25, states[25]), (0.5, states[50]), (0.75, states[75]), (1.0, z)]:
            deviation = math.hypot(1 - t, t * self.DEVIATION)
            assert abs(state.mean() - t * self.MEAN) < 0.015 and abs(state.std() - deviation) < 0.015

    def test_the_noise_is_what_is_handed_in(self):
        z0 = torch.randn(8)
        draw = lambda seed: lambda z: torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        one, two, other = (sde(self.velocity, z0, uniform_times(5), noise=draw(s)) for s in (1, 1, 2))
        assert torch.equal(one, two) and not torch.allclose(one, other)
