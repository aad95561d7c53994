"""Positions: the same place of a picture at every number of patches, and a model that takes any of them."""

import math

import pytest
import torch

from flowt2i.config import ModelConfig
from flowt2i.model import FlowTransformer
from flowt2i.positions import places, resize_table, rotation_2d, sincos_1d, sincos_2d

TINY = {"width": 64, "depth": 2, "heads": 2, "time_width": 32, "text_width": 32, "text_depth": 1, "bottleneck": 16}


def make(shape=(3, 32, 32), **changes):
    torch.manual_seed(0)
    model = FlowTransformer(ModelConfig(**TINY, **changes).resolve("pixels", shape), shape, 24)
    with torch.no_grad():
        for p in model.parameters():  # zero-initialised branches speak too
            p += 0.05 * torch.randn(p.shape)
    return model.eval()


def inputs(height, width, batch=2):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 3, height, width, generator=g),
        torch.rand(batch, generator=g),
        torch.randn(batch, 5, 24, generator=g),
        torch.arange(5) < torch.tensor([[3]] * batch),
    )


def test_places_of_other_grids_lie_in_the_base_grid():
    of = lambda n: places(n, n)[1][:n].tolist()
    assert of(8) == list(range(8))
    assert of(4) == [0.5, 2.5, 4.5, 6.5]
    assert of(16)[:2] == [-0.25, 0.25] and of(16)[-1] == 7.25
    y, x = places(4, 16)  # a wide picture: square patches, the base grid's area and centre
    assert x[1] - x[0] == y[16] - y[0] == 1 and (x[0], x[15], y[0], y[-1]) == (-4, 11, 2, 5)


def test_the_base_grid_has_the_positions_it_always_had():
    """Bit for bit: models of 64-pixel pictures that were trained before other sizes were thought of."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    assert torch.equal(sincos_2d(8, 8, 64), torch.cat([sincos_1d(y, 32), sincos_1d(x, 32)], 1))
    angles = torch.cat([axis[:, None] * math.pi / 2 * 16 ** (-torch.arange(4, dtype=torch.float64) / 4) for axis in (y, x)], 1)
    assert torch.allclose(rotation_2d(8, 8, 16), torch.stack([angles.cos(), angles.sin()]).float(), atol=1e-7)


def test_a_patch_lies_in_the_middle_of_the_four_it_is_split_into():
    for coarse, fine in zip(places(4, 4), places(8, 8)):
        quarters = fine.view(4, 2, 4, 2).mean((1, 3)).flatten()
        assert torch.equal(coarse, quarters)


def test_a_table_is_resized_smoothly():
    table = torch.stack([axis.float() for axis in places(8, 8)], 1)
    assert torch.allclose(resize_table(table, (8, 8), (8, 8)), table, atol=1e-6)
    fine = resize_table(table, (8, 8), (16, 16)).view(16, 16, 2)
    inner = torch.stack(places(16, 16), 1).float().view(16, 16, 2)[4:-4, 4:-4]
    assert torch.allclose(fine[4:-4, 4:-4], inner, atol=1e-5)  # linear stays linear, away from the edge


@pytest.mark.parametrize("changes", [{}, {"positions": "sincos"}, {"block": "seed", "positions": "learned"}])
def test_a_model_takes_any_grid(changes):
    model = make(**changes)
    names = set(model.state_dict())
    for height, width in ((32, 32), (64, 64), (16, 16), (24, 48), (8, 8)):
        out = model(*inputs(height, width))
        assert out.shape == (2, 3, height, width) and out.isfinite().all()
    assert set(model.state_dict()) == names  # tables of other grids are no weights
    other = make((3, 64, 64), **changes)
    if changes.get("positions") != "learned":  # the weights know no size
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(*inputs(64, 64)), other(*inputs(64, 64)))


def test_tables_made_while_sampling_serve_training():
    model = make()
    with torch.inference_mode():
        model(*inputs(64, 64))
    model.requires_grad_(True)(*inputs(64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_export_leaves_nothing_behind():
    model, wide = make(), inputs(24, 48)
    program = torch.export.export(model, wide, strict=False)
    assert torch.allclose(program.module()(*wide), model(*wide), atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_takes_any_grid():
    torch.compiler.reset()
    model = make()
    compiled = torch.compile(model, fullgraph=True)
    for size in ((32, 32), (64, 64), (24, 48)):
        assert torch.allclose(compiled(*inputs(*size)), model(*inputs(*size)), atol=1e-4)
