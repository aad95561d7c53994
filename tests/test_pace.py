"""What evaluations cost a training: they are put off where they would take more than their share, counted beforehand, and change nothing of it."""

import json
from collections import Counter

import pytest
import torch

from flowt2i.config import resolve
from flowt2i.description import DatasetDescription
from flowt2i.training import loop, pace
from flowt2i.training.compiling import has_compiler
from flowt2i.training.distributed import World
from flowt2i.training.evaluate import evaluate
from flowt2i.training.loop import Trainer, train
from flowt2i.training.pace import FREE, Expected, Pace
from flowt2i.verify_resume import compare

ALONE = World(0, 1, torch.device("cpu"))


def made(it: Pace, steps: int, per_step: float, each: float, monkeypatch) -> tuple[list[int], float]:
    """The steps at which a run is evaluated on a clock of our own, and the time at its end."""
    now, at = it.began, []
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    for step in range(1, steps + 1):
        now += per_step
        if it.due(step, ALONE):
            now += each
            it.took(each)
            at.append(step)
    return at, now - it.began


@pytest.mark.parametrize("per_step, each, share", [(1, 10, 0.05), (1, 3, 0.05), (0.1, 5, 0.01), (2, 300, 0.3)])
def test_evaluations_take_no_more_than_their_share(per_step, each, share, monkeypatch):
    it = Pace(20, share, began=0.0)
    at, time = made(it, 20_000, per_step, each, monkeypatch)
    assert all(step % 20 == 0 for step in at) and len(at) < 1000 and it.spent == each * len(at)
    assert it.spent <= max(FREE, share * time) and it.spent >= 0.9 * share * time


def test_short_runs_and_cheap_evaluations_are_not_put_off(monkeypatch):
    assert made(Pace(1, 0.05, began=0.0), 5, 0.01, 10, monkeypatch)[0] == [1, 2, 3, 4, 5]
    assert len(made(Pace(100, 0.05, began=0.0), 10_000, 1, 4, monkeypatch)[0]) == 100
    assert len(made(Pace(1, 1.0, began=0.0), 50, 0.01, 1000, monkeypatch)[0]) == 50  # a share of 1: never
    assert made(Pace(0, 0.05, began=0.0), 50, 1, 1, monkeypatch)[0] == []  # at the end only


@pytest.mark.parametrize("words", [
    [], ["--train.ema", "0", "--sample.guidance", "1"], ["--sample.solver", "heun", "--sample.steps", "30"], ["--data.subset", "5", "--sample.solver", "ab4"],
])  # fmt: skip
def test_the_passes_of_an_evaluation_are_known_beforehand(words, scenes_data, tiny, tmp_path):
    trainer = Trainer(resolve("quickstart", [*tiny, "--sample.images", "2", "--train.score_prompts", "3", *words]), scenes_data, tmp_path, progress=False)
    counted: Counter[str] = Counter()

    def count(module, inputs):
        counted["passes"] += len(inputs[0])

    for model in (trainer.model, *([trainer.ema.model] if trainer.ema else [])):
        model.register_forward_pre_hook(count)
    evaluate(trainer, None, last=False)
    trainer.close()
    assert counted["passes"] == pace.passes(trainer.config, trainer.description)


def test_what_is_to_be_expected(scenes_data):
    """A third of a training step's cost a picture; no more of them than their share allows, and the last in any case."""
    config, data = resolve("stability", ["--train.score_prompts", "0"]), DatasetDescription.load(scenes_data)
    each = 0.5 / 3 / 576 * (data.heldout_count * 2 + 16 * 50 * 2)
    assert pace.expected(config, data, 0.5, 30_000) == (30, pytest.approx(each))
    often = resolve("stability", ["--train.score_prompts", "0", "--train.eval_every", "1"])
    number = pace.expected(often, data, 0.5, 30_000).number
    assert number * each == pytest.approx(0.05 * (30_000 * 0.5 + number * each), rel=0.01)
    assert pace.expected(resolve("quickstart"), data, 0.2, 3000).number == 1
    assert Expected(1, 0.2).text == "1 evaluation of about 1 s" and Expected(1200, 150).text == "1,200 evaluations of about 2 min"


def test_weights_do_not_depend_on_evaluations(scenes_data, tiny, tmp_path, monkeypatch, capsys):
    """Never, always, and put off by the clock: the same run bit for bit. What an evaluation took is logged, and that they come less often is said once."""
    monkeypatch.setattr(pace, "FREE", 0.0)
    runs = {"none": ["0", "1"], "all": ["1", "1"], "few": ["1", "1e-9"]}
    for name, (every, share) in runs.items():
        words = [*tiny, "--train.steps", "5", "--train.eval_every", every, "--train.eval_share", share, "--optim.name", "muon"]
        train(resolve("quickstart", words), scenes_data, tmp_path / name, progress=name == "few")
    lines = {name: [json.loads(line) for line in (tmp_path / name / "eval.jsonl").read_text().splitlines()] for name in runs}
    assert {name: [line["step"] for line in found] for name, found in lines.items()} == {"none": [5], "all": [1, 2, 3, 4, 5], "few": [1, 5]}
    assert all(line["eval_s"] > 0 for found in lines.values() for line in found)
    assert compare(tmp_path / "none", tmp_path / "all")["equal"] and compare(tmp_path / "none", tmp_path / "few")["equal"]
    told = capsys.readouterr().err
    assert told.count("no evaluation at step") == 1 and "no evaluation at step 2: the last one took" in told and "(--train.eval_share)" in told


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_nor_do_compiled_ones(scenes_data, tiny, tmp_path, monkeypatch):
    """Where captions are padded to several widths, so that blocks are compiled again between evaluations, and raw weights draw the pictures."""
    monkeypatch.setattr(loop, "text_padding", lambda longest, compiled: 4)
    for every in ("0", "1"):
        words = [*tiny, "--train.compile", "on", "--model.depth", "1", "--train.ema", "0", "--train.steps", "5", "--data.batch_size", "2"]
        torch.compiler.reset()
        train(resolve("quickstart", [*words, "--train.eval_every", every, "--train.eval_images", "3"]), scenes_data, tmp_path / every, progress=False)
    assert compare(tmp_path / "0", tmp_path / "1")["equal"]
