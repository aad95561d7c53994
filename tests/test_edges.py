"""Differences between neighbours in the loss (`flow.edges`): counted in training as they are weighed, never in validation. The mathematics: test_flow.py."""

import pytest
import torch

from flowt2i.config import resolve
from flowt2i.errors import UserError
from flowt2i.training.loop import train
from flowt2i.training.objective import Terms
from flowt2i.training.tracking import read_log


def log(run, name="log.jsonl"):
    return {line["step"]: line for line in read_log(run / name) if "loss" in line or "validation" in line}


def test_what_is_differentiated_is_the_sum_of_what_is_asked_for():
    losses, edges, perceptual = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, 8.0])
    assert Terms(losses, losses).mean() == 2 and Terms(losses, losses, edges).mean() == 2.5
    assert Terms(losses, losses, None, perceptual).mean() == 6 and Terms(losses, losses, edges, perceptual).mean() == 6.5


def test_training_uses_them_and_says_so(scenes_data, tiny, tmp_path):
    words = [*tiny, "--train.steps", "3", "--train.eval_every", "1"]
    for name, weight in (("without", "0"), ("once", "1"), ("twice", "2")):
        train(resolve("quickstart", [*words, "--flow.edges", weight]), scenes_data, tmp_path / name, progress=False)
    without, once, twice = (log(tmp_path / name) for name in ("without", "once", "twice"))
    first = once[1]["statistics"]
    assert first["flow_loss"] == pytest.approx(without[1]["loss"], rel=1e-3)  # the same weights, noise and times so far
    assert once[1]["loss"] == pytest.approx(first["flow_loss"] + first["edges_loss"], rel=1e-4) and first["edges_loss"] > 0
    assert twice[1]["statistics"]["edges_loss"] == pytest.approx(2 * first["edges_loss"], rel=1e-3)
    assert "edges_loss" not in without[1]["statistics"]
    assert once[3]["statistics"]["flow_loss"] != without[3]["loss"]
    # After one step at a small rate the networks are nearly the same, and so is what validation tells of them: it has no edges in it.
    held = [log(tmp_path / name, "eval.jsonl")[1]["validation"]["loss"] for name in ("without", "twice")]
    assert held[1] == pytest.approx(held[0], rel=0.05)


def test_velocities_have_none(scenes_data, tiny, tmp_path):
    words = [*tiny, "--train.steps", "1", "--model.prediction", "v"]
    for name, weight in (("without", "0"), ("with", "4")):
        train(resolve("quickstart", [*words, "--flow.edges", weight]), scenes_data, tmp_path / name, progress=False)
    assert log(tmp_path / "with")[1]["loss"] == log(tmp_path / "without")[1]["loss"]


def test_a_run_from_before_they_were_the_presets_is_told_how_to_go_on(scenes_data, tiny, tmp_path):
    train(resolve("quickstart", [*tiny, "--train.steps", "1", "--flow.edges", "0"]), scenes_data, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"made with another flow\.edges: resume with --flow\.edges 0\.0, or start a new run"):
        train(resolve("quickstart", [*tiny, "--train.steps", "2"]), scenes_data, tmp_path / "run", "latest", progress=False)
    train(resolve("quickstart", [*tiny, "--train.steps", "2", "--flow.edges", "0.0"]), scenes_data, tmp_path / "run", "latest", progress=False)
    assert max(log(tmp_path / "run", "eval.jsonl")) == 2
