"""The dial for the size of a model."""

import json

import pytest
import torch

from flowt2i import sizes
from flowt2i.cli import main
from flowt2i.config import PRESETS, resolve
from flowt2i.errors import UserError
from flowt2i.model import FlowTransformer, count_parameters


def printed(capsys, *words):
    assert main(["train", *words, "--print-config"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("preset", PRESETS)
def test_at_its_own_width_a_preset_is_itself(preset):
    config = resolve(preset)
    for name, value in sizes.settings(config.model.width, config).items():
        section, _, field = name.partition(".")
        assert config.model_dump()[section][field] == value, name


def test_nothing_is_rounded_at_the_own_width_and_no_small_batch_made_larger():
    odd = resolve("quickstart", ["--data.batch_size", "20", "--model.text_width", "32", "--optim.lr", "1.23456e-3"])
    found = sizes.settings(192, odd)
    assert tuple(found) == sizes.SET == tuple(sizes.settings(128, odd)) and (found["data.batch_size"], found["model.text_width"]) == (20, 32)
    assert found["optim.lr"] == 1.23456e-3
    assert [sizes.settings(128, resolve("quickstart", ["--data.batch_size", n]))["data.batch_size"] for n in ("1", "4")] == [1, 4]


def test_shape_and_caption_encoder_run_through_quickstart_and_stability():
    found, wanted = sizes.settings(768, resolve("quickstart")), resolve("stability").model_dump()
    assert all(wanted["model"][name.removeprefix("model.")] == value for name, value in found.items() if name.startswith("model."))


def test_every_width_is_a_model():
    for width in sizes.WIDTHS:
        model = sizes.at_width(width, resolve("quickstart"), resolve("quickstart").model)
        assert model.resolve("pixels", (3, 64, 64)).width == width and model.width // model.heads % 8 == 0


def test_small_sizes_keep_the_batch_that_was_found_for_them():
    preset = resolve("quickstart")
    assert [sizes.settings(width, preset)["data.batch_size"] for width in (64, 128, 192)] == [32, 32, 32]
    assert sizes.settings(128, preset, {"batch_size": 0.5})["data.batch_size"] == 16, "a sweep looks below it"
    small = resolve("quickstart", ["--data.batch_size", "8"])
    assert sizes.settings(128, small)["data.batch_size"] == 8 and sizes.settings(192, small)["data.batch_size"] == 8, "nor does it rise"


@pytest.mark.parametrize("preset", ["quickstart", "stability", "seed"])
@pytest.mark.parametrize("size", ["XS", "S", "M", "L"])
def test_the_count_of_parameters_is_near_the_models_own(preset, size):
    config = resolve(preset, sizes.words(size, resolve(preset), resolve(preset).model))
    with torch.device("meta"):
        model = FlowTransformer(config.model.resolve("pixels", (3, 64, 64)), (3, 64, 64), 0, 436, [0.0] * 3, [1.0] * 3)
    total = count_parameters(model)["total"]
    assert abs(sizes.parameters(config.model) / total - 1) < (0.12 if size == "XS" else 0.07)  # patches in and out are not in it


def test_a_number_of_parameters_comes_near_itself():
    preset = resolve("quickstart")
    for text, number in (("4M", 4e6), ("25m", 25e6), ("0.1B", 1e8), ("120,000,000", 1.2e8), ("3e8", 3e8)):
        assert abs(sizes.parameters(sizes.at_width(sizes.width_of(text, preset, preset.model), preset, preset.model)) / number - 1) < 0.15


def test_more_parameters_never_mean_less_width():
    preset = resolve("quickstart")
    counts = [sizes.parameters(sizes.at_width(width, preset, preset.model)) for width in sizes.WIDTHS]
    assert counts == sorted(counts)


def test_the_dial_sets_and_what_is_given_by_name_wins(capsys):
    config = printed(capsys, "--config", "quickstart", "--size", "m")
    assert config["model"]["width"] == 384 and config["data"]["batch_size"] > 32 and config["optim"]["lr"] < 1.5e-3
    assert config["model"]["mlp_ratio"] == 3 and config["flow"]["floor"] == 0.4, "the recipe stays the preset's"
    given = printed(capsys, "--config", "quickstart", "--size", "M", "--model.depth", "5", "--data.batch_size=48", "--optim.lr", "1e-3")
    assert (given["model"]["depth"], given["data"]["batch_size"], given["optim"]["lr"]) == (5, 48, 1e-3)
    assert given["model"]["width"] == 384


def test_no_size_changes_nothing(capsys):
    assert printed(capsys, "--config", "quickstart") == resolve("quickstart").model_dump()


@pytest.mark.parametrize("size", ["Q", "12", "9000B", "4Mx", "nan"])
def test_a_size_that_cannot_be_is_one_line(size, capsys):
    assert main(["train", "--size", size, "--print-config"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--size" in said


def test_doctor_does_not_leave_a_size_unheard(capsys):
    assert main(["doctor", "--size", "M"]) == 2
    assert "--config" in capsys.readouterr().err


def test_factors_multiply_laws():
    preset = resolve("quickstart")
    plain, halved = sizes.settings(384, preset), sizes.settings(384, preset, {"lr": 0.5, "depth": 2})
    assert halved["optim.lr"] == pytest.approx(plain["optim.lr"] / 2, rel=0.01) and halved["model.depth"] > 1.8 * plain["model.depth"]
    assert halved["optim.muon_lr"] == plain["optim.muon_lr"]
    with pytest.raises(UserError, match="parameters such as 25M"):
        sizes.words("huge", preset, preset.model)
