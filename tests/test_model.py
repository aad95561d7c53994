"""The transformer: shapes, sizes, masking, initial state, gradients."""

import pytest
import torch

from flowt2i.config import ModelConfig, resolve
from flowt2i.errors import UserError
from flowt2i.model import CaptionEncoder, FlowTransformer, Neighbours, attend, count_parameters, mask_bias, rotate
from flowt2i.positions import rotation_2d, sincos_2d

TINY = {"width": 64, "depth": 2, "heads": 2, "time_width": 32, "text_width": 32, "text_depth": 1, "bottleneck": 16}


def tiny(block="modern", kind="pixels", shape=(3, 32, 32), text_dim=0, seed=0, **changes):
    torch.manual_seed(seed)
    config = ModelConfig(block=block, **TINY | changes).resolve(kind, shape)
    return FlowTransformer(config, shape, text_dim, 50, [0.4] * shape[0], [0.6] * shape[0])


def shake(model):
    """Give every weight a value, so that zero-initialised branches speak too."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    return model.eval()


def test_seed_architecture_has_its_promised_size():
    config = resolve("seed").model
    assert (config.depth, config.width, config.heads) == (12, 768, 12)
    with torch.device("meta"):
        model = FlowTransformer(config.resolve("vae", (4, 8, 8)), (4, 8, 8), 512)
    counts = count_parameters(model)
    assert 110e6 < counts["total"] < 130e6
    assert counts["total"] == sum(p.numel() for p in model.parameters()) == sum(v for k, v in counts.items() if k != "total")
    assert model.rows * model.columns == 64
    for part in ("self-attention", "cross-attention", "image MLP", "text MLP", "AdaLN"):
        assert counts[part] > 10e6


@pytest.mark.parametrize("preset", ["stability", "quickstart"])
def test_presets_make_64_tokens_of_64_pixels(preset):
    config = resolve(preset).model
    with torch.device("meta"):
        pixels = FlowTransformer(config.resolve("pixels", (3, 64, 64)), (3, 64, 64), 0, 4096, [0.4] * 3, [0.6] * 3)
        latents = FlowTransformer(config.resolve("vae", (4, 8, 8)), (4, 8, 8), 512)
    assert pixels.rows * pixels.columns == latents.rows * latents.columns == 64
    assert (pixels.config.prediction, latents.config.prediction) == ("x", "v")


@pytest.mark.parametrize("block", ["modern", "seed"])
@pytest.mark.parametrize("kind, shape, text_dim, masks", [("pixels", (3, 32, 32), 0, 0), ("pixels", (3, 32, 32), 0, 3), ("vae", (4, 8, 8), 24, 3)])
def test_shapes_and_gradients_reach_every_parameter(block, kind, shape, text_dim, masks):
    model = shake(tiny(block, kind, shape, text_dim, masks=masks, pixel_masks=masks, negatives=masks > 0))
    assert hasattr(model, "masks") == hasattr(model, "slopes") == (masks > 0 and kind == "pixels"), "a latent's patch is no picture with outlines"
    z, t, mask = torch.randn(3, *shape), torch.rand(3), torch.ones(3, 5, dtype=torch.bool)
    text = torch.randn(3, 5, text_dim) if text_dim else model.encode_captions(torch.randint(0, 50, (3, 5)), mask)
    out = model(z, t, text, mask)
    assert out.shape == z.shape
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("block", ["modern", "seed"])
def test_padding_changes_nothing(block):
    model = shake(tiny(block))
    ids = torch.randint(0, 50, (2, 5))
    longer = torch.cat([ids, torch.randint(0, 50, (2, 7))], 1)
    mask, longer_mask = torch.ones(2, 5, dtype=torch.bool), torch.arange(12).expand(2, 12) < 5
    z, t = torch.randn(2, 3, 32, 32), torch.rand(2)
    short = model(z, t, model.encode_captions(ids, mask), mask)
    padded = model(z, t, model.encode_captions(longer, longer_mask), longer_mask)
    assert torch.allclose(short, padded, atol=1e-5)


@pytest.mark.parametrize("block", ["modern", "seed"])
def test_caption_and_time_matter_once_trained(block):
    model = shake(tiny(block))
    z, mask = torch.randn(1, 3, 32, 32), torch.ones(1, 3, dtype=torch.bool)
    run = lambda ids, t: model(z, torch.tensor([t]), model.encode_captions(torch.tensor([ids]), mask), mask)
    assert not torch.allclose(run([1, 2, 3], 0.5), run([1, 2, 4], 0.5), atol=1e-4)
    assert not torch.allclose(run([1, 2, 3], 0.5), run([3, 2, 1], 0.5), atol=1e-5), "word order must be seen"
    assert not torch.allclose(run([1, 2, 3], 0.5), run([1, 2, 3], 0.9), atol=1e-4)


def test_untrained_model_puts_out_zero():
    model = tiny()
    mask = torch.ones(2, 3, dtype=torch.bool)
    out = model(torch.randn(2, 3, 32, 32), torch.rand(2), model.encode_captions(torch.zeros(2, 3, dtype=torch.int64), mask), mask)
    assert torch.all(out == 0)


def test_a_mask_is_painted_in_its_colour():
    """Against patches put together pixel by pixel; their order is that of `unpatchify`. The last mask is one that looks at its pixel."""
    model = shake(tiny(masks=2, pixel_masks=1))
    x, z, p = torch.randn(1, 16, 64), torch.randn(1, 3, 32, 32), 8
    picture = model.unpatchify(model.patches(x, model.patchify(z)), 32, 32) - model.unpatchify(model.unembed(x), 32, 32)
    masks, colours, slopes = model.masks(x).view(16, 3, p, p), model.colours(x).view(16, 3, 3), model.slopes(x).view(16, 3)
    for place, row, column, channel in [(0, 0, 0, 0), (5, 3, 7, 1), (15, 7, 2, 2)]:
        y, x_ = place // 4 * p + row, place % 4 * p + column
        looking = torch.tanh(masks[place, 2, row, column] + slopes[place] @ z[0, :, y, x_])
        painted = sum(masks[place, k, row, column] * colours[place, k, channel] for k in range(2)) + looking * colours[place, 2, channel]
        assert torch.isclose(picture[0, channel, y, x_], painted, atol=1e-5)


@pytest.mark.parametrize("kinds", [{"masks": 2}, {"pixel_masks": 2}])
def test_masks_are_without_effect_at_the_start(kinds):
    with_masks, without = tiny(**kinds), tiny()
    assert with_masks.colours.weight.count_nonzero() == 0 and not hasattr(without, "masks")
    with torch.no_grad():
        without.unembed.weight.normal_()
        with_masks.load_state_dict(without.state_dict(), strict=False)
    x, noisy = torch.randn(2, 16, 64), torch.randn(2, 16, 192)
    assert torch.equal(with_masks.patches(x, noisy), without.patches(x, noisy))


def test_patches_come_back_where_they_were():
    model, z = tiny(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model.unpatchify(model.patchify(z), 32, 32), z)


def test_written_out_attention_equals_torchs():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 3, 7, 16, generator=g), torch.randn(2, 3, 9, 16, generator=g), torch.randn(2, 3, 9, 16, generator=g)
    mask = torch.rand(2, 9, generator=g) < 0.7
    ours = attend(q, k, v, mask_bias(mask))
    assert torch.allclose(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]), atol=1e-5)


def test_rotation_makes_attention_see_distances_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 32, generator=g), torch.randn(1, 1, 1, 32, generator=g)
    turn = rotation_2d(4, 4, 32)
    at = lambda row, column: turn[:, row * 4 + column].unsqueeze(1)
    score = lambda a, b: (rotate(q, at(*a)) * rotate(k, at(*b))).sum()
    assert torch.isclose(score((0, 1), (1, 3)), score((2, 0), (3, 2)), atol=1e-5)
    assert not torch.isclose(score((0, 1), (1, 3)), score((0, 1), (1, 2)), atol=1e-2)
    assert torch.equal(rotate(q, None), q)


def test_positions_tell_all_places_apart():
    positions = sincos_2d(8, 8, 64)
    distances = torch.cdist(positions, positions) + torch.eye(64) * 9
    assert positions.shape == (64, 64) and distances.min() > 0.5


@pytest.mark.parametrize("change", [{"heads": 5}, {"patch": 3}, {"width": 66, "heads": 1}])
def test_sizes_that_do_not_divide_are_refused(change):
    with pytest.raises(UserError):
        ModelConfig(**{**TINY, **change}).resolve("pixels", (3, 64, 64))


def test_neighbours_are_a_depthwise_convolution() -> None:
    torch.manual_seed(0)
    mix, x = Neighbours(8, 5).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.arange(9)[None, :, None] < torch.tensor([9, 6])[:, None, None]
    weight = mix.weight.permute(2, 1, 0)  # [width, 1, window]
    wanted = x + torch.nn.functional.conv1d((x * mask).transpose(1, 2), weight, padding=2, groups=8).transpose(1, 2)
    torch.testing.assert_close(mix(x, mask), wanted)


@pytest.mark.parametrize("window", [0, 7])
def test_padding_a_caption_changes_none_of_its_features(window: int) -> None:
    torch.manual_seed(0)
    encoder = CaptionEncoder(11, 32, 2, window)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(11, (2, 6))
    short = encoder(ids, torch.ones(2, 6, dtype=torch.bool))
    padded = encoder(torch.cat([ids, torch.full((2, 3), 10)], 1), torch.arange(9).expand(2, 9) < 6)
    torch.testing.assert_close(padded[:, :6], short)


def test_an_even_window_of_words_is_refused() -> None:
    with pytest.raises(UserError, match="text_window 4 must be odd"):
        ModelConfig(text_window=4).resolve("pixels", (3, 64, 64))
