"""Configuration: presets, overrides, and mistakes answered in one line."""

import json

import pytest

from flowt2i.config import NOT_SECTIONS, PRESETS, Config, load_config, resolve
from flowt2i.errors import UserError


def test_the_promised_presets():
    table = {name: (resolve(name).train.steps, resolve(name).data.batch_size) for name in PRESETS}
    assert table["stability"] == (30_000, 576)
    assert table["overfit"] == (5_000, 288)
    assert table["hparam_tuning"] == (5_000, 288)
    assert table["debug"] == (0, 288)
    assert table["full_scale"] == (300_000, 576)
    assert "quickstart" in table
    for name in PRESETS:
        config = resolve(name)
        assert config.train.eval_every in (1_000, 0) and (name == "quickstart" or config.train.eval_every == 1_000)
        if name != "quickstart":
            assert (config.optim.lr, config.optim.warmup, config.optim.warmup_from, config.optim.final) == (5e-4, 0.05, 0.1, 0.1)


def test_the_seeds_recipe_to_the_letter():
    seed = resolve("seed")
    assert (seed.model.block, seed.model.positions, seed.model.prediction) == ("seed", "learned", "v")
    assert (seed.flow.times, seed.optim.name, seed.train.ema, seed.sample.steps, seed.sample.solver) == (
        "uniform",
        "adamw",
        0.0,
        50,
        "euler",
    )


def test_overrides_are_typed():
    config = resolve(
        "quickstart",
        ["--train.steps", "60", "--optim.lr=3e-4", "--data.flip", "--sample.prompts", '["a", "b"]', "--flow.logit_mean", "-0.5"],
    )
    assert (config.train.steps, config.optim.lr, config.data.flip, config.sample.prompts, config.flow.logit_mean) == (
        60,
        3e-4,
        True,
        ["a", "b"],
        -0.5,
    )


@pytest.mark.parametrize(
    "words, told",
    [
        (["--optim.lrr", "1"], "optim.lr"),
        (["--trian.steps", "1"], "train.steps"),
        (["--train.steps", "many"], "train.steps"),
        (["--train.steps", "-1"], "train.steps"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optim.name", "sgd"], "optim.name"),
        (["--sample.prompts", "a red circle"], "JSON"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_named(words, told):
    with pytest.raises(UserError, match=told) as error:
        resolve("quickstart", words)
    assert "\n" not in str(error.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="'stability'"):
        resolve("stabilty")


def test_config_round_trips(tmp_path):
    config = resolve("overfit", ["--train.steps", "7"])
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert load_config(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text('{"train": {"stepz": 3}}')
    with pytest.raises(UserError, match="stepz"):
        load_config(tmp_path / "config.json")


def test_a_model_of_before_a_field_keeps_what_it_was(tmp_path):
    values = resolve("quickstart").model_dump()
    del values["model"]["text_window"], values["flow"]["perceptual_size"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = load_config(tmp_path / "config.json")
    assert found.model.text_window == 0 and found.flow == resolve("quickstart").flow
    values["flow"]["perceptual"] = 0.2
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path / "config.json").flow.perceptual_size == 0  # its loss saw pictures as they were
    for wrong in ("[]", '{"model": 3}', '{"flow": 3}'):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(UserError, match="is not a configuration"):
            load_config(tmp_path / "config.json")


def test_every_field_says_what_it_is_for():
    for name in (n for n in Config.model_fields if n not in NOT_SECTIONS):
        for field, info in type(getattr(Config(), name)).model_fields.items():
            assert info.description, f"{name}.{field}"


def test_a_number_of_steps_switches_the_presets_time_off():
    assert resolve("quickstart").train.minutes > 0
    assert (resolve("quickstart", ["--train.steps", "60"]).train.minutes, resolve("quickstart", ["--train.steps", "60"]).train.steps) == (0, 60)
    assert resolve("quickstart", ["--train.steps", "60", "--train.minutes", "2"]).train.minutes == 2


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_spreads_over_ranks(preset, world):
    from flowt2i.training.distributed import accumulation

    config = resolve(preset)
    micro, steps = accumulation(config.data.batch_size, config.train.micro_batch, world)
    assert micro * steps * world == config.data.batch_size and micro <= (config.train.micro_batch or config.data.batch_size)


def test_a_batch_that_cannot_be_spread_is_refused():
    from flowt2i.training.distributed import accumulation

    with pytest.raises(UserError, match="multiple of 5"):
        accumulation(288, 96, 5)
