"""Several ranks (gloo on the CPU, started by torchrun): the same stream on any number, DDP and FSDP2 checkpoints across, faults on one rank stop all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import kernel, uneven_validation
from safetensors.torch import load_file

from flowt2i import cli, errors
from flowt2i.config import resolve
from flowt2i.errors import UserError
from flowt2i.training import checkpoint, distributed
from flowt2i.training.compiling import has_compiler
from flowt2i.training.evaluate import evaluate
from flowt2i.training.loop import Trainer, train
from flowt2i.verify_resume import compare, losses

ROOT = Path(__file__).parents[1]
STEADY = ["--optim.name", "adamw", "--optim.schedule_steps", "12", "--train.ema", "0.9", "--train.eval_every", "0", "--train.score_prompts", "0"]


def ranks(size: int, jobs: list[dict], out: Path) -> tuple[list[list[dict]], str]:
    """Run jobs (see tests/ranks.py) on `size` ranks. Returns each rank's results, and what was printed on stderr."""
    out.mkdir()
    (out / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), str(ROOT / "tests" / "ranks.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(out / "jobs.json"), str(out)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)], done.stderr


def stream_of(results: list[list[dict]], job: int) -> dict[int, list[tuple[int, float]]]:
    """step -> (sample, noise) of every row of the global batch, in order, over all ranks."""
    micro = sorted((note["step"], note["row"], note["samples"], note["noise"]) for rank in results for note in rank[job]["seen"])
    steps: dict[int, list[tuple[int, float]]] = {}
    for step, _, samples, noise in micro:
        steps.setdefault(step, []).extend(zip(samples, noise))
    return steps


def same_weights(a: Path, b: Path, tolerance: float) -> bool:
    for name in ("model", "ema", "optimizer"):
        ours, theirs = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        if ours.keys() != theirs.keys() or not all(torch.allclose(ours[k], theirs[k], rtol=tolerance, atol=tolerance) for k in ours):
            return False
    return True


def test_ddp_and_fsdp_load_each_others_checkpoints(scenes_data, tiny, tmp_path):
    """Four steps under DDP, four under FSDP2, four under DDP again: the run that one rank makes in one go."""
    run = tmp_path / "run"
    words = ["--config", "quickstart", "--data", str(scenes_data), "--out", str(run), "--resume", "latest", *tiny, *STEADY, "--train.micro_batch", "2"]
    jobs = [{"train": [*words, "--train.parallel", how, "--train.steps", steps]} for how, steps in (("ddp", "4"), ("fsdp", "8"), ("ddp", "12"))]
    results, errors = ranks(2, jobs, tmp_path / "out")
    assert [job["status"] for rank in results for job in rank] == [0] * 6, errors
    train(resolve("quickstart", [*tiny, *STEADY, "--train.steps", "12"]), scenes_data, tmp_path / "one", progress=False)
    one, two = losses(tmp_path / "one"), losses(run)
    assert list(one) == list(two) == list(range(1, 13))
    assert np.allclose(list(one.values()), list(two.values()), rtol=1e-5, atol=0), (one, two)
    assert same_weights(checkpoint.folder(run, 12), checkpoint.folder(tmp_path / "one", 12), 1e-3)
    for job in range(3):  # rows of different ranks have different noise
        for rows in stream_of(results, job).values():
            assert len({noise for _, noise in rows}) == len(rows) == 8


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_ranks_take_the_course_of_one(scenes_data, tiny, tmp_path):
    """Two steps compiled under DDP, two under FSDP2, as one rank makes them uncompiled."""
    run = tmp_path / "run"
    words = ["--config", "quickstart", "--data", str(scenes_data), "--out", str(run), "--resume", "latest", *tiny, *STEADY, "--train.compile", "on"]
    results, errors = ranks(
        2, [{"train": [*words, "--train.parallel", how, "--train.steps", steps]} for how, steps in (("ddp", "2"), ("fsdp", "4"))], tmp_path / "out"
    )
    assert [job["status"] for rank in results for job in rank] == [0] * 4, errors
    train(resolve("quickstart", [*tiny, *STEADY, "--train.compile", "off", "--train.steps", "4"]), scenes_data, tmp_path / "one", progress=False)
    one, two = losses(tmp_path / "one"), losses(run)
    assert list(one) == list(two) == [1, 2, 3, 4] and np.allclose(list(one.values()), list(two.values()), rtol=1e-3, atol=0), (one, two)


def test_fsdp_alone_continues_exactly(scenes_data, tiny, tmp_path):
    """Losses and state of an interrupted FSDP2 run equal those of an uninterrupted one, with evaluations between; Muon and dopri5 are refused in one line."""
    words = ["--config", "quickstart", "--data", str(scenes_data), "--resume", "latest", *tiny, *STEADY, "--train.parallel", "fsdp", "--train.eval_every", "2"]
    jobs = [{"train": [*words, "--out", str(tmp_path / name), "--train.steps", steps]} for name, steps in (("whole", "6"), ("part", "3"), ("part", "6"))]
    jobs.append({"train": [*words, "--out", str(tmp_path / "muon"), "--optim.name", "muon"]})
    jobs.append({"train": [*words, "--out", str(tmp_path / "raw"), "--train.ema", "0", "--train.steps", "4"]})
    jobs.append({"train": [*words, "--out", str(tmp_path / "adaptive"), "--sample.solver", "dopri5"]})
    results, errors = ranks(2, jobs, tmp_path / "out")
    assert [[job["status"] for job in rank] for rank in results] == [[0, 0, 0, 2, 0, 2]] * 2, errors
    assert "evaluation at step" not in errors and "optim.name muon needs whole matrices" in errors and "dopri5 takes as many passes" in errors
    assert compare(tmp_path / "whole", tmp_path / "part")["equal"] and len(losses(tmp_path / "part")) == 6


def test_three_ranks_continue_exactly(scenes_data, tiny, tmp_path):
    """Where the sum of three ranks rounds by its place in a bucket, which DDP lays anew after its first gradient; with and without a dry run."""
    words = ["--config", "quickstart", "--data", str(scenes_data), "--resume", "latest", *tiny, *STEADY, "--data.batch_size", "12"]
    starts = [("whole", "4", "true"), ("part", "2", "true"), ("part", "4", "true"), ("rash", "4", "false")]
    jobs = [{"train": [*words, "--out", str(tmp_path / name), "--train.steps", steps, "--train.dry_run", dry]} for name, steps, dry in starts]
    results, errors = ranks(3, jobs, tmp_path / "out")
    assert [[job["status"] for job in rank] for rank in results] == [[0] * 4] * 3, errors
    assert compare(tmp_path / "whole", tmp_path / "part")["equal"] and compare(tmp_path / "whole", tmp_path / "rash")["equal"]


def test_the_dry_run_changes_nothing(scenes_data, tiny, tmp_path):
    """Under DDP with Muon and under FSDP2: weights, optimizer and random state after it, and the run with and without. Ranks that differ in
    speed make as many steps."""
    ways = {"ddp": ["--optim.name", "muon"], "fsdp": ["--optim.name", "adamw", "--train.parallel", "fsdp"]}
    jobs: list[dict] = []
    for name, way in ways.items():
        words = [*tiny, *STEADY, *way, "--train.micro_batch", "2"]
        jobs.append({"rehearse": [str(tmp_path / f"{name}-looked"), str(scenes_data), words]})
        for dry in ("true", "false"):
            place = ["--config", "quickstart", "--data", str(scenes_data), "--out", str(tmp_path / f"{name}-{dry}")]
            jobs.append({"train": [*place, *words, "--train.steps", "2", "--train.dry_run", dry]})
    results, errors = ranks(2, jobs, tmp_path / "out")
    unchanged = {"weights": True, "random": True, "state": 0, "steps": 2}
    for rank in results:
        assert [rank[k] for k in (0, 3)] == [unchanged] * 2 and [rank[k]["status"] for k in (1, 2, 4, 5)] == [0] * 4, errors
    for name in ways:
        assert compare(tmp_path / f"{name}-true", tmp_path / f"{name}-false")["equal"]
        assert not (tmp_path / f"{name}-true" / ".dry-run").exists()


def test_what_every_rank_would_say_is_said_once(scenes_data, tiny, tmp_path):
    """Mistakes in settings and data, and a checkpoint that does not fit: one line, status 2 on every rank."""
    base = ["--config", "quickstart", *tiny, *STEADY, "--train.steps", "1"]
    place = ["--data", str(scenes_data), "--out", str(tmp_path / "run"), "--resume", "latest"]
    faults = [
        ([*place, "--optim.lr", "fast"], "--optim.lr 'fast'"),
        (["--data", str(tmp_path / "nowhere")], "no dataset"),
        ([*place, "--data.batch_size", "7"], "cannot be spread over 2 ranks"),
        ([*place, "--model.width", "32"], "model.width"),
    ]
    results, errors = ranks(2, [{"train": [*base, *place]}, *({"train": [*base, *more]} for more, _ in faults)], tmp_path / "out")
    assert [[job["status"] for job in rank] for rank in results] == [[0, 2, 2, 2, 2]] * 2, errors
    told = [line for line in errors.splitlines() if line.startswith("flowt2i train: error:")]
    assert len(told) == 4 and all(text in line for line, (_, text) in zip(told, faults)), errors


def test_pictures_that_fail_on_one_rank_of_a_sharded_model(scenes_data, tiny, tmp_path):
    """The first of two batches on rank 1 is not finite: an error on both ranks, none waits for the other, and the next pictures come. Also of
    those that are scored, and where rank 1 alone has no feature net."""
    words = [*tiny, *STEADY, "--train.parallel", "fsdp"]
    results, errors = ranks(2, [{"pictures": [str(tmp_path / "run"), str(scenes_data), words]}], tmp_path / "out")
    assert [rank[0]["error"] for rank in results] == ["another rank could not draw its pictures", "not finite"], errors
    assert all(rank[0]["empty"] and rank[0]["shape"] == rank[0]["again"] == [4, 64, 64, 3] for rank in results)
    assert all(rank[0]["scored"] == "not finite" and rank[0]["net"] == "no net" and rank[0]["together"] is False for rank in results)


def test_kernel_distance_while_training_over_ranks(scenes_data, tiny, tmp_path):
    """40 pictures in blocks of 16: each of two ranks draws 24 of them (the last block both), and the number is that of one rank. Where the ranks' clocks
    disagree about the next evaluation, rank 0's counts."""
    job = [str(tmp_path / "run"), str(scenes_data), [*tiny, "--train.score_images", "40"]]
    results, errors = ranks(2, [{"kernel": job}], tmp_path / "out")
    one = kernel(str(tmp_path / "one"), *job[1:])
    assert one["drawn"] == 40 and [rank[0]["drawn"] for rank in results] == [24, 24], errors
    assert one["kid_error"] > 0 and abs(one["kid"]) > 1e-4
    for rank in results:
        assert rank[0]["kid"] == pytest.approx(one["kid"], rel=1e-6) and rank[0]["kid_error"] == pytest.approx(one["kid_error"], rel=1e-6)
        assert rank[0]["due"] == [True, False]


def test_a_disk_slower_than_the_ranks_patience(tmp_path):
    """A write of three seconds where ranks give up after one: saves, the wait for the last and a rehearsal go through."""
    results, errors = ranks(2, [{"slow_disk": [str(tmp_path / "run"), "", []]}], tmp_path / "out")
    assert [rank[0] for rank in results] == [[1, 2]] * 2, errors


@pytest.mark.parametrize("words", [["--config", "quickstart", "--optim.lr", "fast"], ["--config"]])
def test_the_first_rank_of_each_node_says_its_own_mistake(words, monkeypatch, capsys):
    """In settings, and in what argparse looks at; rank 0 may be on another node, where all is well."""
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    for rank, local, lines in (("0", "0", 1), ("1", "1", 0), ("2", "0", 1), ("3", "1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        try:
            status = cli.main(["train", *words])
        except SystemExit as end:
            status = end.code
        assert status == 2 and len(capsys.readouterr().err.splitlines()) == lines


def test_the_first_that_meets_a_mistake_says_it(monkeypatch):
    """Rank 0 may not meet it at all."""
    monkeypatch.setattr(distributed, "_store", torch.distributed.HashStore())
    spoke = []
    for rank in "325":
        monkeypatch.setenv("RANK", rank)
        spoke.append(not isinstance(distributed.said_once(UserError("no VAE")), distributed.ToldElsewhere))
        assert not isinstance(distributed.said_once(UserError(f"only rank {rank}")), distributed.ToldElsewhere)
    assert spoke == [True, False, False]


def test_a_lack_of_memory_within_nccl_is_no_lost_rank(monkeypatch):
    nccl = torch.distributed.DistBackendError
    short, lost = nccl("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"), nccl("NCCL error: remote process exited")
    assert not distributed.lost_rank(lost)  # one process
    monkeypatch.setattr(distributed, "_store", torch.distributed.HashStore())
    assert distributed.lost_rank(lost) and not distributed.lost_rank(short)


def test_accumulation_reduces_gradients_once_a_step(scenes_data, tiny, tmp_path):
    """Four micro-batches send no more gradients than one; under FSDP2 each unit with tensors (2 blocks, caption block and encoder, model) once."""
    cases = [(how, micro) for how in ("ddp", "fsdp") for micro in ("4", "1")]
    words = lambda how, micro: [*tiny, "--optim.name", "adamw", "--train.parallel", how, "--train.micro_batch", micro]
    jobs = [{"collectives": [str(tmp_path / f"{how}-{micro}"), str(scenes_data), words(how, micro)]} for how, micro in cases]
    results, _ = ranks(2, jobs, tmp_path / "out")
    for (how, micro), sent in zip(cases, results[0]):
        assert sent["accumulation"] == 4 // int(micro) and sent["kind"] == ("DTensor" if how == "fsdp" else "Parameter")
        gradients = sent.get("_reduce_scatter_base_", 0) if how == "fsdp" else sent["allreduce_"] - 1  # the one more is what the ranks agree on
        assert gradients == (5 if how == "fsdp" else 1), sent


@pytest.mark.slow
def test_one_two_four_two_ranks_make_one_run(scenes_data, tiny, tmp_path):
    """The number of ranks changes with every resume (four of them under FSDP2): the same samples and noise a step, the same losses to 1e-5."""
    words = ["--config", "quickstart", "--data", str(scenes_data), *tiny, *STEADY, "--train.parallel", "ddp"]
    job = lambda name, steps: [{"train": [*words, "--out", str(tmp_path / name), "--resume", "latest", "--train.steps", str(steps)]}]
    whole = stream_of(ranks(1, job("whole", 12), tmp_path / "all")[0], 0)
    pieces: dict[int, list[tuple[int, float]]] = {}
    for size, steps in ((1, 3), (2, 6), (4, 9), (2, 12)):
        words[-1] = "fsdp" if size == 4 else "ddp"
        pieces |= stream_of(ranks(size, job("pieces", steps), tmp_path / f"{size}-{steps}")[0], 0)
    assert pieces == whole and list(pieces) == list(range(12))
    a, b = losses(tmp_path / "whole"), losses(tmp_path / "pieces")
    assert list(a) == list(b) and np.allclose(list(a.values()), list(b.values()), rtol=1e-5, atol=0), (a, b)


def test_a_fault_on_one_rank_stops_all(scenes_data, tiny, tmp_path):
    """What is not finite, a full disk, a signal, the time: one rank meets it, all stop at one step with one message."""
    words = ["--config", "quickstart", "--data", str(scenes_data), *tiny, *STEADY, "--train.steps", "9", "--train.checkpoint_every", "2"]
    words += ["--train.dry_run", "false"]  # it would meet the full disk first
    faults = [("loss", 1, 3), ("gradient", 1, 3), ("disk", 0, 0), ("signal", 1, 3), ("late", 1, 3)]
    jobs = [{"train": [*words, "--out", str(tmp_path / kind)], "fault": [kind, rank, step]} for kind, rank, step in faults]
    results, errors = ranks(2, jobs, tmp_path / "out")
    assert [[job["status"] for job in rank] for rank in results] == [[2, 2, 2, 3, 3]] * 2, errors
    told = [line for line in errors.splitlines() if line.startswith("flowt2i train:")]
    assert len(told) == 5, errors
    for message, kind, job in zip(told, ("loss", "gradient"), (0, 1)):
        samples = [sample for note in results[1][job]["seen"] if note["step"] == 3 for sample in note["samples"]][:4]
        assert f"not finite at step 3 (samples of rank 1: {samples})" in message
        assert checkpoint.list_steps(tmp_path / kind) == [2] and checkpoint.damage(checkpoint.folder(tmp_path / kind, 2)) is None
    assert "No space left on device" in told[2] and "MiB needed" in told[2] and checkpoint.list_steps(tmp_path / "disk") == []
    assert "stopped by a signal at step 4" in told[3] and checkpoint.list_steps(tmp_path / "signal") == [2, 4]
    assert "at step 4" in told[4] and checkpoint.list_steps(tmp_path / "late") == [2, 4]


def test_memory_short_on_one_rank_shrinks_all(scenes_data, tiny, tmp_path):
    """Rank 1 holds one image at a time: both ranks go on with micro-batches of one, and the losses stay. Under FSDP2 where both do so;
    where one alone does, one line within a bounded time.
    """
    words = ["--config", "quickstart", "--data", str(scenes_data), *tiny, *STEADY, "--train.steps", "3", "--train.timeout_s", "16"]
    jobs = [{"train": [*words, "--out", str(tmp_path / "short")], "fault": ["memory", 1, 1]}, {"train": [*words, "--out", str(tmp_path / "ample")]}]
    words += ["--train.parallel", "fsdp"]
    jobs.append({"train": [*words, "--out", str(tmp_path / "fsdp")], "fault": ["memory", -1, 1]})
    jobs.append({"train": [*words, "--out", str(tmp_path / "one")], "fault": ["memory", 1, 1]})  # last: rank 0 is freed by the end of rank 1
    results, errors = ranks(2, jobs, tmp_path / "out")
    assert [[job["status"] for job in rank] for rank in results] == [[0, 0, 0, 2]] * 2, errors
    assert errors.count("out of memory with a micro-batch of 4: going on with 2 x 2 accumulation") == 1  # FSDP2 halves and starts again
    assert errors.count("out of memory with a micro-batch of 4: going on with 1 x 4 accumulation") == 1
    assert errors.count("rank 1 ran out of memory with a micro-batch of 4, rank 0 did not: choose a smaller --train.micro_batch") == 1
    for name in ("short", "fsdp"):
        assert json.loads((tmp_path / name / "config.json").read_text())["resolved"]["micro_batch"] == 1
        assert np.allclose(list(losses(tmp_path / name).values()), list(losses(tmp_path / "ample").values()), rtol=1e-5, atol=0)


def test_evaluation_over_ranks_gives_what_one_rank_gives(scenes_data, tiny, tmp_path):
    """The loss to the last bit, with a number of batches that two ranks cannot share evenly; the score of the same pictures."""
    words = [*tiny, "--train.steps", "3", "--train.eval_images", "5", "--train.eval_every", "0", "--sample.images", "3", "--train.score_prompts", "5"]
    train(resolve("quickstart", words), scenes_data, tmp_path / "run", progress=False)
    source = str(checkpoint.folder(tmp_path / "run", 3))
    results, _ = ranks(2, [{"evaluate": [source, str(scenes_data), words]}], tmp_path / "out")
    trainer = Trainer(resolve("quickstart", words), scenes_data, tmp_path / "one", source, progress=False)
    one = evaluate(trainer, None, last=True)
    trainer.close()
    waited = [values.pop("eval_s") for values in (one, *(rank[0]["values"] for rank in results))]
    assert results[0][0]["values"] == results[1][0]["values"] == json.loads(json.dumps(one)) and min(waited) > 0
    assert results[0][0]["uneven"] == results[1][0]["uneven"] == uneven_validation(trainer.world)
    assert set(one) == {"validation", "validation_ema", "score"}
