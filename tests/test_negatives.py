"""`model.negatives`: dark pictures drawn as their negatives."""

import pytest
import torch

from flowt2i import negatives
from flowt2i.config import ModelConfig
from flowt2i.flow import to_velocity
from flowt2i.model import FlowTransformer
from flowt2i.negatives import DARK, LIGHT, UNSEEN

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
GREY = negatives.mid_grey(MEAN, STD).view(1, 3, 1, 1)
ALL_DARK = torch.tensor([DARK])


def test_mid_grey_is_zero_of_pixels_and_the_negative_of_white_is_black():
    pixels = lambda level: (torch.full((1, 3, 2, 2), level) - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert torch.allclose(pixels(0.0), GREY.expand(1, 3, 2, 2))
    assert torch.allclose(negatives.mirrored(pixels(1.0), GREY, ALL_DARK), pixels(-1.0), atol=1e-6)


def test_the_noisy_negative_is_the_negative_under_the_mirrored_noise():
    x, n, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8])
    noisy = lambda x, n: (1 - t).view(2, 1, 1, 1) * n + t.view(2, 1, 1, 1) * x
    shown = negatives.shown(noisy(x, n), t, GREY, torch.tensor([DARK, DARK]))
    assert torch.allclose(shown, noisy(negatives.mirrored(x, GREY, ALL_DARK), -n), atol=1e-6)


def test_side_is_that_of_the_mean_once_it_can_be_seen():
    x = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4) + GREY
    t = torch.tensor([0.5, 0.5, 0.01])
    z = t.view(3, 1, 1, 1) * x  # without its noise
    side = negatives.side_of(z, t, GREY, 0.03)
    assert side.tolist() == [DARK, LIGHT, UNSEEN]
    shown = negatives.shown(z, t, GREY, side)
    assert torch.equal(shown[1], z[1]) and torch.allclose(shown[0], z[1], atol=1e-6), "dark is shown as if it were light"
    assert torch.allclose(shown[2].mean((1, 2)), torch.zeros(3), atol=1e-6), "nearest the noise a mean is chance"


def test_more_pixels_are_seen_sooner_at_equal_noise_of_their_mean():
    assert negatives.seen_from(64, 64) == pytest.approx(0.03)
    for height, width in [(32, 32), (64, 128), (256, 256)]:
        t = negatives.seen_from(height, width)
        assert (1 - t) / t / (height * width) ** 0.5 == pytest.approx(0.97 / 0.03 / 64)


def network(**changes) -> FlowTransformer:
    tiny = {"width": 64, "depth": 2, "heads": 2, "time_width": 32, "text_width": 64, "text_depth": 1, "bottleneck": 32, "negatives": True} | changes
    torch.manual_seed(0)
    model = FlowTransformer(ModelConfig(**tiny).resolve("pixels", (3, 32, 32)), (3, 32, 32), 0, 50, MEAN, STD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("block", ["modern", "seed"])
@pytest.mark.parametrize("prediction", ["x", "v"])
def test_a_network_that_is_not_told_draws_the_negative_of_what_it_draws(prediction, block):
    model = network(prediction=prediction, block=block, masks=2, pixel_masks=2)
    z, t = torch.randn(4, 3, 32, 32), torch.tensor([0.1, 0.3, 0.6, 0.9])
    mask = torch.ones(4, 5, dtype=torch.bool)
    text = model.encode_captions(torch.randint(0, 50, (4, 5)), mask)
    field = lambda z: to_velocity(model(z, t, text, mask), z, t, prediction)
    other = negatives.mirrored(z, t.view(4, 1, 1, 1) * GREY, ALL_DARK)
    assert (negatives.side_of(z, t, GREY, 0.05) + negatives.side_of(other, t, GREY, 0.05)).tolist() == [LIGHT + DARK] * 4
    negative = lambda: negatives.mirrored(field(z), GREY, ALL_DARK)  # v = x - n becomes (2g - x) + n = 2g - v
    assert not torch.allclose(field(other), negative(), atol=1e-3), "told what it is shown, it can name colours"
    with torch.no_grad():
        model.side_table.zero_()
    assert torch.allclose(field(other), negative(), atol=1e-3)


def test_nearest_the_noise_the_mean_of_the_noise_says_nothing():
    model = network()
    z, mask = torch.randn(1, 3, 32, 32), torch.ones(1, 5, dtype=torch.bool)
    text = model.encode_captions(torch.randint(0, 50, (1, 5)), mask)
    ask = lambda z, t: model(z, torch.tensor([t]), text, mask)
    brighter = z + torch.tensor([0.1, 0.0, -0.2]).view(1, 3, 1, 1)
    assert torch.allclose(ask(z, 0.01), ask(brighter, 0.01), atol=1e-4)
    assert not torch.allclose(ask(z, 0.1), ask(brighter, 0.1), atol=1e-3)


def test_another_size_is_seen_from_the_time_of_its_own():
    """64 x 64 pixels of a network for 32 x 32: at t between the two thresholds nothing is seen, as it has learned."""
    model = network()
    assert model.seen_from == negatives.seen_from(32, 32) > 0.04 > negatives.seen_from(64, 64)
    z, mask = torch.randn(1, 3, 64, 64), torch.ones(1, 5, dtype=torch.bool)
    ask = lambda z: model(z, torch.tensor([0.04]), model.encode_captions(torch.zeros(1, 5, dtype=torch.int64), mask), mask)
    assert torch.allclose(ask(z), ask(z + 0.3), atol=1e-3)


def test_without_the_statistics_of_its_pixels_it_is_not_made():
    with pytest.raises(ValueError, match="mean and std"):
        FlowTransformer(ModelConfig(negatives=True).resolve("pixels", (3, 32, 32)), (3, 32, 32), 0, 50)


def test_latents_have_no_negatives():
    assert not ModelConfig(negatives=True).resolve("vae", (4, 8, 8)).negatives
