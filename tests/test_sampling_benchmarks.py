"""The scripts that compare ways of sampling: what one model drew is never taken for another's, and results say how they came about."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from flowt2i.evaluation.nets import has_efficientnet
from flowt2i.training import checkpoint
from flowt2i.training.compiling import has_compiler

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script, or runs it with words."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *words):
        module = importlib.import_module(name)
        if words:
            monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
            module.main()
        return module

    return run


@pytest.fixture
def few(script, monkeypatch):
    """Only some settings of each group, of few steps."""
    settings = script("sampling_settings")
    first, second = settings.BASE | {"steps": 1}, settings.BASE | {"steps": 2}
    panels = lambda **more: {"a panel": {"one": [first, second], "other": [second | more]}}
    kinds = {"solvers": panels(solver="ab2"), "schedules": panels(shift=3.0)}
    guided = lambda guides: panels(guidance=1.0) | {"away from": {name: [second | {"guidance": 2.0, "guide": str(path)}] for name, path in guides.items()}}
    monkeypatch.setattr(script("sampling"), "groups", lambda guides: kinds | {"guidance": guided(guides)})
    monkeypatch.setattr(script("sampling"), "FRECHET", [second])
    monkeypatch.setattr(script("sampling"), "TRIED", 16)
    return settings


@pytest.fixture
def measure(script, few, tmp_path, capsys):
    pytest.importorskip("matplotlib")

    def run(model, *more):
        script("sampling", "--model", model, "--name", "s", "--results", tmp_path, "--images", tmp_path, "--device", "cpu", *more)
        return json.loads((tmp_path / "sampling-s.json").read_text()), capsys.readouterr().out

    return run


def test_quality_on_scenes_with_paired_differences_and_a_plot_a_group(measure, tiny_run, tmp_path):
    from PIL import Image

    found, said = measure(tiny_run, "--num", 4)
    rows = {row["label"]: row for row in found["rows"]}
    plain = rows["euler 50 steps, guidance 3, shift 1"]
    guided = next(row for name, row in rows.items() if "guide step_00000002" in name)
    assert (plain["evaluations"], plain["num"], len(plain["hits"]), plain["settings"]) == (100, 4, 4, {})
    assert guided["evaluations"] == 4 and "distance" in plain and "distance" not in guided, "guided by other means it does not end where 100 steps do"
    assert guided["settings"]["guide"] == "step_00000002", "a name, no place on somebody's disk"
    assert found["date"] and found["machine"] and found["versions"]["torch"] and found["model"]["step"] == 4
    assert "7 of 7 settings to measure, 28 pictures" in said and "| euler 2 steps, guidance 1, shift 5 | 2 |" in said
    assert (tmp_path / "sampling-s.md").read_text() in said
    for group in ("solvers", "schedules", "guidance"):
        with Image.open(tmp_path / f"sampling-{group}-s.png") as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_it_goes_on_where_it_was_and_measures_another_model_anew(measure, tiny_run, tmp_path):
    early = checkpoint.folder(tiny_run, min(checkpoint.list_steps(tiny_run)))
    first = measure(tiny_run, "--num", 2, "--groups", "solvers")[0]["rows"]
    again, said = measure(tiny_run, "--num", 2, "--groups", "solvers,schedules")
    assert again["rows"][:4] == first and len(again["rows"]) == 5 and "1 of 5 settings to measure" in said
    assert "4 of 4 settings to measure" in measure(early, "--num", 2, "--groups", "solvers", "--estimate")[1]
    both = measure(early, "--num", 2, "--groups", "solvers")[0]["rows"]
    assert len(both) == 9 and len({row["key"] for row in both}) == 9


@pytest.mark.skipif(not has_efficientnet(), reason="no feature net")
def test_distances_are_those_of_evaluate(measure, few, script, tiny_run, scenes_data, monkeypatch):
    """On other data than scenes: the kernel distance, and the Fréchet distance where a setting tells much; here with a bound that a test can reach."""
    from flowt2i.description import DatasetDescription
    from flowt2i.evaluation import distribution, metrics
    from flowt2i.pipeline import Pipeline
    from flowt2i.training.distributed import World

    monkeypatch.setattr(DatasetDescription, "is_scenes", property(lambda self: False))
    monkeypatch.setattr(script("sampling"), "LEAST", 24)
    monkeypatch.setattr(distribution, "LEAST", 24)
    found, said = measure(tiny_run, "--num", 16, "--frechet-num", 24, "--groups", "schedules", "--data", scenes_data)
    rows = {row["label"]: row for row in found["rows"]}
    telling, other = rows["euler 2 steps, guidance 3, shift 5"], rows["euler 2 steps, guidance 3, shift 3"]
    assert (telling["num"], other["num"], "frechet" in other) == (24, 16, False)
    assert found["protocol"]["reference_of"] == f"{DatasetDescription.load(scenes_data).train_count} pictures, train" and found["protocol"]["floor"]["of"] == 24
    pipeline = Pipeline.from_pretrained(tiny_run, device="cpu")
    context = metrics.Context(World(0, 1, pipeline.device), 24, pipeline, scenes_data, settings=few.PLAIN | telling["settings"], real="train", progress=False)
    values = metrics.score(["frechet", "kid"], context).found
    assert telling["frechet"] == pytest.approx(values["frechet"].values["frechet-efficientnet-lite0-24@64"], rel=1e-6)
    assert telling["kid"] == pytest.approx(values["kid"].values["kid-efficientnet-lite0-24@64"], rel=1e-6)
    assert "kernel distance" in said


def test_names_of_lines_keep_apart(script):
    apart = script("sampling_plot")._apart
    placed = apart([1.0, 1.1, 5.0, 0.9], 1.0)
    assert placed[2] == 5.0 and np.allclose(np.diff(sorted(placed[:2] + placed[3:])), 1.0) and np.isclose(np.mean(placed[:2] + placed[3:]), 1.0)
    assert placed[3] < placed[0] < placed[1], "in their order"


def test_every_setting_can_be_drawn_and_the_default_is_the_presets(script):
    from flowt2i import settings as choices
    from flowt2i.config import SampleConfig, resolve

    module = script("sampling_settings")
    for panels in module.groups({"early": Path("early")}).values():
        for points in [points for lines in panels.values() for points in lines.values()]:
            costs = [module.cost(s) for s in points]
            assert costs == sorted(costs) and max(costs) < 400
            for settings in points:
                choices.resolve(SampleConfig(), {name: value for name, value in settings.items() if name != "guide"})
    own = resolve("quickstart").sample.model_dump()
    assert {name: own[name] for name in module.DEFAULT} == module.DEFAULT
    listed = [s for panels in module.groups({}).values() for lines in panels.values() for points in lines.values() for s in points]
    assert all(s in listed for s in module.FRECHET), "a Fréchet distance is taken of what is shown"


@pytest.mark.parametrize("wrong", [["--groups", "solver"], ["--frechet-num", "100"]])
def test_a_mistake_is_told_before_the_work(script, wrong, capsys):
    with pytest.raises(SystemExit):
        script("sampling", *wrong)
    assert "there are solvers, schedules, guidance" in (said := capsys.readouterr().err) or "2048 pictures" in said


def test_latency_of_ways_that_take_turns(script, tiny_run, tmp_path, monkeypatch, capsys):
    module = script("latency")
    monkeypatch.setattr(module, "has_compiler", lambda: False)  # compiling takes longer than a test may
    monkeypatch.setattr("flowt2i.precision.has_bf16", lambda device: True)
    monkeypatch.setattr(module, "PLAIN", module.PLAIN | {"steps": 3})
    script("latency", "--model", tiny_run, "--batches", 1, 2, "--repeats", 2, "--starts", 0, "--name", "s", "--results", tmp_path, "--device", "cpu")
    found = json.loads((tmp_path / "latency-s.json").read_text())
    assert [(row["pictures"], row["evaluations"], row["way"]) for row in found["drawings"]] == [
        (n, evaluations, way) for n in (1, 2) for evaluations in (16, 6) for way in ("eager fp32", "eager bf16")
    ]
    assert all(len(row["seconds"]) == 2 and row["median"] > 0 for row in found["drawings"]) and found["drawings"][0]["ratio"] == 1
    assert set(found["encoding"]) == {"1", "2"} and not found["starts"]
    assert capsys.readouterr().out.strip() == (tmp_path / "latency-s.md").read_text().strip()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no compiler")
def test_latency_of_a_compiled_network(script, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("flowt2i.precision.has_bf16", lambda device: False)
    script("latency", "--model", tiny_run, "--batches", 1, "--repeats", 1, "--starts", 1, "--name", "s", "--results", tmp_path, "--device", "cpu")
    found = json.loads((tmp_path / "latency-s.json").read_text())
    assert [row["way"] for row in found["drawings"][:3]] == ["eager fp32", "compiled fp32", "eager fp32"]
    assert set(found["starts"]) == {"eager", "compiled, the first time", "compiled, again"}
    assert set(found["starts"]["eager"]) == {"import", "load", "first picture", "second picture"}


def test_what_a_negative_prompt_keeps_away(script, tiny_run, tmp_path, monkeypatch, capsys):
    module = script("negative")
    assert len(prompts := module.asked(7)) == 7 and all("background" not in prompt for prompt in prompts)
    monkeypatch.setattr(module, "STEPS", (1, 2))
    script("negative", "--model", tiny_run, "--num", 1, "--name", "s", "--results", tmp_path, "--device", "cpu")
    found = json.loads((tmp_path / "negative-s.json").read_text())
    assert [row["evaluations"] for row in found["rows"]] == [2, 4] and found["pictures"] == 7
    assert all(row[what]["difference"]["n"] == 7 for row in found["rows"] for what in ("avoided", "right"))
    assert "| 4 | shows all the prompt says |" in capsys.readouterr().out


def test_a_search_looks_at_its_times_without_the_models_shift(script, tiny_run, monkeypatch, capsys):
    from flowt2i import Pipeline

    asked, sample = [], Pipeline.sample
    monkeypatch.setattr(Pipeline, "sample", lambda self, prompts, **given: asked.append(given) or sample(self, prompts, **given))
    script("search_schedule", "--model", tiny_run, "--steps", 2, "--reference", 2, "--num", 1, "--tries", 1, "--device", "cpu")
    assert all(given["shift"] == 1.0 for given in asked if "," in given["schedule"]) and len(asked) > 6
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {"times", "distance", "test", "test_uniform", "test_shift_5"}
