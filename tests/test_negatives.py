"""`model.negatives`: dark pictures drawn as their negatives."""

import pytest
import torch

from flowt2i import negatives
from flowt2i.config import ModelConfig
from flowt2i.flow import to_velocity
from flowt2i.model import FlowTransformer

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
GREY = negatives.mid_grey(MEAN, STD).view(1, 3, 1, 1)


def test_mid_grey_is_zero_of_pixels_and_the_negative_of_white_is_black():
    pixels = lambda level: (torch.full((1, 3, 2, 2), level) - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert torch.allclose(pixels(0.0), GREY.expand(1, 3, 2, 2))
    assert torch.allclose(negatives.mirrored(pixels(1.0), GREY, torch.tensor(-1.0)), pixels(-1.0), atol=1e-6)


def test_the_noisy_negative_is_the_negative_under_the_mirrored_noise():
    x, n, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), 0.3
    turn = torch.tensor(-1.0)
    noisy = negatives.mirrored((1 - t) * n + t * x, t * GREY, turn)
    assert torch.allclose(noisy, (1 - t) * -n + t * negatives.mirrored(x, GREY, turn), atol=1e-6)


def test_side_is_that_of_the_mean_once_it_can_be_seen():
    z = torch.tensor([-1.0, 1.0, 0.0, -1.0]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    assert negatives.side(z, torch.tensor([0.5, 0.5, 0.5, 0.01]), torch.zeros(4, 3, 1, 1)).flatten().tolist() == [-1, 1, 1, 1], "nearest the noise nobody knows"


def network(**changes) -> FlowTransformer:
    tiny = {"width": 64, "depth": 2, "heads": 2, "time_width": 32, "text_width": 64, "text_depth": 1, "bottleneck": 32, "negatives": True} | changes
    model = FlowTransformer(ModelConfig(**tiny).resolve("pixels", (3, 32, 32)), (3, 32, 32), 0, 50, MEAN, STD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("block", ["modern", "seed"])
@pytest.mark.parametrize("prediction", ["x", "v"])
def test_a_network_that_is_not_told_draws_the_negative_of_what_it_draws(prediction, block):
    model = network(prediction=prediction, block=block, masks=2, pixel_masks=2)
    z, t = torch.randn(4, 3, 32, 32), torch.rand(4).clamp(0.1, 0.9)
    middle = t.view(-1, 1, 1, 1) * GREY
    mask = torch.ones(4, 5, dtype=torch.bool)
    text = model.encode_captions(torch.randint(0, 50, (4, 5)), mask)
    field = lambda z: to_velocity(model(z, t, text, mask), z, t, prediction)
    other = negatives.mirrored(z, middle, torch.tensor(-1.0))
    assert set(negatives.side(z, t, middle).flatten().tolist()) <= {-1.0, 1.0} and torch.equal(negatives.side(other, t, middle), -negatives.side(z, t, middle))
    mirrored = lambda: negatives.mirrored(field(z), GREY, torch.tensor(-1.0))  # v = x - n becomes (2g - x) + n = 2g - v
    assert not torch.allclose(field(other), mirrored(), atol=1e-3), "told which it sees, it can name colours"
    with torch.no_grad():
        model.negative.zero_()
    assert torch.allclose(field(other), mirrored(), atol=1e-4)


def test_latents_have_no_negatives():
    assert not ModelConfig(negatives=True).resolve("vae", (4, 8, 8)).negatives
