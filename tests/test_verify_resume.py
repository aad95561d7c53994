"""`flowt2i verify-resume`: says equal where it is, and notices where it is not."""

import json
import os
import shutil
import subprocess
import tempfile

import pytest
from conftest import QUIET
from safetensors.torch import save_file

from flowt2i import verify_resume as module
from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.training import checkpoint
from flowt2i.training.loop import train
from flowt2i.verify_resume import compare, report, what_failed


def spoil(run, step, name):
    """Change one number of a checkpoint, and vouch for it."""
    folder = checkpoint.folder(run, step)
    tensors = checkpoint.load_tensors(folder / f"{name}.safetensors")
    first = next(k for k, t in sorted(tensors.items()) if t.ndim == 2)
    tensors[first][0, 0] += 0.5
    save_file(tensors, folder / f"{name}.safetensors")
    checkpoint.write_manifest(folder)
    return first


@pytest.fixture(scope="module")
def trained(scenes_data, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    train(resolve("quickstart", [*tiny, *QUIET, "--train.steps", "2"]), scenes_data, run, progress=False)
    return run


def test_equal_runs_are_equal(trained):
    result = compare(trained, trained)
    assert result["equal"] and result["largest_difference"] == 0 and set(result["tensors"]) == {"model", "ema", "optimizer"}


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_one_number_is_noticed(name, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    first = spoil(tmp_path / "run", 2, name)
    result = compare(trained, tmp_path / "run")
    assert not result["equal"] and result["largest_difference"] > 0
    part = result["tensors"][name]
    assert part["first"] == first and part["equal"] == part["count"] - 1


def test_a_loss_that_differs_or_lacks_is_noticed(trained, tmp_path):
    for change in (lambda lines: lines[:1], lambda lines: [lines[0], lines[1].replace('"loss": ', '"loss": 1')]):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "run")
        log = tmp_path / "run" / "log.jsonl"
        log.write_text("\n".join(change(log.read_text().splitlines())) + "\n")
        assert not compare(trained, tmp_path / "run")["equal"]


def test_what_is_said_where_they_differ(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    spoil(tmp_path / "run", 2, "model")
    result = {"steps": 2, "at": 1, "ranks": 1, "device": "cpu", "compiled": False, **compare(trained, tmp_path / "run")}
    assert report(result | {"repeatable": True}).splitlines()[-1].startswith("NOT equal")
    told = report(result | {"repeatable": False, "difference_of_repeats": 1e-6}).splitlines()[-1]
    assert "do not repeat themselves" in told and "1e-06" in told


def test_where_to_stop_must_lie_between(scenes_data, capsys):
    assert main(["verify-resume", "--config", "quickstart", "--data", str(scenes_data), "--steps", "3", "--at", "3"]) == 2
    assert "--at 3 must lie between" in capsys.readouterr().err


def test_a_training_that_cannot_be(tmp_path, capsys):
    assert main(["verify-resume", "--config", "quickstart", "--data", str(tmp_path / "nowhere")]) == 2
    assert "no dataset" in capsys.readouterr().err


def test_a_temporary_folder_that_is_full_or_cannot_be_written(scenes_data, tiny, monkeypatch, capsys):
    words = ["verify-resume", "--config", "quickstart", "--data", str(scenes_data), *tiny]

    def no_folder(prefix):
        raise OSError(30, "Read-only file system")

    def full(command, **_):
        said = f"flowt2i train: error: no room for checkpoints in {command[command.index('--out') + 1]}: 5 GiB needed, 1 GiB free; free some"
        return subprocess.CompletedProcess(command, 2, "", f"warning: something\n{said}\n")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", no_folder)
        assert main(words) == 2
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", full)
        assert main(words) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(told) == 2 and "Read-only file system" in told[0] and "5 GiB needed" in told[1] and all("set TMPDIR" in line for line in told)


TORCHRUN = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "two.py", line 4, in f
[rank1]: ValueError: the loss is not what it was
[rank0]: Traceback (most recent call last):
[rank0]:   File "two.py", line 6, in <module>
[rank0]: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17821.
E1123 02:55:13.118000 31378 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 1 (pid: 31408) of binary: python
Traceback (most recent call last):
  File "torch/distributed/launcher/api.py", line 383, in launch_agent
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 31407)  (SIGTERM)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_02:55:13
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 31408)
============================================================
"""  # of `torchrun --nproc-per-node 2` (torch 2.x), shortened


def test_the_error_is_found_among_torchruns_own_lines():
    assert what_failed(TORCHRUN) == "[rank1]: ValueError: the loss is not what it was"
    lost = "flowt2i train: error: another rank was lost, so this one ends"
    assert what_failed(f"{lost}\n{TORCHRUN}") == what_failed(TORCHRUN) and what_failed(lost) == lost
    assert what_failed("flowt2i train: error: no dataset\n" + TORCHRUN) == "flowt2i train: error: no dataset"
    assert what_failed("Traceback\nKeyError: 'a'\n\nTraceback\ntorch.OutOfMemoryError: CUDA out of memory\n") == "torch.OutOfMemoryError: CUDA out of memory"
    assert what_failed("Killed") == "Killed"


@pytest.mark.slow
def test_a_plain_exception_of_one_of_two_ranks_is_told(scenes_data, tiny, monkeypatch, capsys, tmp_path):
    """In a real training under torchrun: rank 1 breaks off at step 2."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from flowt2i.training import loop\n"
        "    real = loop.Trainer._step\n"
        "    def step(self, *args):\n"
        "        if self.step == 1: raise ValueError('the loss is not what it was')\n"
        "        return real(self, *args)\n"
        "    loop.Trainer._step = step\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert main(["verify-resume", "--config", "quickstart", "--data", str(scenes_data), "--steps", "3", "--at", "2", "--ranks", "2", *tiny]) == 2
    assert "the training itself failed: [rank1]: ValueError: the loss is not what it was" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_real_interruption_loses_nothing(ranks, scenes_data, tiny, capsys):
    assert main(["verify-resume", "--config", "quickstart", "--data", str(scenes_data), "--steps", "5", "--at", "2", "--ranks", ranks, "--json", *tiny]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["equal"] and [line["step"] for line in result["losses"]] == [1, 2, 3, 4, 5] and result["ranks"] == int(ranks)


@pytest.mark.slow
def test_a_resume_that_loses_something_is_noticed(scenes_data, tiny, monkeypatch, capsys):
    """One number of the optimizer changed between stop and resume: not equal, and not blamed on the device."""
    real = module._train

    def spoiling(command, run, ranks, stop_at=0):
        real(command, run, ranks, stop_at)
        if stop_at:
            spoil(run, stop_at, "optimizer")

    monkeypatch.setattr(module, "_train", spoiling)
    assert main(["verify-resume", "--config", "quickstart", "--data", str(scenes_data), "--steps", "4", "--at", "2", *tiny]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("NOT equal") and "✗ model" in out
