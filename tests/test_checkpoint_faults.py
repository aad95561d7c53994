"""Saves that are killed, disks that fill up, bytes that flip: the last complete checkpoint is always there."""

import os
import random
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flowt2i import cli
from flowt2i.errors import UserError
from flowt2i.training import checkpoint
from flowt2i.training.distributed import World
from flowt2i.training.saver import Saver

ONE = World(0, 1, torch.device("cpu"))
TEXTS = {"config.json": "{}", "state.json": "{}"}


def tensors(value: float, numbers: int = 16) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"weight": torch.full((numbers,), value)} for name in ("model", "ema", "optimizer")}


def value(path: Path) -> float:
    return float(checkpoint.load_tensors(path / "model.safetensors")["weight"][0])


def killed(call: int, after: bool, work: Callable[[], object]) -> bool:
    """Do the work in a child process that is killed before or after its n-th call that touches the disk. False: it made fewer calls."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = call

    def deadly(function: Callable) -> Callable:
        def counting(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counting

    for place, name in (
        (checkpoint, "save_tensors"),
        (os, "fsync"),
        (os, "replace"),
        (os, "mkdir"),
        (Path, "write_text"),
        (shutil, "rmtree"),
        (shutil, "copytree"),
    ):
        setattr(place, name, deadly(getattr(place, name)))
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_moment_of_a_save(tmp_path, after):
    """A new checkpoint, then pruning: what is found is the old one or the new one, whole; and saving goes on."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    call, found = 0, []
    while True:
        run = tmp_path / f"run{call}"
        checkpoint.save(run, 1, tensors(1.0), TEXTS, {"tokenizer": tmp_path / "tokenizer"})
        saver = Saver(ONE, run, keep_recent=1, keep_every=0)
        if not killed(call, after, lambda saver=saver: (saver.save(2, tensors(2.0), TEXTS, {"tokenizer": tmp_path / "tokenizer"}), saver.settle())):
            break
        checkpoint.recover(run)
        assert not list((run / "checkpoints").glob("*.tmp"))
        found.append(value(checkpoint.newest_good(run)))
        checkpoint.save(run, 2, tensors(3.0), TEXTS, {})
        assert value(checkpoint.newest_good(run)) == 3.0
        call += 1
    assert call > 15 and set(found) == {1.0, 2.0} and found == sorted(found)


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    """Files, the folders that name them, then the new name; and the folder of all checkpoints where it is new."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    run, synced = tmp_path / "run", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(run).as_posix()), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (synced.append("renamed"), replace(a, b)))
    written = checkpoint.save(run, 1, tensors(1.0), TEXTS, {"tokenizer": tmp_path / "tokenizer"})
    aside = "checkpoints/.step_00000001.tmp"
    names = [path.relative_to(written).as_posix() for path in written.rglob("*")]
    assert synced[0] == "." and synced[-2:] == ["renamed", "checkpoints"] and synced[-3] == aside
    assert {f"{aside}/{name}" for name in names} | {aside} == set(synced[1:-2]) and f"{aside}/tokenizer" in synced


@pytest.mark.parametrize("after", [False, True])
def test_killed_while_a_checkpoint_is_replaced(tmp_path, after):
    """The only checkpoint is written again at the same step: at no moment is there none, for one who reads or one who resumes."""
    call, found = 0, []
    while True:
        run = tmp_path / f"run{call}"
        checkpoint.save(run, 1, tensors(1.0), TEXTS, {})
        if not killed(call, after, lambda run=run: checkpoint.save(run, 1, tensors(2.0), TEXTS, {})):
            break
        found.append(value(checkpoint.find(run)))
        checkpoint.recover(run)
        assert value(checkpoint.newest_good(run)) == found[-1] and checkpoint.list_steps(run) == [1]
        assert not list((run / "checkpoints").glob("*.*"))
        call += 1
    assert set(found) == {1.0, 2.0} and found == sorted(found)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("surprise", [False, True])
def test_a_full_disk(small_disk, monkeypatch, surprise):
    """Known before the write, or met in the middle of it: one line with the path and what is needed, and the earlier checkpoint loads."""
    million = 1 << 20
    checkpoint.save(small_disk, 1, tensors(1.0, 2 * million), TEXTS, {})  # 24 MiB
    (small_disk / "other").write_bytes(bytes(30 * million))
    if surprise:  # something else takes the space after the look at it
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1 << 40))
    saver = Saver(ONE, small_disk, keep_recent=1, keep_every=0)
    saver.save(2, tensors(2.0, 2 * million), TEXTS, {})
    with pytest.raises(UserError) as error:
        saver.wait()
    assert str(small_disk / "checkpoints") in str(error.value) and "25 MiB needed" in str(error.value) and "\n" not in str(error.value)
    assert value(checkpoint.newest_good(small_disk)) == 1.0 and not list((small_disk / "checkpoints").glob("*.tmp"))
    (small_disk / "other").unlink()
    monkeypatch.undo()
    checkpoint.save(small_disk, 2, tensors(2.0, 2 * million), TEXTS, {})
    assert value(checkpoint.newest_good(small_disk)) == 2.0


def test_a_byte_flipped_at_a_hundred_places_and_every_file_cut(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(1.0), TEXTS, {})
    good, broken = checkpoint.folder(tmp_path, 1), checkpoint.save(tmp_path, 2, tensors(2.0), TEXTS, {})
    files = sorted(broken.iterdir())  # the manifest too
    places = [(file, offset) for file in files for offset in range(file.stat().st_size)]
    chosen = random.Random(0).sample(places, 100)
    assert {file.name for file, _ in chosen} >= {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    changes = [(file, lambda content, at=at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]) for file, at in chosen]
    changes += [(file, lambda content, n=n: content[:n]) for file in files for n in (0, 1, file.stat().st_size - 1)]
    for file, change in changes:
        content = file.read_bytes()
        file.write_bytes(change(content))
        with pytest.warns(UserWarning, match="step_00000002 is damaged"):
            assert checkpoint.newest_good(tmp_path) == good
        file.write_bytes(content)
    assert checkpoint.newest_good(tmp_path) == broken


def test_all_checkpoints_damaged_is_exit_2(scenes_data, tiny, tmp_path, capsys):
    words = ["train", "--config", "quickstart", "--data", str(scenes_data), "--out", str(tmp_path), *tiny, "--train.eval_every", "0", "--train.steps"]
    assert cli.main([*words, "2", "--train.checkpoint_every", "1"]) == 0
    for step in (1, 2):
        file = checkpoint.folder(tmp_path, step) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main([*words, "3", "--resume", "latest"]) == 2
    assert "all 2 checkpoints" in capsys.readouterr().err and checkpoint.list_steps(tmp_path) == [1, 2]


class TestSaver:
    def test_what_was_copied_is_written_whatever_training_does_next(self, tmp_path, monkeypatch):
        import threading

        go, write = threading.Event(), checkpoint.save_tensors
        monkeypatch.setattr(checkpoint, "save_tensors", lambda *args: (go.wait(), write(*args)))
        state, saver = tensors(1.0), Saver(ONE, tmp_path, keep_recent=2, keep_every=0)
        for step in (1, 2):
            go.clear()
            saver.save(step, state, TEXTS, {})  # returns although nothing is written yet
            assert checkpoint.list_steps(tmp_path) == list(range(1, step))
            for named in state.values():
                named["weight"].add_(1.0)  # the optimizer goes on
            go.set()
            saver.wait()
            assert value(checkpoint.folder(tmp_path, step)) == float(step)
        assert [report["step"] for report in saver.reports] == [1, 2]
        assert saver.summary()["checkpoints"] == 2 and saver.summary()["longest_write_s"] >= saver.reports[0]["write_s"]

    def test_nothing_is_pruned_for_one_that_does_not_read_back(self, tmp_path, monkeypatch):
        saver = Saver(ONE, tmp_path, keep_recent=1, keep_every=0)
        saver.save(1, tensors(1.0), TEXTS, {})
        saver.wait()
        manifest = checkpoint.write_manifest
        monkeypatch.setattr(checkpoint, "write_manifest", lambda path: (manifest(path), (path / "state.json").write_text("[]")))
        saver.save(2, tensors(2.0), TEXTS, {})
        with pytest.raises(UserError, match="does not read back"):
            saver.wait()
        with pytest.warns(UserWarning, match="damaged"):
            assert value(checkpoint.newest_good(tmp_path)) == 1.0

    def test_a_failure_stops_the_training_at_the_next_step(self, scenes_data, tiny, tmp_path, monkeypatch, capsys):
        real = checkpoint.save_tensors

        def save_tensors(tensors, path):
            if ".dry-run" not in path.parts:
                raise OSError(5, "Input/output error")
            real(tensors, path)

        monkeypatch.setattr(checkpoint, "save_tensors", save_tensors)
        words = ["--data", str(scenes_data), "--out", str(tmp_path), *tiny, "--train.eval_every", "0", "--train.steps", "500", "--train.checkpoint_every", "1"]
        assert cli.main(["train", "--config", "quickstart", *words]) == 2
        errors = capsys.readouterr().err
        assert "Input/output error" in errors and str(checkpoint.folder(tmp_path, 1)) in errors and checkpoint.list_steps(tmp_path) == []

    def test_no_memory_for_the_copy(self, tmp_path, monkeypatch):
        saver = Saver(ONE, tmp_path, keep_recent=1, keep_every=0)
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
        saver.reserve(tensors(1.0))
        saver.settle()
        saver.save(1, tensors(1.0), TEXTS, {})
        with pytest.raises(UserError, match="no main memory for a copy"):
            saver.wait()
