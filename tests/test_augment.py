"""Augmentation that does not leak: the warp does what its label says, and the model is told."""

import json

import pytest
import torch

from flowt2i import augment
from flowt2i.bench.step import describe
from flowt2i.config import load_config, resolve
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.model import FlowTransformer
from flowt2i.pipeline import Pipeline
from flowt2i.training import stream
from flowt2i.training.loop import Trainer, train


def log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def fit(data, run, *words):
    train(resolve("quickstart", words), data, run, progress=False)
    return run


def label(mirrored=0.0, log_scale=0.0, angle=0.0, right=0.0, down=0.0):
    a = torch.tensor(angle, dtype=torch.float64)
    return torch.tensor([[mirrored, log_scale, a.cos() - 1, a.sin(), right, down]], dtype=torch.float64)


@pytest.fixture
def picture():
    return torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_nothing_done_is_nothing_changed(picture):
    assert augment.warp(picture, label()) is picture
    both = torch.cat([label(), label(right=0.25)])
    assert torch.equal(augment.warp(picture.repeat(2, 1, 1, 1), both)[0], picture[0])


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_mirrored(shape):
    x = torch.rand(1, 3, *shape, dtype=torch.float64)
    assert torch.allclose(augment.warp(x, label(mirrored=1)), x.flip(-1), atol=1e-9)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_shifted_right_and_down_in_sides_of_the_picture(shape):
    x = torch.rand(1, 3, *shape, dtype=torch.float64)
    moved = augment.warp(x, label(right=0.25, down=0.5))
    height, width = shape
    assert torch.allclose(moved[..., height // 2 :, width // 4 :], x[..., : height // 2, : width - width // 4], atol=1e-9)
    corners = x[..., [0, 0, -1, -1], [0, -1, 0, -1]].mean(-1)
    assert torch.allclose(moved[..., 0, 0], corners, atol=1e-9)  # what comes in


def test_turned_by_a_quarter(picture):
    quarter = augment.warp(picture, label(angle=torch.pi / 2))
    assert torch.allclose(quarter, torch.rot90(picture, -1, (2, 3)), atol=1e-6)  # clockwise


def test_turning_keeps_proportions_of_a_wide_picture():
    x = torch.zeros(1, 1, 32, 64, dtype=torch.float64)
    x[..., 12:20, 28:36] = 1  # a square in the middle
    turned = augment.warp(x, label(angle=torch.pi / 2))
    assert torch.allclose(turned, x, atol=1e-6)


def test_scaled_up_shows_the_middle(picture):
    large = augment.warp(picture, label(log_scale=1.0))
    wanted = torch.nn.functional.interpolate(picture[..., 3:13, 3:13], scale_factor=2, mode="bilinear", align_corners=False)[..., 2:-2, 2:-2]
    assert torch.allclose(large, wanted, atol=1e-6)


def test_mirroring_comes_first_then_scale_turn_and_shift(picture):
    steps = picture
    for one in (label(mirrored=1), label(angle=torch.pi / 2), label(right=0.25)):
        steps = augment.warp(steps, one)
    together = augment.warp(picture, label(mirrored=1, angle=torch.pi / 2, right=0.25))
    assert torch.allclose(together[..., 4:], steps[..., 4:], atol=1e-6)


def test_shares_and_sizes():
    numbers = torch.rand(20_000, augment.NUMBERS, generator=torch.Generator().manual_seed(0))
    found = augment.labels(numbers, 0.2)
    assert torch.equal(found, augment.labels(numbers, 0.2)) and not augment.labels(numbers, 0.0).any()
    assert found.ne(0).float().mean(0).tolist() == pytest.approx([0.2] * 6, abs=0.01)
    assert found.eq(0).all(1).float().mean().item() == pytest.approx(0.8**4, abs=0.01)
    shifts = found[found[:, 4] != 0, 4]
    assert shifts.std().item() == pytest.approx(augment.SHIFT, rel=0.05) and shifts.mean().abs() < 0.01


def test_the_random_numbers_of_runs_before_it_are_as_they_were():
    draw = stream.draw(3, 5, 4, (1, 2, 2), 0.5, False, torch.device("cpu"))
    assert draw.numbers.shape == (4, augment.NUMBERS)
    assert draw.choice.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0], abs=1) and draw.dropped.shape == (4,)


def test_a_model_that_is_told_nothing_draws_as_one_without_the_input(scenes_data, tiny, tmp_path):
    config = resolve("quickstart", [*tiny, "--data.augment", "0.3"])
    assert config.model.augmented
    torch.manual_seed(0)
    model = FlowTransformer(config.model.resolve("pixels", (3, 64, 64)), (3, 64, 64), 0, 50).eval()
    torch.nn.init.normal_(model.augmented.weight)
    torch.nn.init.normal_(model.unembed.weight)
    torch.nn.init.normal_(model.final_adaln.weight)
    z, t, mask = torch.randn(2, 3, 64, 64), torch.tensor([0.2, 0.7]), torch.ones(2, 3, dtype=torch.bool)
    text = model.encode_captions(torch.tensor([[4, 5, 6], [7, 8, 9]]), mask)
    plain, zero = model(z, t, text, mask), model(z, t, text, mask, torch.zeros(2, augment.LABELS))
    told = model(z, t, text, mask, augment.labels(torch.zeros(2, augment.NUMBERS), 0.5))
    assert torch.equal(plain, zero) and not torch.allclose(plain, told, atol=1e-3)


def test_training_warps_tells_and_goes_on(scenes_data, tiny, tmp_path):
    words = [*tiny, "--train.steps", "2", "--data.augment", "0.5"]
    trainer = Trainer(resolve("quickstart", words), scenes_data, tmp_path / "look", progress=False)
    draw, t = trainer.draw(0)
    seen = []

    def module(data, noise, t, text, mask, labels):
        seen.append((data, labels))
        return trainer.objective(data, noise, t, text, mask, labels)

    batch = next(trainer._fetched())
    data, _ = trainer.forward(module, batch, draw, t, slice(0, len(batch.mask)))
    labels = augment.labels(draw.numbers[: len(batch.mask)], 0.5)
    assert torch.equal(seen[0][1], labels) and torch.equal(seen[0][0], augment.warp(trainer.latents(batch, None), labels)) and torch.equal(data, seen[0][0])
    trainer.close()

    run = fit(scenes_data, tmp_path / "run", *words)
    assert load_config(run / "config.json").model.augmented and len(Pipeline.from_pretrained(run)("a red circle", steps=1)) == 1
    fit(scenes_data, tmp_path / "plain", *tiny, "--train.steps", "2")
    assert log(run)[1]["loss"] != log(tmp_path / "plain")[1]["loss"]


def test_a_model_without_the_input_can_be_gone_on_with(scenes_data, tiny, tmp_path):
    from flowt2i.cli import main

    plain = fit(scenes_data, tmp_path / "plain", *tiny, "--train.steps", "2")
    words = ["--data", str(scenes_data), "--out", str(tmp_path / "more"), "--init", str(plain), *tiny, "--train.steps", "1", "--data.augment", "0.2"]
    main(["train", "--config", "quickstart", *words])
    before, after = ImageTextDataset(scenes_data, "train"), load_config(tmp_path / "more" / "config.json")
    assert after.model.augmented and len(before)
    # and one with it, without augmentation: it keeps the input
    main(
        [
            "train",
            "--config",
            "quickstart",
            "--data",
            str(scenes_data),
            "--out",
            str(tmp_path / "less"),
            "--init",
            str(tmp_path / "more"),
            *tiny,
            "--train.steps",
            "1",
        ]
    )
    assert load_config(tmp_path / "less" / "config.json").model.augmented


def test_latents_and_contradictions_are_refused(scenes_data, monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(DatasetDescription, "load", lambda folder: describe(True, 9))
    with pytest.raises(UserError, match=r"data\.augment works on pixels only"):
        Trainer(resolve("quickstart", [*tiny, "--data.augment", "0.1"]), scenes_data, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="drop one of the two"):
        resolve("quickstart", ["--data.augment", "0.1", "--model.augmented", "false"])
