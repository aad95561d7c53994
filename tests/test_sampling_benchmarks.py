"""The scripts that compare ways of sampling: what one model drew is never taken for another's."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from flowt2i.training import checkpoint

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *words):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        module.main()
        return module

    return run


def test_what_another_model_drew_is_measured_anew(script, tiny_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")

    def measure(model, *more):
        script("sampling", "--model", model, "--num", 2, "--reference", 2, "--only", "default", "--out", tmp_path / "s.png", "--device", "cpu", *more)
        return (tmp_path / "s.jsonl").read_text().splitlines()

    early = checkpoint.folder(tiny_run, min(checkpoint.list_steps(tiny_run)))
    first = measure(tiny_run)
    assert [json.loads(line)["label"] for line in first] == ["euler 50", "euler 8 shift 5.0", "ab2 8 shift 5.0"]
    assert measure(tiny_run) == first, "goes on where it was"
    assert len(measure(early)) == 6 and len(list(tmp_path.glob("s-reference-*.npy"))) == 2
    assert len({json.loads(line)["key"] for line in measure(early)}) == 2


def test_a_search_looks_at_its_times_without_the_models_shift(script, tiny_run, monkeypatch, capsys):
    from flowt2i import Pipeline

    asked, sample = [], Pipeline.sample
    monkeypatch.setattr(Pipeline, "sample", lambda self, prompts, **given: asked.append(given) or sample(self, prompts, **given))
    script("search_schedule", "--model", tiny_run, "--steps", 2, "--reference", 2, "--num", 1, "--tries", 1, "--device", "cpu")
    assert all(given["shift"] == 1.0 for given in asked if "," in given["schedule"]) and len(asked) > 6
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {"times", "distance", "test", "test_uniform", "test_shift_5"}
