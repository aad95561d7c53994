"""Faults really injected into real trainings: kills, signals, lost ranks, foreign checkpoints. What the run loses: nothing.

`docs/running.md` lists the faults by number. The slow ones start whole processes; the steps at which they are killed are random, but seeded.
"""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET
from safetensors.torch import save_file

from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.training import checkpoint, distributed, loop, stream
from flowt2i.training.loop import Stopped, Trainer, train
from flowt2i.verify_resume import compare, losses

ROOT = Path(__file__).parents[1]
LONG = 300  # seconds after which a wait has failed; nothing here is timed


# ---- starting and killing ---------------------------------------------------------------------------------------------


def words(data: Path, run: Path, tiny: list[str], *more: str) -> list[str]:
    """The one command that starts, and starts again."""
    return ["train", "--config", "quickstart", "--data", str(data), "--out", str(run), "--resume", "latest", *tiny, *QUIET, *more]


def launch(command: list[str], log: Path, *torchrun: str, **env: str) -> subprocess.Popen:
    """`flowt2i COMMAND` in a process group of its own, under torchrun where arguments for it are given. What it says goes into a file."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "flowt2i.cli", *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def launch_two(command: list[str], log: Path) -> list[subprocess.Popen]:
    """Two ranks without a launcher, so that each one's own exit status can be seen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [launch(command, log, RANK=rank, LOCAL_RANK=rank, **place) for rank in ("0", "1")]


def wait_until(condition: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Poll; AssertionError where a process ends first or it takes too long."""
    end = time.monotonic() + LONG
    while not condition():
        assert all(process.poll() is None for process in processes), "ended too early"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def last_step(run: Path) -> int:
    """The newest whole line of the log; 0 where there is none."""
    try:
        lines = (run / "log.jsonl").read_text().split("\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except FileNotFoundError:
        return 0


def kill_group(process: subprocess.Popen) -> None:
    """The process with all of its group, and torchrun's ranks, which have groups of their own."""
    ranks = children_of(process)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(LONG)


def children_of(process: subprocess.Popen) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listed.read_text().split()] if listed.exists() else []


def ranks_of(launcher: subprocess.Popen) -> dict[str, int]:
    """Process ids of a torchrun's ranks by rank."""
    found = {}
    for pid in children_of(launcher):
        with contextlib.suppress(OSError):  # it may end meanwhile
            variables = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
            if "RANK" in variables:
                found[variables["RANK"]] = pid
    return found


@pytest.fixture
def leftovers() -> Iterator[list[subprocess.Popen]]:
    """Processes that a failing test must not leave behind."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            kill_group(process)


def assert_same(a: Path, b: Path) -> None:
    result = compare(a, b)
    assert result["equal"], [line for line in result["losses"] if line["uninterrupted"] != line["interrupted"]] or result["tensors"]


# ---- 1, 9: killed ------------------------------------------------------------------------------------------------------

KILLS = 20


@pytest.mark.slow
def test_fault_1_killed_twenty_times(scenes_data, tiny, tmp_path, leftovers):
    """kill -9 of the process group at 20 random times, the same command again each time: every loss and every tensor as if nothing had been."""
    settings = ["--train.steps", "320", "--train.checkpoint_every", "4", "--train.ema", "0.99"]
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert launch(words(scenes_data, whole, tiny, *settings), log).wait(LONG) == 0
    dice, killed = random.Random(1), 0
    while killed < KILLS:
        resumed = max(checkpoint.list_steps(run), default=0)
        target = resumed + dice.randint(5, 12)
        process = launch(words(scenes_data, run, tiny, *settings), log)
        leftovers.append(process)
        wait_until(lambda: last_step(run) >= target, process)  # noqa: B023
        time.sleep(dice.uniform(0, 0.05))  # anywhere in a step or a save
        assert process.poll() is None
        kill_group(process)
        killed += 1
    assert launch(words(scenes_data, run, tiny, *settings), log).wait(LONG) == 0
    assert list(losses(run)) == list(range(1, 321))
    assert_same(whole, run)


KILLED_AT = """
import os, signal, sys
from flowt2i import cli
from flowt2i.training.loop import Trainer
step = Trainer._step
def deadly(self, *args):
    if self.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)
Trainer._step = deadly
cli.run(sys.argv[2:])
"""


@pytest.mark.slow
def test_fault_9_killed_in_the_second_epoch(scenes_data, tiny, tmp_path):
    """The order of the epoch goes on where it was: no sample comes twice, none is left out."""
    from flowt2i.data.dataset import ImageTextDataset

    count = len(ImageTextDataset(scenes_data))
    second = count // 8 + 3  # a step within the second epoch
    settings = ["--train.steps", str(second + 6), "--train.checkpoint_every", "1"]
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED_AT, str(second), *words(scenes_data, run, tiny, *settings)], cwd=ROOT, timeout=LONG)
    assert done.returncode == -signal.SIGKILL
    config = resolve("quickstart", [*tiny, *QUIET, *settings])
    trainer = Trainer(config, scenes_data, run, "latest", progress=False)
    assert count < trainer.step * 8 < 2 * count
    batches = iter(trainer._loader())
    seen = np.concatenate([next(batches).index.numpy() for _ in range(4)])
    start = trainer.step * 8 - count
    assert np.array_equal(seen, stream.permutation(0, 1, count)[start : start + 32])
    trainer.close()
    train(config, scenes_data, run, "latest", progress=False)
    train(config, scenes_data, tmp_path / "whole", progress=False)
    assert_same(tmp_path / "whole", run)


# ---- 3: signals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(scenes_data, tiny, tmp_path_factory) -> Path:
    """An uninterrupted run on two gloo ranks, to compare with."""
    folder = tmp_path_factory.mktemp("two")
    ranks = launch_two(words(scenes_data, folder / "run", tiny, *TWO), folder / "log")
    assert [rank.wait(LONG) for rank in ranks] == [0, 0], (folder / "log").read_text()[-2000:]
    return folder / "run"


TWO = ["--train.steps", "80", "--train.checkpoint_every", "20"]


def assert_saved_where_it_stopped(run: Path, whole: Path) -> None:
    stopped = last_step(run)
    assert 0 < stopped < 80
    assert checkpoint.newest_good(run) == checkpoint.folder(run, stopped)  # no step lost
    ours, theirs = losses(run), losses(whole)
    assert ours == {step: theirs[step] for step in range(1, stopped + 1)}


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_fault_3_signal_to_the_launcher(which, scenes_data, tiny, tmp_path, two_ranks, leftovers):
    run = tmp_path / "run"
    launcher = launch(words(scenes_data, run, tiny, *TWO), tmp_path / "log", "--standalone", "--nproc-per-node", "2")
    leftovers.append(launcher)
    wait_until(lambda: last_step(run) >= 4, launcher)
    launcher.send_signal(which)
    assert launcher.wait(LONG) == 1  # torchrun's own status for whatever its ranks return
    assert f"stopped by signal {which.value} at step {last_step(run)}" in (tmp_path / "log").read_text()
    assert_saved_where_it_stopped(run, two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_fault_3_signal_to_one_rank(rank, which, scenes_data, tiny, tmp_path, two_ranks, leftovers):
    run, log = tmp_path / "run", tmp_path / "log"
    ranks = launch_two(words(scenes_data, run, tiny, *TWO), log)
    leftovers += ranks
    wait_until(lambda: last_step(run) >= 4, *ranks)
    ranks[rank].send_signal(which)
    assert [process.wait(LONG) for process in ranks] == [3, 3], log.read_text()[-2000:]
    assert_saved_where_it_stopped(run, two_ranks)
    if rank == 1 and which == signal.SIGTERM:  # and the same command again ends where the uninterrupted run did
        again = launch_two(words(scenes_data, run, tiny, *TWO), log)
        leftovers += again
        assert [process.wait(LONG) for process in again] == [0, 0]
        assert_same(two_ranks, run)


# ---- 15: a rank is lost -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_fault_15_a_lost_rank_ends_the_others(how, scenes_data, tiny, tmp_path, leftovers):
    """A killed rank is noticed at once, a frozen one after the group's time-out."""
    run, log = tmp_path / "run", tmp_path / "log"
    ranks = launch_two(words(scenes_data, run, tiny, *TWO, "--train.steps", "2000", "--train.timeout_s", "20"), log)
    leftovers += ranks
    wait_until(lambda: last_step(run) >= 22, *ranks)
    ranks[1].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    assert ranks[0].wait(LONG) == 2, log.read_text()[-2000:]
    assert "another rank was lost" in log.read_text() and "Traceback" not in log.read_text()
    assert checkpoint.newest_good(run) is not None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in Linux's /proc")
def test_fault_15_torchrun_restarts(scenes_data, tiny, tmp_path, two_ranks, leftovers):
    """With restarts a killed rank costs nothing: torchrun starts all again, and `--resume latest` goes on."""
    run, log = tmp_path / "run", tmp_path / "log"
    launcher = launch(words(scenes_data, run, tiny, *TWO), log, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    leftovers.append(launcher)
    for rank, step in (("1", 23), ("0", 45)):
        wait_until(lambda: last_step(run) >= step, launcher)  # noqa: B023
        victim = ranks_of(launcher)[rank]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: ranks_of(launcher).get(rank, victim) != victim, launcher)  # noqa: B023
    assert launcher.wait(LONG) == 0, log.read_text()[-3000:]
    assert_same(two_ranks, run)


# ---- 8, 11: loader processes, resumes of resumes -----------------------------------------------------------------------


class Interrupted(Trainer):
    """A training that gets SIGTERM during the steps in `at`."""

    at: tuple[int, ...] = ()

    def _step(self, *args):
        if self.step + 1 in self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._step(*args)


def lives(config: list[list[str]], data: Path, run: Path, at: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in several lives, each stopped by a signal during a step of `at` but the last; a configuration for each life."""
    monkeypatch.setattr(loop, "Trainer", Interrupted)
    monkeypatch.setattr(Interrupted, "at", at)
    for life in config[:-1]:
        with pytest.raises(Stopped):
            train(resolve("quickstart", life), data, run, "latest", progress=False)
    train(resolve("quickstart", config[-1]), data, run, "latest", progress=False)


@pytest.mark.slow
def test_fault_8_loader_processes_come_and_go(scenes_data, tiny, tmp_path, monkeypatch):
    config = [[*tiny, *QUIET, "--train.steps", "9", "--data.workers", workers] for workers in ("0", "4", "0")]
    train(resolve("quickstart", config[0]), scenes_data, tmp_path / "whole", progress=False)
    lives(config, scenes_data, tmp_path / "run", (3, 6), monkeypatch)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_fault_11_a_resume_of_a_resume_of_a_resume(scenes_data, tiny, tmp_path, monkeypatch):
    config = [*tiny, *QUIET, "--train.steps", "10", "--train.ema", "0.9"]
    train(resolve("quickstart", config), scenes_data, tmp_path / "whole", progress=False)
    lives([config] * 4, scenes_data, tmp_path / "run", (2, 3, 7), monkeypatch)
    assert_same(tmp_path / "whole", tmp_path / "run")


# ---- 13: checkpoints that do not fit ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(scenes_data, tiny, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(resolve("quickstart", [*tiny, *QUIET, "--train.steps", "2"]), scenes_data, run, progress=False)
    return run


@pytest.mark.parametrize("file", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_fault_13_foreign_tensors(fault, file, trained, scenes_data, tiny, tmp_path, capsys):
    """The manifest is right, the tensors are not this model's: exit 2, named, nothing trained."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    folder = checkpoint.folder(run, 2)
    tensors = checkpoint.load_tensors(folder / f"{file}.safetensors")
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        name = f"{name}_of_another_model" if file != "optimizer" else f"{name}_surplus"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, folder / f"{file}.safetensors")
    checkpoint.write_manifest(folder)
    assert main(words(scenes_data, run, tiny, "--train.steps", "3")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("flowt2i train: error:") and name in error and f"{file}.safetensors" in error
    assert last_step(run) == 2


# ---- 17, 18: refused before anything happens --------------------------------------------------------------------------


@pytest.mark.slow
def test_fault_17_a_second_run_in_one_folder(scenes_data, tiny, tmp_path, leftovers, capsys):
    run = tmp_path / "run"
    process = launch(words(scenes_data, run, tiny, "--train.steps", "100000"), tmp_path / "log")
    leftovers.append(process)
    wait_until(lambda: last_step(run) >= 1, process)
    assert main(words(scenes_data, run, tiny, "--train.steps", "100000")) == 2
    assert "another training is writing into" in capsys.readouterr().err
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == 3
    assert list(losses(run)) == list(range(1, last_step(run) + 1))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (["--optim.learning_rate", "1"], "did you mean"),
        (["--train.step", "5"], "did you mean 'train.steps'"),
        (["--optim.lr", "fast"], "--optim.lr 'fast'"),
        (["--data.batch_size", "7.5"], "--data.batch_size '7.5'"),
        (["--optim.name", "sgd"], "--optim.name 'sgd'"),
        (["--config", "quickstrat"], "did you mean 'quickstart'"),
    ],
)
def test_fault_18_mistakes_in_the_configuration(setting, told, tmp_path, capsys):
    """Before data is touched: there is none."""
    assert main(["train", "--config", "quickstart", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"), *setting]) == 2
    error = capsys.readouterr().err
    assert told in error and "nowhere" not in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_fault_18_an_indivisible_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "start", lambda *_: distributed.World(0, 2, torch.device("cpu")))
    assert main(["train", "--config", "quickstart", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"), "--data.batch_size", "33"]) == 2
    error = capsys.readouterr().err
    assert "data.batch_size 33 cannot be spread over 2 ranks" in error and "nowhere" not in error


# ---- 27: pickles from strangers ---------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_fault_27_a_malicious_pt_is_refused(scenes_data, tiny, tmp_path, capsys):
    marker, bomb = tmp_path / "was-unpickled", tmp_path / "model.pt"
    bomb.write_bytes(pickle.dumps(Bomb(marker)))
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("model.safetensors", "pytorch_model.bin", "optimizer.pt", ".metadata"):
        (folder / name).write_bytes(bomb.read_bytes())
    (folder / "config.json").write_text("{}")
    signed = tmp_path / "signed"  # even with a manifest that vouches for it
    shutil.copytree(folder, signed)
    checkpoint.write_manifest(signed)
    for path in (bomb, folder, signed):
        assert main(["train", "--config", "quickstart", "--data", str(scenes_data), "--out", str(tmp_path / "run"), "--resume", str(path), *tiny]) == 2
        assert main(["generate", "a red circle", "--model", str(path), "--out", str(tmp_path / "x.png")]) == 2
        assert main(["evaluate", "--model", str(path)]) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "x.png").exists()


def test_fault_27_pickles_beside_a_good_checkpoint_are_not_read(trained, scenes_data, tiny, tmp_path):
    marker, run = tmp_path / "was-unpickled", tmp_path / "run"
    shutil.copytree(trained, run)
    folder = checkpoint.folder(run, 2)
    for name in ("model.pt", "optimizer.pt", "rng.pkl", ".metadata", "tokenizer/tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    assert main(words(scenes_data, run, tiny, "--train.steps", "3")) == 0
    assert main(["generate", "a red circle", "--model", str(folder), "--out", str(tmp_path / "x.png"), "--steps", "1"]) == 0
    assert not marker.exists() and last_step(run) == 3
