"""The count of operations by formula equals PyTorch's own count, product by product of forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowt2i.config import FlowConfig, ModelConfig
from flowt2i.flops import forward_flop, products, training_flop
from flowt2i.model import FlowTransformer
from flowt2i.training.objective import Objective

SMALL = {"width": 32, "depth": 3, "heads": 2, "time_width": 48, "text_width": 32, "text_depth": 2, "mlp_ratio": 3.0}
LATENTS, PIXELS = ("vae", (4, 8, 8)), ("pixels", (3, 16, 16))
CASES = [
    ({"block": "modern"}, LATENTS, 24),
    ({"block": "modern"}, PIXELS, 0),
    ({"block": "modern", "pooled_text": False, "bottleneck": 0}, PIXELS, 24),
    ({"block": "modern", "masks": 5}, PIXELS, 0),
    ({"block": "modern", "masks": 5}, LATENTS, 24),
    ({"block": "modern", "masks": 5, "pixel_masks": 2}, PIXELS, 0),
    ({"block": "seed", "pixel_masks": 2}, PIXELS, 0),
    ({"block": "modern", "masks": 5, "negatives": True}, PIXELS, 0),
    ({"block": "modern", "depth": 1, "patch": 2}, LATENTS, 0),
    ({"block": "seed", "positions": "learned"}, LATENTS, 24),
    ({"block": "seed", "positions": "learned"}, PIXELS, 0),
    ({"block": "seed", "depth": 1}, LATENTS, 24),
]


@pytest.mark.parametrize(("changes", "codec", "text_dim"), CASES)
def test_as_torch_counts(changes, codec, text_dim):
    kind, shape = codec
    config = ModelConfig(**SMALL | changes).resolve(kind, shape)
    model = FlowTransformer(config, shape, text_dim, 50, [0.0] * shape[0], [1.0] * shape[0])
    for parameter in model.parameters():  # zeros at the start would not change a count, but a branch that is cut off would
        torch.nn.init.normal_(parameter, std=0.1)
    images, tokens = 3, 7
    text = torch.randn(images, tokens, text_dim) if text_dim else torch.randint(2, 50, (images, tokens))
    data, mask = torch.randn(images, *shape), torch.ones(images, tokens, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        loss = Objective(model, FlowConfig(), "fp32")(data, torch.randn_like(data), torch.rand(images), text, mask).losses.mean()
    assert counter.get_total_flops() == images * forward_flop(config, shape, tokens, text_dim)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    total = counter.get_total_flops() + backward.get_total_flops()
    parts = training_flop(config, shape, [tokens], text_dim)
    assert total == pytest.approx(images * parts["total"], rel=1e-12)
    assert parts["total"] == pytest.approx(sum(value for name, value in parts.items() if name != "total"))


def test_mean_over_captions():
    config = ModelConfig(**SMALL).resolve("pixels", (3, 16, 16))
    of = lambda *lengths: training_flop(config, (3, 16, 16), lengths)["total"]
    assert of(3, 9, 9, 9) == pytest.approx((of(3) + 3 * of(9)) / 4) and of(3) < of(9)
    assert all(product.flop > 0 for product in products(config, (3, 16, 16), 5))
