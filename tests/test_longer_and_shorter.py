"""Runs that are extended, runs that stop on time, runs that are killed while a checkpoint is written."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import QUIET

from flowt2i import cli
from flowt2i.config import resolve, seconds
from flowt2i.errors import UserError
from flowt2i.training import checkpoint
from flowt2i.training.loop import train
from flowt2i.verify_resume import compare, losses


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_an_extended_run_is_one_run(schedule, scenes_data, tiny, tmp_path):
    """Ten steps, extended to twenty, with the schedule laid out for twenty from the start."""
    words = [*tiny, *QUIET, "--optim.schedule", schedule, "--optim.schedule_steps", "20", "--train.steps"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for run, steps, resume in (("whole", "20", None), ("part", "10", None), ("part", "20", "latest")):
            train(resolve("quickstart", [*words, steps]), scenes_data, tmp_path / run, resume, progress=False)
    assert compare(tmp_path / "whole", tmp_path / "part")["equal"] and len(losses(tmp_path / "part")) == 20


def test_a_schedule_that_bends_is_told(scenes_data, tiny, tmp_path):
    words = [*tiny, *QUIET, "--train.steps"]
    train(resolve("stability", [*words, "4"]), scenes_data, tmp_path, progress=False)
    with pytest.warns(UserWarning, match=r"cosine schedule was laid out for 4 steps and is now for 8: at step 4 .* \(--optim.schedule_steps 4 keeps it\)"):
        train(resolve("stability", [*words, "8"]), scenes_data, tmp_path, "latest", progress=False)


def test_durations():
    assert [seconds(text) for text in ("3h", "90m", "45s", "1h30m", "0.5h", "")] == [10_800, 5_400, 45, 5_400, 1_800, float("inf")]
    for wrong in ("3", "h", "3x", "-3h", "0s", "3 h", "later", "1m2h"):
        with pytest.raises(UserError, match=r"--train\.stop_after .*: give a time such as 3h, 90m"):
            resolve("quickstart", ["--train.stop_after", wrong])


def test_a_wall_clock_budget_saves_and_stops(scenes_data, tiny, tmp_path, capsys):
    words = ["--config", "debug", "--data", str(scenes_data), "--out", str(tmp_path), "--resume", "latest", *tiny, *QUIET]
    for _ in range(2):  # the same command goes on
        assert cli.main(["train", *words, "--stop-after", "1s"]) == 3
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith("flowt2i train: stopped after 1s at step"))
    steps = checkpoint.list_steps(tmp_path)
    assert f"step {steps[0]};" in first and f"step {steps[1]};" in second
    assert list(losses(tmp_path)) == list(range(1, steps[1] + 1))


KILLER = """
import os, signal, sys
from flowt2i import cli
from flowt2i.training import checkpoint
save_tensors, calls = checkpoint.save_tensors, 0
def deadly(*args):
    global calls
    save_tensors(*args)
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_tensors = deadly
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_training_killed_within_a_save_goes_on_as_if_nothing_was(scenes_data, tiny, tmp_path):
    """Killed after the first, second, third file of a save, and run again by the same command each time."""
    run = tmp_path / "run"
    words = [*tiny, *QUIET, "--train.steps", "12", "--train.checkpoint_every", "3"]
    command = ["train", "--config", "quickstart", "--data", str(scenes_data), "--out", str(run), "--resume", "latest", *words]
    statuses = []
    for file in (4, 2, 6, 100):
        done = subprocess.run([sys.executable, "-c", KILLER, str(file), *command], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=200)
        statuses.append(done.returncode)
    assert statuses == [-9, -9, -9, 0], done.stderr
    train(resolve("quickstart", words), scenes_data, tmp_path / "whole", progress=False)
    assert compare(tmp_path / "whole", run)["equal"] and len(losses(run)) == 12
