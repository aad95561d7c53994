"""Whole trainings of tiny models on small real data: they learn, resume exactly, and refuse what does not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowt2i.config import PRESETS, resolve
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.errors import UserError
from flowt2i.evaluation.validation import heldout_loss
from flowt2i.training import checkpoint, loop
from flowt2i.training.distributed import World
from flowt2i.training.loop import Stopped, Trainer, train
from flowt2i.training.objective import Terms
from flowt2i.verify_resume import compare


def log(run: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def fit(preset, data, run, *words, resume=None):
    return train(resolve(preset, words), data, run, resume, progress=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset, scenes_data, tiny, tmp_path):
    summary = fit(preset, scenes_data, tmp_path / "run", *tiny, "--train.steps", "3", "--train.eval_every", "2")
    assert summary["step"] == 3 and summary["images_seen"] == 24
    for line in log(tmp_path / "run").values():
        assert {"step", "images_seen", "loss", "lr", "grad_norm", "images_per_s", "statistics"} <= set(line)
        assert np.isfinite(line["loss"])
    assert {p.name for p in (tmp_path / "run" / "samples").glob("*.png")} >= {"step-00000002.png", "step-00000003.png"}
    assert checkpoint.list_steps(tmp_path / "run") == [3]
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert resolved["preset"] == preset and resolved["resolved"]["accumulation"] == 1


@pytest.mark.parametrize("block", ["modern", "seed"])
def test_it_learns(block, scenes_data, tiny, tmp_path):
    words = [
        *tiny,
        "--train.steps",
        "60",
        "--model.block",
        block,
        "--optim.lr",
        "3e-3",
        "--train.eval_every",
        "30",
        "--model.prediction",
        "v",
    ]
    fit("quickstart", scenes_data, tmp_path / "run", *words)
    losses = [line["loss"] for line in log(tmp_path / "run").values()]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_resume_is_exact_even_of_a_resume(scenes_data, tiny, tmp_path):
    words = [*tiny, "--train.steps", "9", "--optim.schedule", "constant", "--train.ema", "0.9", "--optim.name", "muon"]
    fit("quickstart", scenes_data, tmp_path / "whole", *words)
    part = tmp_path / "part"
    for steps, resume in (("3", None), ("6", "latest"), ("9", str(checkpoint.folder(part, 6)))):
        fit("quickstart", scenes_data, part, *words, "--train.steps", steps, "--optim.warmup", str(0.05 * 9 / int(steps)), resume=resume)
    whole, pieces = log(tmp_path / "whole"), log(part)
    assert list(whole) == list(pieces) == list(range(1, 10))
    assert compare(tmp_path / "whole", part)["equal"]


def test_accumulation_changes_nothing_but_rounding(scenes_data, tiny, tmp_path):
    for micro in ("8", "2"):
        fit("quickstart", scenes_data, tmp_path / micro, *tiny, "--train.steps", "4", "--train.micro_batch", micro)
    a, b = ([line["loss"] for line in log(tmp_path / m).values()] for m in ("8", "2"))
    assert np.allclose(a, b, rtol=1e-4)


def test_loader_processes_change_nothing(scenes_data, tiny, tmp_path):
    for workers in ("0", "2"):
        fit("quickstart", scenes_data, tmp_path / workers, *tiny, "--train.steps", "3", "--data.workers", workers)
    a, b = ([line["loss"] for line in log(tmp_path / w).values()] for w in ("0", "2"))
    assert a == b


def test_two_ranks_see_what_one_sees(scenes_data, tiny, tmp_path):
    """Two gloo ranks under torchrun, against one process, at the same effective batch."""
    words = ["train", "--config", "quickstart", "--data", str(scenes_data), *tiny, "--train.steps", "4"]
    root = Path(__file__).parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "flowt2i.cli",
        *words,
        "--out",
        str(tmp_path / "two"),
    ]
    subprocess.run(two, check=True, cwd=root, env=env, capture_output=True, timeout=240)
    fit("quickstart", scenes_data, tmp_path / "one", *tiny, "--train.steps", "4")
    a, b = ([line["loss"] for line in log(tmp_path / w).values()] for w in ("one", "two"))
    assert np.allclose(a, b, rtol=1e-4)


def test_minutes_fix_the_steps_once(scenes_data, tiny, tmp_path):
    summary = fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--train.minutes", "0.05")
    assert summary["step"] >= 30
    state = checkpoint.read_state(checkpoint.newest_good(tmp_path / "run"))
    assert state["steps"] == state["step"] == summary["step"]
    with pytest.warns(UserWarning, match=f"laid out for 0.05 minutes, which made {summary['step']:,} steps, and ends there"):
        again = fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--train.minutes", "2", resume="latest")
    assert again["step"] == summary["step"]
    fit("quickstart", scenes_data, tmp_path / "counted", *tiny, "--train.steps", "2")
    with pytest.warns(UserWarning, match="laid out for 2 steps and ends there"):
        assert fit("quickstart", scenes_data, tmp_path / "counted", *tiny, "--train.minutes", "2", resume="latest")["step"] == 2


def test_an_evaluation_that_runs_out_of_memory_does_not_end_the_training(scenes_data, tiny, tmp_path, monkeypatch):
    import flowt2i.pipeline

    def full(*rest, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    monkeypatch.setattr(flowt2i.pipeline.Pipeline, "sample", full)
    with pytest.warns(UserWarning, match=r"evaluation at step 2 failed: out of memory \(CUDA out of memory. Tried to allocate 2.00 GiB.\)"):
        fit("debug", scenes_data, tmp_path / "run", *tiny, "--train.steps", "4", "--train.eval_every", "2", "--train.dry_run", "false")  # that draws, too
    assert checkpoint.list_steps(tmp_path / "run")[-1] == 4


def test_an_evaluation_takes_few_pictures_at_once_where_training_does_and_says_the_same(scenes_data, tiny, tmp_path, monkeypatch):
    """A micro-batch of one: eight pictures go through the network together, in a validation of 19 pictures and in a drawing of 20."""
    import flowt2i.model

    seen, own, told = [], flowt2i.model.FlowTransformer.forward, {}

    def forward(self, z, *rest):
        if not torch.is_grad_enabled():
            seen.append(len(z))
        return own(self, z, *rest)

    monkeypatch.setattr(flowt2i.model.FlowTransformer, "forward", forward)
    for micro in (1, 8):
        seen.clear()
        run = tmp_path / str(micro)
        words = [
            "--train.steps",
            "1",
            "--train.micro_batch",
            str(micro),
            "--train.score_prompts",
            "20",
            "--sample.guidance",
            "1",
            "--sample.steps",
            "2",
            "--train.eval_images",
            "19",
        ]
        fit("debug", scenes_data, run, *tiny, *words, "--train.dry_run", "false")
        told[micro] = (max(seen), json.loads((run / "eval.jsonl").read_text().splitlines()[-1]))
    assert told[1][0] == 8 and told[8][0] > 8
    assert told[1][1]["validation"] == pytest.approx(told[8][1]["validation"], rel=1e-4) and told[1][1]["score"] == told[8][1]["score"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_validation_takes_as_many_passes_of_every_batch_on_several_ranks(scenes_data, monkeypatch, size):
    """A sharded model needs every rank at each of them; the last batch here has 3 pictures, where 16 would be two passes."""
    passes: list[int] = []

    def objective(data, noise, t, text, mask):
        passes.append(len(data))
        return Terms(t * (1 + noise.mean((1, 2, 3))), data)

    dataset = ImageTextDataset(scenes_data, "heldout")
    monkeypatch.setattr(World, "share", lambda self, count: np.arange(count))
    monkeypatch.setattr(World, "collect", lambda self, mine, count: mine)
    latents, text = lambda batch, _: batch.stored.float(), lambda batch: batch.ids
    found = [heldout_loss(objective, dataset, latents, text, 19, 16, World(0, size, torch.device("cpu")), at_once)["loss"] for at_once in (16, 8)]
    assert passes == [16, 3, 8, 8, 3] + [1] * (size - 1) and found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_signal_saves_and_stops_and_the_same_command_goes_on(scenes_data, tiny, tmp_path):
    words = [
        "train",
        "--config",
        "debug",
        "--data",
        str(scenes_data),
        "--out",
        str(tmp_path / "run"),
        "--resume",
        "latest",
        *tiny,
        "--train.eval_every",
        "0",
    ]
    command = [sys.executable, "-m", "flowt2i.cli", *words, "--train.steps"]
    process = subprocess.Popen([*command, "0"], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    deadline = time.time() + 120
    while time.time() < deadline and not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    (step,) = checkpoint.list_steps(tmp_path / "run")
    assert f"at step {step}" in errors
    fit("debug", scenes_data, tmp_path / "run", *tiny, "--train.eval_every", "0", "--train.steps", str(step + 2), resume="latest")
    assert list(log(tmp_path / "run")) == list(range(1, step + 3))


def test_previews_use_the_same_seeds_each_time(scenes_data, tiny, tmp_path):
    for name in ("a", "b"):
        fit("quickstart", scenes_data, tmp_path / name, *tiny, "--train.steps", "2")
    a, b = (np.asarray(Image.open(tmp_path / n / "samples" / "step-00000002.png")) for n in ("a", "b"))
    assert np.array_equal(a, b)


def test_flips_and_dropout_are_applied(scenes_data, tiny, tmp_path):
    base = fit_losses(scenes_data, tiny, tmp_path / "base")
    assert fit_losses(scenes_data, tiny, tmp_path / "flip", "--data.flip", "true") != base
    trainer = Trainer(resolve("quickstart", [*tiny, "--flow.caption_dropout", "0.5"]), scenes_data, tmp_path / "drop", progress=False)
    seen = []
    trainer.objective.forward = lambda data, noise, t, text, mask, room: seen.append((text, mask)) or (_ for _ in ()).throw(StopIteration)  # type: ignore[method-assign]
    with pytest.raises((StopIteration, RuntimeError)):
        trainer._step(iter(trainer._loader()), 1.0, False)
    text, mask = seen[0]
    empty = (mask.sum(1) == 1) & (text[:, 0] == trainer.null[0])
    from flowt2i.training import stream

    assert torch.equal(empty, stream.draw(0, 0, 8, (3, 64, 64), 0.5, False, torch.device("cpu")).dropped) and empty.any() and not empty.all()


def fit_losses(data, tiny, run, *words):
    fit("quickstart", data, run, *tiny, "--train.steps", "3", *words)
    return [line["loss"] for line in log(run).values()]


def test_wandb_offline_and_tensorboard(scenes_data, tiny, tmp_path):
    pytest.importorskip("wandb"), pytest.importorskip("tensorboard")
    fit(
        "quickstart",
        scenes_data,
        tmp_path / "run",
        *tiny,
        "--train.steps",
        "2",
        "--track.use_wandb",
        "true",
        "--track.wandb_mode",
        "offline",
        "--track.tensorboard",
        "true",
    )
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "loss",
        "lr",
        "grad_norm",
        "validation/loss",
        "validation_ema/loss",
        "score",
        "eval_s",
        "statistics/latent_std",
        "statistics/velocity_std",
    } <= scalars
    assert "samples" in events.Tags()["images"]


def test_non_finite_loss_stops_before_the_update(scenes_data, tiny, tmp_path):
    trainer = Trainer(resolve("quickstart", [*tiny, "--train.steps", "3"]), scenes_data, tmp_path / "run", progress=False)
    with torch.no_grad():
        trainer.model.unembed.weight[0, 0] = float("nan")
    before = trainer.model.time[0].weight.clone()
    with pytest.raises(UserError, match=r"not finite at step 0 .*nothing was updated; look at these samples$"):
        trainer.train()
    assert torch.equal(before, trainer.model.time[0].weight) and checkpoint.list_steps(tmp_path / "run") == []


class TestRefused:
    def test_existing_run_without_resume(self, scenes_data, tiny, tmp_path):
        fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--train.steps", "1")
        with pytest.raises(UserError, match="--resume latest"):
            fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--train.steps", "2")
        with pytest.raises(UserError, match=r"model\.width"):
            fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--model.width", "32", "--train.steps", "2", resume="latest")
        with pytest.raises(UserError, match="no model"):
            fit("quickstart", scenes_data, tmp_path / "run", *tiny, resume=str(tmp_path / "nowhere"))

    def test_data_prepared_otherwise(self, scenes_data, tiny, tmp_path):
        with pytest.raises(UserError, match=r"data\.codec"):
            fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--data.codec", "sd-vae-ft-mse")
        from flowt2i.data.options import PrepareOptions
        from flowt2i.data.prepare import prepare

        fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--train.steps", "1")
        prepare(PrepareOptions(sources=["scenes"], out=tmp_path / "other", count=40, image_size=32, workers=1), progress=False)
        with pytest.raises(UserError, match="image_size"):
            fit("quickstart", tmp_path / "other", tmp_path / "run", *tiny, "--train.steps", "2", resume="latest")

    def test_other_data_of_the_same_kind(self, scenes_data, tiny, tmp_path):
        from flowt2i.data.options import PrepareOptions
        from flowt2i.data.prepare import prepare

        fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--train.steps", "1")
        prepare(PrepareOptions(sources=["scenes"], out=tmp_path / "other", count=96, heldout=0.2, seed=1, workers=1), progress=False)
        with pytest.raises(UserError, match="differ"):
            fit("quickstart", tmp_path / "other", tmp_path / "run", *tiny, "--train.steps", "2", resume="latest")

    def test_a_folder_that_cannot_be_written(self, scenes_data, tiny, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write"):
            fit("quickstart", scenes_data, tmp_path / "file", *tiny)

    def test_missing_or_foreign_data(self, tiny, tmp_path):
        with pytest.raises(UserError, match="no dataset"):
            fit("quickstart", tmp_path / "nowhere", tmp_path / "run", *tiny)
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"dataset\.json"):
            fit("quickstart", tmp_path / "empty", tmp_path / "run", *tiny)

    @pytest.mark.parametrize("words", [["--model.heads", "3"], ["--model.patch", "7"]])
    def test_indivisible_sizes(self, words, scenes_data, tiny, tmp_path):
        with pytest.raises(UserError):
            fit("quickstart", scenes_data, tmp_path / "run", *tiny, *words)

    def test_two_trainings_in_one_folder(self, scenes_data, tiny, tmp_path):
        first = Trainer(resolve("quickstart", tiny), scenes_data, tmp_path / "run", progress=False)
        with pytest.raises(UserError, match="another training"):
            Trainer(resolve("quickstart", tiny), scenes_data, tmp_path / "run", progress=False)
        first.close()
        Trainer(resolve("quickstart", tiny), scenes_data, tmp_path / "run", progress=False).close()


def test_a_failed_evaluation_costs_no_training(scenes_data, tiny, tmp_path):
    with pytest.warns(UserWarning, match="evaluation at step 3 failed: an empty prompt"):
        fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--train.steps", "3", "--sample.prompts", '[" "]')
    assert checkpoint.list_steps(tmp_path / "run") == [3]


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(scenes_data, tiny, tmp_path):
    run, words = tmp_path / "run", [*tiny, "--train.checkpoint_every", "2", "--train.eval_every", "0", "--optim.schedule", "constant"]
    fit("quickstart", scenes_data, run, *words, "--train.steps", "6")
    fit("quickstart", scenes_data, run, *words, "--train.steps", "5", resume=str(checkpoint.folder(run, 2)))
    assert checkpoint.list_steps(run) == [2, 4, 5] and list(log(run)) == [1, 2, 3, 4, 5]
    assert (run / "checkpoints" / "superseded_00000006").exists()


def test_a_damaged_checkpoint_is_written_again(scenes_data, tiny, tmp_path):
    run, words = tmp_path / "run", [*tiny, "--train.checkpoint_every", "2", "--train.eval_every", "0", "--train.steps", "4"]
    fit("quickstart", scenes_data, run, *words)
    (checkpoint.folder(run, 4) / "model.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="damaged"):
        fit("quickstart", scenes_data, run, *words, resume="latest")
    assert checkpoint.damage(checkpoint.folder(run, 4)) is None


def test_a_finished_run_says_so(scenes_data, tiny, tmp_path, capsys):
    for resume in (None, "latest"):
        fit("quickstart", scenes_data, tmp_path / "run", *tiny, "--train.steps", "2", resume=resume)
    assert "is complete at step 2" in capsys.readouterr().err


def test_a_run_killed_before_its_last_evaluation_makes_it_up(scenes_data, tiny, tmp_path, monkeypatch):
    """All is saved, nothing was shown: the same command shows it, and a third time does nothing."""
    run, words = tmp_path / "run", [*tiny, "--train.steps", "2"]
    fit("quickstart", scenes_data, run, *words)
    evaluated = lambda: json.loads((run / "eval.jsonl").read_text()) | {"eval_s": 0}
    shown, picture = evaluated(), run / "samples" / "step-00000002.png"
    seen = picture.read_bytes()
    (run / "eval.jsonl").write_text(""), picture.unlink()
    summary = fit("quickstart", scenes_data, run, *words, resume="latest")
    assert evaluated() == shown and picture.read_bytes() == seen and "score" in summary
    monkeypatch.setattr(loop, "evaluate", None)
    assert fit("quickstart", scenes_data, run, *words, resume="latest")["step"] == 2


def test_a_signal_during_the_last_evaluation(scenes_data, tiny, tmp_path, monkeypatch):
    """All steps are saved, the evaluation is broken off: status 3, and the same command makes it."""
    run, words = tmp_path / "run", [*tiny, "--train.steps", "2"]
    trainer = Trainer(resolve("quickstart", words), scenes_data, run, progress=False)
    real = loop.evaluate

    def late(trainer, *args, **kwargs):
        trainer.stop_signal = signal.SIGTERM
        return real(trainer, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after the last step, 2, before its evaluation"):
        patch.setattr(loop, "evaluate", late)
        trainer.train()
    trainer.close()
    assert checkpoint.list_steps(run) == [2] and not (run / "samples").exists()
    assert "score" in fit("quickstart", scenes_data, run, *words, resume="latest") and len(list((run / "samples").iterdir())) == 1


def test_stopped_is_raised_after_saving(scenes_data, tiny, tmp_path):
    trainer = Trainer(resolve("quickstart", [*tiny, "--train.steps", "5"]), scenes_data, tmp_path / "run", progress=False)
    trainer.stop_signal = signal.SIGTERM
    with pytest.raises(Stopped):
        trainer.train()
    assert checkpoint.list_steps(tmp_path / "run") == [1]
