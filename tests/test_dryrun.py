"""The dry run before step 0: finds what would stop a run later, changes nothing of the run, and says what the run will take."""

import os
import shutil

import pytest
import torch
from conftest import QUIET

from flowt2i import human
from flowt2i.cli import main
from flowt2i.config import TrainConfig, resolve
from flowt2i.errors import UserError
from flowt2i.training import checkpoint, dryrun
from flowt2i.training.compiling import has_compiler
from flowt2i.training.loop import Trainer, train
from flowt2i.verify_resume import compare


def trainer(data, run, *words):
    return Trainer(resolve("quickstart", words), data, run, progress=False)


def with_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free))


@pytest.mark.parametrize("words", [["--optim.name", "muon"], ["--optim.name", "adamw"], ["--train.ema", "0", "--model.block", "seed"]])
def test_the_estimate_is_the_size_of_a_checkpoint(words, scenes_data, tiny, tmp_path):
    it = trainer(scenes_data, tmp_path / "run", *tiny, *QUIET, *words, "--train.steps", "1")
    estimate = dryrun.checkpoint_space(it, 1).each
    it.train()
    it.close()
    real = sum(file.stat().st_size for file in checkpoint.folder(tmp_path / "run", 1).glob("*.safetensors"))
    assert estimate < real < estimate * 1.02 + 20_000  # beside the tensors a file holds their names


@pytest.mark.parametrize(
    ("steps", "every", "recent", "for_good", "kept"),
    [
        (30_000, 1_000, 3, 10_000, (4, 3)),
        (30_000, 1_000, 3, 0, (4, 0)),
        (2_000, 1_000, 3, 1_000, (2, 0)),  # never more than are written
        (0, 1_000, 3, 10_000, (4, 0)),  # no end known
        (30_000, 400, 2, 1_000, (3, 15)),  # kept where both numbers meet
        (10, 1_000, 3, 10_000, (1, 0)),
    ],
)
def test_how_many_checkpoints_are_kept(steps, every, recent, for_good, kept):
    config = TrainConfig(checkpoint_every=every, keep_recent=recent, keep_every=for_good)
    assert dryrun.checkpoints_kept(config, steps) == kept


@pytest.mark.parametrize("words", [["--optim.name", "muon"], ["--optim.name", "adamw", "--train.micro_batch", "2"], ["--train.ema", "0"]])
def test_nothing_of_the_run_changes(words, scenes_data, tiny, tmp_path):
    it = trainer(scenes_data, tmp_path / "looked", *tiny, *words)
    before, training = torch.get_rng_state(), it.pipeline().model.training
    weights = {name: tensor.clone() for name, tensor in it.model.state_dict().items()}
    dryrun.check(it)
    dryrun.rehearse(it)
    it.close()
    assert torch.equal(before, torch.get_rng_state()) and it.pipeline().model.training == training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in it.model.state_dict().items())
    assert not it.optimizer.state() and it.step == 0 and all(p.grad is None for p in it.model.parameters()) and it.saver.rehearsed[0] > 100_000
    assert {path.name for path in (tmp_path / "looked").iterdir()} == {".lock"}
    for name in ("true", "false"):
        train(resolve("quickstart", [*tiny, *QUIET, *words, "--train.steps", "3", "--train.dry_run", name]), scenes_data, tmp_path / name, progress=False)
    assert compare(tmp_path / "true", tmp_path / "false")["equal"]


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no compiler")
def test_nothing_of_a_compiled_run_changes(scenes_data, tiny, tmp_path):
    """Without an average the compiled model itself draws: its first batch size must stay the one of training."""
    for name in ("true", "false"):
        words = [*tiny, *QUIET, "--train.steps", "3", "--train.ema", "0", "--train.compile", "on", "--model.depth", "1", "--train.dry_run", name]
        torch.compiler.reset()
        train(resolve("quickstart", words), scenes_data, tmp_path / name, progress=False)
    assert compare(tmp_path / "true", tmp_path / "false")["equal"]


def test_a_full_disk_is_refused_before_training(scenes_data, tiny, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    words = ["train", "--config", "quickstart", "--data", str(scenes_data), "--out", str(run), *tiny, *QUIET]
    words += ["--train.steps", "22", "--train.checkpoint_every", "1", "--train.keep_recent", "20"]
    with_free(monkeypatch, 40 << 20)
    assert main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1 and f"no room for checkpoints in {run}" in errors[0] and "40 MiB free" in errors[0]
    assert not (run / "log.jsonl").exists() and not (run / "checkpoints").exists()
    with_free(monkeypatch, 70 << 20)
    assert main(words) == 0
    with_free(monkeypatch, 20 << 20)  # what lies there already needs no room again
    assert main([*words, "--resume", "latest", "--train.steps", "23"]) == 0


def test_a_disk_that_will_be_full_is_warned_of(scenes_data, tiny, tmp_path, monkeypatch, capsys):
    it = trainer(scenes_data, tmp_path / "run", *tiny, "--train.steps", "100000", "--train.checkpoint_every", "10", "--train.keep_every", "10")
    with_free(monkeypatch, 1 << 30)
    dryrun.check(it)
    it.close()
    assert "will be full before the end" in capsys.readouterr().err


def test_a_folder_that_cannot_sync_is_refused(scenes_data, tiny, tmp_path, monkeypatch):
    it = trainer(scenes_data, tmp_path / "run", *tiny)

    def no_sync(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", no_sync)
    with pytest.raises(UserError, match="Input/output error"):
        dryrun.check(it)
    it.close()
    assert not (tmp_path / "run" / ".dry-run").exists()


@pytest.mark.parametrize("fault", ["full", "damaged"])
def test_a_whole_checkpoint_that_fails_is_refused_before_training(fault, scenes_data, tiny, tmp_path, monkeypatch, capsys):
    """A small file goes through; that of the optimizer does not, or does not read back."""
    save, prove = checkpoint.save_tensors, checkpoint.prove

    def save_tensors(tensors, path):
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        save(tensors, path)

    def spoilt(path):
        (path / "optimizer.safetensors").write_bytes(b"")
        prove(path)

    monkeypatch.setattr(*((checkpoint, "save_tensors", save_tensors) if fault == "full" else (checkpoint, "prove", spoilt)))
    run = tmp_path / "run"
    assert main(["train", "--config", "quickstart", "--data", str(scenes_data), "--out", str(run), *tiny, *QUIET, "--train.steps", "2"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowt2i train: error:")]
    assert len(told) == 1 and ("No space left on device" if fault == "full" else "does not read back") in told[0] and ".dry-run" in told[0]
    assert "earlier ones" not in told[0] and "--resume" not in told[0]  # there is nothing to resume
    assert {path.name for path in run.iterdir()} == {".lock"}


def test_a_resume_rehearses_nothing_and_clears_up(scenes_data, tiny, tmp_path, monkeypatch, capsys):
    words = [*tiny, *QUIET, "--optim.schedule", "constant", "--train.steps"]
    train(resolve("quickstart", [*words, "1"]), scenes_data, tmp_path, progress=True)
    assert "dry run: a step, a checkpoint of" in capsys.readouterr().err
    (tmp_path / ".dry-run" / "checkpoints").mkdir(parents=True)  # of a start that was killed
    monkeypatch.setattr(Trainer, "rehearse_step", None)
    train(resolve("quickstart", [*words, "2"]), scenes_data, tmp_path, "latest", progress=True)
    assert "dry run:" not in capsys.readouterr().err and not (tmp_path / ".dry-run").exists()


def test_a_codec_that_cannot_decode_is_refused_before_training(scenes_data, tiny, tmp_path, monkeypatch):
    from flowt2i.codec import PixelCodec

    def broken(self, latents):
        raise RuntimeError("Input type (float) and bias type (half) should be the same\nmore")

    monkeypatch.setattr(PixelCodec, "decode", broken)
    with pytest.raises(UserError, match=r"no picture could be drawn before step 0 \(RuntimeError: Input type"):
        train(resolve("quickstart", [*tiny, *QUIET, "--train.steps", "2"]), scenes_data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_forecast_comes_once(scenes_data, tiny, tmp_path, capsys):
    train(resolve("quickstart", [*tiny, *QUIET, "--train.steps", "30"]), scenes_data, tmp_path / "run", progress=True)
    errors = capsys.readouterr().err
    told = [line for line in errors.replace("\r", "\n").splitlines() if "dry run: a" in line or "expected: " in line]
    assert len(told) == 2 and "to go at" in told[1] and "1 evaluation of about 1 s included" in told[1]
    assert "GiB of" in told[1] and "of checkpoints (1 at once)" in told[1]
    assert "and a picture: all work" in told[0]
    train(resolve("quickstart", [*tiny, *QUIET, "--train.steps", "60"]), scenes_data, tmp_path / "run", "latest", progress=True)
    assert capsys.readouterr().err.count("expected: ") == 1  # a resume shows it by its first steps


def test_units():
    assert [human.duration(s) for s in (40, 719, 11_100, 187_300)] == ["40 s", "12 min", "3 h 05 min", "2 days 4 h"]
    assert [human.size(n) for n in (1, 3 << 20, 3 << 29, 200 << 30)] == ["1 B", "3.0 MiB", "1.5 GiB", "200 GiB"]
