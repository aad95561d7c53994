"""Guidance on toy fields: each formula, its limits, and what it costs."""

import pytest
import torch

from flowt2i import guidance
from flowt2i.config import SampleConfig
from flowt2i.guidance import conditional, extrapolate, guided, mean_kept, on_interval, rescale, together, zero_star
from flowt2i.settings import guide, resolve

G = torch.Generator().manual_seed(0)
GOOD, BAD, Z = (torch.randn(2, 3, 4, 4, generator=G) for _ in range(3))
T = torch.tensor(0.3)


def captions(value):
    return torch.full((2, 1, 1), float(value)), torch.ones(2, 1, dtype=torch.bool)


def plain(field, good, bad, scale):
    return guided(together(field, good, bad), lambda good, bad, z, t: extrapolate(good, bad, scale))


class Field:
    """A field whose velocity is the number in its caption; it notes the size of each call."""

    def __init__(self):
        self.sizes = []

    def __call__(self, z, t, text, mask):
        self.sizes.append(len(z))
        return text.view(-1, 1, 1, 1).expand_as(z)


def test_plain_guidance_scales_the_difference_in_one_batch():
    field, z = Field(), torch.zeros(2, 1, 2, 2)
    assert torch.all(plain(field, captions(3), captions(1), 2.0)(z, T) == 1 + 2 * (3 - 1))
    assert torch.all(plain(field, captions(3), captions(1), 1.0)(z, T) == conditional(field, *captions(3))(z, T))
    assert torch.all(plain(field, captions(3), captions(1), 0.0)(z, T) == 1)
    assert field.sizes == [4, 4, 2, 4]


def test_several_captions_in_one_batch_keep_their_places():
    field, z = Field(), torch.zeros(2, 1, 2, 2)
    for expected, velocity in zip((1, 2, 3), together(field, captions(1), captions(2), captions(3))(z, T)):
        assert velocity.shape == z.shape and (velocity == expected).all()
    assert field.sizes == [6]


def test_mean_kept_is_plain_but_for_the_mean_of_each_channel():
    found, plain = mean_kept(GOOD, BAD, 3.0), extrapolate(GOOD, BAD, 3.0)
    assert torch.allclose(found.mean((2, 3)), GOOD.mean((2, 3)), atol=1e-5) and not torch.allclose(plain.mean((2, 3)), GOOD.mean((2, 3)), atol=1e-2)
    about = lambda v: v - v.mean((2, 3), keepdim=True)
    assert torch.allclose(about(found), about(plain), atol=1e-5) and torch.allclose(mean_kept(GOOD, BAD, 1.0), GOOD, atol=1e-5)


def test_zero_star_projects():
    s = (GOOD.flatten(1) * BAD.flatten(1)).sum(1) / BAD.flatten(1).norm(dim=1) ** 2
    projected = s.view(-1, 1, 1, 1) * BAD
    assert torch.allclose(zero_star(GOOD, BAD, 3.0), (1 - 3.0) * projected + 3.0 * GOOD, atol=1e-5)  # as the paper writes it
    assert torch.allclose(zero_star(GOOD, BAD, 1.0), GOOD, atol=1e-6)
    assert torch.allclose(zero_star(2 * BAD, BAD, 7.0), 2 * BAD, atol=1e-4), "what differs in length alone is not amplified"
    assert torch.allclose(zero_star(GOOD, torch.zeros_like(BAD), 2.0), 2 * GOOD)
    alone = zero_star(GOOD[:1], BAD[:1], 3.0)
    assert torch.allclose(alone, zero_star(GOOD, BAD, 3.0)[:1]), "each picture by itself"


def test_rescaling_gives_back_the_contrast_of_the_unguided_prediction():
    pushed = extrapolate(GOOD, BAD, 5.0)
    x, x_good = Z + 0.7 * pushed, Z + 0.7 * GOOD
    x_new = Z + 0.7 * rescale(pushed, GOOD, Z, T, 1.0)
    over = (1, 2, 3)
    assert torch.allclose(x_new.std(over), x_good.std(over), rtol=1e-4) and torch.allclose(x_new.mean(over), x.mean(over), atol=1e-5)
    assert torch.equal(rescale(pushed, GOOD, Z, T, 0.0), pushed)
    half = Z + 0.7 * rescale(pushed, GOOD, Z, T, 0.5)
    assert torch.allclose(half, (x + x_new) / 2, atol=1e-5)
    assert torch.allclose(rescale(GOOD, GOOD, Z, T, 1.0), GOOD, atol=1e-5)


def test_an_interval_costs_one_evaluation_outside():
    field, z = Field(), torch.zeros(2, 1, 2, 2)
    velocity = on_interval(plain(field, captions(3), captions(1), 2.0), conditional(field, *captions(3)), 0.2, 0.6)
    values = [velocity(z, torch.tensor(t)).mean().item() for t in (0.0, 0.1, 0.2, 0.5, 0.6, 0.9)]
    assert values == [3, 3, 5, 5, 3, 3] and field.sizes == [2, 2, 4, 4, 2, 2]


def test_between_two_prompts_is_exact_at_the_ends():
    share = torch.tensor([0.0, 1.0]).view(-1, 1, 1, 1)
    mixed = guidance.between(GOOD, BAD, share)
    assert torch.equal(mixed[0], GOOD[0]) and torch.equal(mixed[1], BAD[1])


def test_a_weaker_model_guides_by_the_same_formula():
    velocity = guided(lambda z, t: (GOOD, BAD), lambda good, bad, z, t: extrapolate(good, bad, 2.0))
    assert torch.allclose(velocity(Z, T), 2 * GOOD - BAD)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"guidance": 1.0}, lambda: GOOD),
        ({"guidance": 3.0}, lambda: extrapolate(GOOD, BAD, 3.0)),
        ({"guidance": 3.0, "guidance_rule": "zero-star"}, lambda: zero_star(GOOD, BAD, 3.0)),
        ({"guidance": 3.0, "guidance_rule": "mean-kept"}, lambda: mean_kept(GOOD, BAD, 3.0)),
        ({"guidance": 3.0, "guidance_rescale": 0.7}, lambda: rescale(extrapolate(GOOD, BAD, 3.0), GOOD, Z, T, 0.7)),
        ({"guidance": 3.0, "guidance_from": 0.5}, lambda: GOOD),
        ({"guidance": 3.0, "guidance_until": 0.3}, lambda: GOOD),
        ({"guidance": 3.0, "guidance_from": 0.3}, lambda: extrapolate(GOOD, BAD, 3.0)),
    ],
)
def test_settings_choose_the_rule(settings, expected):
    velocity = guide(resolve(SampleConfig(), settings), lambda z, t: GOOD, lambda z, t: (GOOD, BAD))
    assert torch.equal(velocity(Z, T), expected())
