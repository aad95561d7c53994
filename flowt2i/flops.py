"""How many operations a training image costs, by formula: the matrix products of the model's forward and backward pass.

A multiply-add is two operations. What is counted is what the mathematics asks for: captions at their own lengths (padding is no work), nothing that
is computed twice to save memory, no elementwise work. That makes "operations a second over the ceiling of matrix products" the share of the machine
that does what was asked for (model FLOP utilisation: Chowdhery et al., PaLM, 2204.02311, app. B).

The backward pass of a product `y = x W` has two of the same size: the gradient of W, and that of x. The second one is left out where nothing before x
is trained: the latents, the time features, the features of a frozen text encoder.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from flowt2i.config import ModelConfig
from flowt2i.model import swiglu_hidden

TIME_FEATURES = 256  # `model.time_features`


class Product(NamedTuple):
    """One kind of matrix product of the forward pass of an image."""

    part: str
    flop: int  # forward
    backward: int = 2  # products of the same size in the backward pass


def products(config: ModelConfig, shape: tuple[int, int, int], text_tokens: int, text_dim: int = 0) -> list[Product]:
    """The products of one image under a caption of `text_tokens` tokens.

    config: resolved (`ModelConfig.resolve`). shape: (C, H, W) of the latents. text_dim: width of a frozen encoder's features, 0 for the built-in encoder.
    """
    d, time, tokens = config.width, config.time_width, (shape[1] // config.patch) * (shape[2] // config.patch)
    values = shape[0] * config.patch**2
    frozen, text = text_dim > 0, text_dim or config.text_width

    def linear(part: str, rows: int, inner: int, outer: int, trained_before: bool = True) -> Product:
        return Product(part, 2 * rows * inner * outer, 2 if trained_before else 1)

    def attention(part: str, queries: int, keys: int, width: int) -> list[Product]:
        return [Product(part, 2 * queries * keys * width)] * 2  # scores, then values

    out = [] if frozen else caption_encoder(config, text_tokens)
    if config.bottleneck and config.bottleneck < values:
        out += [linear("patch embedding", tokens, values, config.bottleneck, False), linear("patch embedding", tokens, config.bottleneck, d)]
    else:
        out += [linear("patch embedding", tokens, values, d, False)]
    out += [linear("time embedding", 1, TIME_FEATURES, time, False), linear("time embedding", 1, time, time)]
    if config.block == "seed":
        hidden, text_hidden = int(d * config.mlp_ratio), int(text * config.mlp_ratio)
        for block in range(config.depth):
            out += [linear("AdaLN", 1, time, 6 * d)]
            out += [linear("self-attention", tokens, d, 4 * d), *attention("self-attention", tokens, tokens, d)]
            # A frozen encoder's features become something trained in the first block's text MLP.
            out += [linear("attention over the caption", text_tokens, text, 2 * d, not frozen or block > 0)]
            out += [linear("attention over the caption", tokens, d, 2 * d), *attention("attention over the caption", tokens, text_tokens, d)]
            out += [linear("image MLP", tokens, d, 2 * hidden)]
            if block < config.depth - 1:
                out += [linear("text MLP", text_tokens, text, 2 * text_hidden)]
    else:
        hidden = swiglu_hidden(d, config.mlp_ratio)
        out += [linear("text embedding", text_tokens, text, d)]  # behind a norm whose weight is trained
        if config.pooled_text:
            out += [linear("time embedding", 1, text, time, not frozen)]
        out += [linear("AdaLN", 1, time, 6 * d)]
        for _ in range(config.depth):
            out += [linear("self-attention", tokens, d, 4 * d), *attention("self-attention", tokens, tokens, d)]
            out += [linear("attention over the caption", text_tokens, d, 2 * d), *attention("attention over the caption", tokens, text_tokens, d)]
            out += [linear("image MLP", tokens, d, 3 * hidden)]
    # Masks, their colours and slopes; putting them together is elementwise.
    factors = (config.masks + config.pixel_masks) * (config.patch**2 + shape[0]) + config.pixel_masks * shape[0]
    return [*out, linear("AdaLN", 1, time, 2 * d), linear("output", tokens, d, values + factors)]


def caption_encoder(config: ModelConfig, text_tokens: int) -> list[Product]:
    """The products of the built-in encoder for one caption."""
    part, width = "caption encoder", config.text_width
    block = [Product(part, 2 * text_tokens * width * (4 * width + 3 * swiglu_hidden(width, 4)))]
    block += [Product(part, 2 * text_tokens**2 * width)] * 2
    return block * config.text_depth


def forward_flop(config: ModelConfig, shape: tuple[int, int, int], text_tokens: int, text_dim: int = 0) -> int:
    """Operations of one image's forward pass."""
    return sum(p.flop for p in products(config, shape, text_tokens, text_dim))


def training_flop(config: ModelConfig, shape: tuple[int, int, int], lengths: Sequence[int], text_dim: int = 0) -> dict[str, float]:
    """Operations of an image's forward and backward pass by part, and their sum under "total": the mean over captions of these lengths (tokens)."""
    parts: dict[str, float] = {}
    for length, count in Counter(lengths).items():
        for product in products(config, shape, length, text_dim):
            parts[product.part] = parts.get(product.part, 0.0) + count / len(lengths) * product.flop * (1 + product.backward)
    return parts | {"total": sum(parts.values())}
