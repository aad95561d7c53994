"""The mathematics of the flow, on cases with known answers."""

import numpy as np
import pytest
import torch

from flowt2i import flow


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 4, 4, generator=g), torch.randn(8, 3, 4, 4, generator=g), torch.rand(8, generator=g)


def test_path_ends(batch):
    data, noise, _ = batch
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(8)), noise)
    assert torch.allclose(flow.interpolate(data, noise, torch.ones(8)), data, atol=1e-6)


def test_velocity_is_the_paths_derivative(batch):
    data, noise, t = (x.double() for x in batch)
    h = 1e-6
    numeric = (flow.interpolate(data, noise, t + h) - flow.interpolate(data, noise, t - h)) / (2 * h)
    assert torch.allclose(numeric, flow.velocity_target(data, noise), atol=1e-8)


def test_data_and_velocity_are_two_views_of_one_answer(batch):
    data, noise, t = batch
    t = t * 0.95
    z = flow.interpolate(data, noise, t)
    velocity = flow.to_velocity(data, z, t, "x")
    assert torch.allclose(velocity, flow.velocity_target(data, noise), atol=1e-4)
    assert torch.allclose(flow.to_data(velocity, z, t), data, atol=1e-5)
    assert torch.equal(flow.to_velocity(data, z, t, "v"), data)


def test_loss_of_x_is_the_velocitys_loss_away_from_the_floor(batch):
    data, noise, t = batch
    t = t * 0.9
    guess = data + 0.1 * torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    z = flow.interpolate(data, noise, t)
    by_x = flow.velocity_error(guess, data, noise, t, "x")
    by_v = flow.velocity_error(flow.to_velocity(guess, z, t, "x"), data, noise, t, "v")
    assert torch.allclose(by_x, by_v, atol=1e-3) and torch.allclose(flow.loss_per_image(by_x), flow.loss_per_image(by_v), rtol=1e-3)
    assert torch.all(flow.velocity_error(data, data, noise, torch.ones(8), "x") == 0)


def test_loss_is_finite_at_the_data():
    data, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    assert torch.isfinite(flow.velocity_error(noise, data, noise, torch.tensor([1.0, 0.999]), "x")).all()


@pytest.mark.parametrize("across, down", [(0, 0), (1, 0), (0, 3), (5, 2), (16, 16)])
def test_edges_weigh_each_pattern_of_waves_by_how_fine_it_is(across, down):
    n = 32
    places = torch.arange(n * 8, dtype=torch.float64) * 2 * torch.pi / n  # eight periods: the one difference too few at the border is small
    waves = torch.cos(across * places)[None, :] * torch.cos(down * places)[:, None]
    error = waves.expand(2, 3, -1, -1) * torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1)
    factor = sum(4 * np.sin(np.pi * k / n) ** 2 for k in (across, down))
    assert torch.allclose(flow.edges_per_image(error), factor * flow.loss_per_image(error), rtol=0.02, atol=1e-9)


def test_edges_do_not_move_the_minimum():
    """Of pictures that may be either of two, the mean remains the best guess."""
    either = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guess = either.mean(0, keepdim=True).requires_grad_(True)
    (flow.loss_per_image(guess - either) + 7 * flow.edges_per_image(guess - either)).mean().backward()
    assert guess.grad.abs().max() < 1e-12


def test_times_follow_their_distribution():
    n = 20_000
    u, choice = (torch.arange(n) + 0.5) / n, torch.rand(n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.times(u, choice, "uniform"), u)
    t = flow.times(u, choice, "logit_normal", mean=0.5, std=0.8, uniform_share=0.0)
    logit = torch.logit(t.double())
    assert abs(logit.mean() - 0.5) < 0.01 and abs(logit.std() - 0.8) < 0.01
    mixed = flow.times(u, choice, "logit_normal", uniform_share=0.25)
    assert abs((mixed == u).float().mean() - 0.25) < 0.01
    extreme = flow.times(torch.tensor([0.0, 1.0]), torch.ones(2), "logit_normal")
    assert torch.isfinite(extreme).all() and (extreme > 0).all() and (extreme < 1).all()


def test_the_best_possible_network_moves_noise_to_gaussian_data():
    """For data N(m, s^2) the exact velocity is known; following it must give that distribution."""
    from flowt2i.schedules import uniform_times
    from flowt2i.solvers import heun

    m, s = 1.5, 0.3

    def velocity(z, t):  # E[data - noise | z_t = z] for jointly Gaussian data, noise and z
        variance = (1 - t) ** 2 + (t * s) ** 2
        return m + (t * s**2 - (1 - t)) / variance * (z - t * m)

    z = heun(velocity, torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64), uniform_times(100).double())
    assert abs(z.mean() - m) < 0.01 and abs(z.std() - s) < 0.01
