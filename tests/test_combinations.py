"""The benchmark of subjects in styles that were not seen with them: its parts by themselves, and the whole on a tiny model."""

import colorsys
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowt2i.evaluation.nets import has_efficientnet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def combinations(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("combinations")


def test_subject_and_style_part_at_the_last_comma(combinations):
    assert combinations.parted("family: woman, boy, boy, twitter emoji style") == ("family: woman, boy, boy", "twitter emoji style")


def test_the_judge_of_styles_learns_what_parts_them_and_is_the_same_each_time(combinations, monkeypatch):
    judge = importlib.import_module("style_judge")
    monkeypatch.setattr(judge, "STEPS", 40)
    random = np.random.default_rng(0)
    labels = torch.arange(96) % 2
    images = random.integers(0, 256, (96, 32, 32, 3), np.uint8)
    images[1::2] = images[1::2].mean((1, 2), keepdims=True).astype(np.uint8)  # one style is noise, the other flat
    net = judge.trained(images[:64], labels[:64], 2)
    assert (judge.seen(net, images[64:]) == labels[64:]).float().mean() > 0.9
    torch.rand(1)  # what was drawn before does not matter
    again = judge.trained(images[:64], labels[:64], 2)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(judge.trained(images[:64], labels[:64], 2, seed=1)[0].weight, net[0].weight)


def test_a_picture_is_looked_for_among_those_of_its_style_only(combinations):
    pictures = torch.eye(4, dtype=torch.float64)
    queries = torch.tensor([[1.0, 0, 3, 0], [1.0, 2, 0, 0], [0, 0, 0.1, 0], [5.0, 0, 0, 1]], dtype=torch.float64)
    assert combinations.found_first(queries, pictures, [0, 1, 2, 3], ["a", "a", "b", "b"]) == [True, True, True, True]
    assert combinations.found_first(queries, pictures, [0, 1, 2, 3], ["a", "a", "a", "a"]) == [False, True, True, False]


def test_blur_keeps_the_mean_and_takes_the_edges(combinations):
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, :, 32:] = 200
    soft = combinations.blurred(image)
    assert soft.shape == image.shape and abs(float(soft.mean()) - 100) < 1 and np.abs(np.diff(soft[0, 32, :, 0].astype(int))).max() < 60


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A dataset of 48 subjects in two styles: a disc of some colour and place, whole or a ring."""
    from PIL import Image, ImageDraw

    from flowt2i.data.options import PrepareOptions
    from flowt2i.data.prepare import prepare

    folder = tmp_path_factory.mktemp("pairs")
    for subject in range(48):
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(subject / 48, 0.8, 0.9))
        x, y = 12 + 5 * (subject % 6), 12 + 5 * (subject // 8)
        for style in ("whole", "ring"):
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).ellipse((x - 10, y - 10, x + 10, y + 10), fill=colour if style == "whole" else None, outline=colour, width=3)
            image.save(folder / f"{subject}-{style}.png")
            (folder / f"{subject}-{style}.txt").write_text(f"disc, number {subject}, {style} style")
    out = tmp_path_factory.mktemp("data") / "pairs"
    prepare(PrepareOptions(sources=[str(folder)], out=out, heldout=0.45, workers=1), progress=False)
    return out


@pytest.mark.slow
@pytest.mark.skipif(not has_efficientnet(), reason="EfficientNet-lite0 is not installed")
def test_the_whole_on_a_tiny_model(combinations, trained, pairs, tmp_path, capsys):
    run = trained(pairs, "--train.steps", "4")
    words = ["--model", str(run), "--data", str(pairs), "--name", "t", "--seed", "1", "--no-copies", "--results", str(tmp_path)]
    combinations.main(words)
    told = json.loads((tmp_path / "combinations-t-seed1.json").read_text())
    assert told["seed"] == 1 and "seed 1" in told["protocol"]
    assert told["n"] >= 32 and told["frechet"]["drawn"] > told["frechet"]["floor"] > 0 and "heldout captions" in told["protocol"]
    # real pictures can be told by their style; these drawings, noise after four steps, by nothing
    assert told["style"]["real"]["accuracy"] > 0.9 and told["subject"]["real, blurred"]["accuracy"] > 2 * told["subject"]["drawn"]["accuracy"]
    assert (tmp_path / "combinations-t-seed1.png").exists() and "subject found first" in (tmp_path / "combinations-t-seed1.md").read_text()
    assert "kernel distance" in capsys.readouterr().out


@pytest.mark.skipif(not has_efficientnet(), reason="EfficientNet-lite0 is not installed")
def test_what_cannot_be_measured_is_one_line(combinations, tiny_run, scenes_data, pairs, tmp_path, one_line):
    told = importlib.import_module("ending").told(combinations.main)
    ask = lambda data, *more: told(["--model", str(tiny_run), "--data", str(data), "--results", str(tmp_path), *more])
    assert ask(scenes_data) == 2 and "100 at least (--heldout)" in one_line()
    assert ask(scenes_data, "--no-copies") == 2 and "a few styles" in one_line()
    assert ask(pairs) == 2 and "was trained on" in one_line()
