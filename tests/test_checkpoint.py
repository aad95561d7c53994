"""Checkpoints: complete or absent, damage noticed, nothing unpickled."""

import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from flowt2i.errors import UserError
from flowt2i.training import checkpoint


def write(run: Path, step: int) -> Path:
    tensors = {"model": {"weight": torch.full((4, 4), float(step))}}
    tokenizer = run / "tok"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    return checkpoint.save(run, step, tensors, {"config.json": "{}", "state.json": f'{{"step": {step}}}'}, {"tokenizer": tokenizer})


def test_round_trip_and_pruning(tmp_path):
    for step in range(1, 9):
        write(tmp_path, step)
        checkpoint.prune(tmp_path, keep_recent=2, keep_every=4)
    assert checkpoint.list_steps(tmp_path) == [4, 7, 8]
    newest = checkpoint.newest_good(tmp_path)
    assert newest == checkpoint.folder(tmp_path, 8) and checkpoint.read_state(newest) == {"step": 8}
    assert torch.equal(checkpoint.load_tensors(newest / "model.safetensors")["weight"], torch.full((4, 4), 8.0))


def test_weights_can_be_read_by_whoever_can_read_the_files_beside_them(tmp_path):
    before = os.umask(0o027)
    try:
        saved = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert stat.filemode((saved / "model.safetensors").stat().st_mode) == "-rw-r-----", "safetensors alone writes for the owner only"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "state.json", "tokenizer/tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_passed_over(tmp_path, name, how):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.newest_good(tmp_path) == checkpoint.folder(tmp_path, 1)


@pytest.mark.parametrize("lost", ["model.safetensors", "manifest.json"])
def test_all_damaged_never_starts_over(tmp_path, lost):
    for step in (1, 2):
        (write(tmp_path, step) / lost).unlink()
    with pytest.warns(UserWarning), pytest.raises(UserError, match="all 2 checkpoints"):
        checkpoint.newest_good(tmp_path)


def test_half_written_checkpoints_do_not_count(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step_00000002.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_00000003").mkdir()
    assert checkpoint.list_steps(tmp_path) == [1]
    assert write(tmp_path, 3) == checkpoint.folder(tmp_path, 3)
    assert checkpoint.list_steps(tmp_path) == [1, 3]


def test_no_room_says_how_much_is_needed(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1 << 20))
    with pytest.raises(UserError, match=r"MiB needed, 1\.0 MiB free"):
        write(tmp_path, 2)
    assert checkpoint.newest_good(tmp_path) == checkpoint.folder(tmp_path, 1)


def test_strict_loading_names_the_tensor(tmp_path):
    from safetensors.torch import save_file

    net = nn.Linear(2, 3)
    good = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    for change, told in (({"weight": torch.zeros(3, 5)}, "weight.*shape"), ({"extra": torch.zeros(1)}, "extra")):
        save_file(good | change, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=told):
            checkpoint.load_into(net, tmp_path / "w.safetensors")
    save_file({"weight": torch.zeros(3, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="lacks 'bias'"):
        checkpoint.load_into(net, tmp_path / "w.safetensors")


class Bomb:
    def __reduce__(self):
        return (Path("/tmp/flowt2i-was-unpickled").touch, ())


def test_a_pickle_is_never_opened(tmp_path):
    marker = Path("/tmp/flowt2i-was-unpickled")
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        checkpoint.find(tmp_path / "model.pt")
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(tmp_path / "model.pt", tmp_path / "model.safetensors")
    checkpoint.write_manifest(tmp_path)
    with pytest.raises(UserError):
        checkpoint.load_tensors(checkpoint.find(tmp_path) / "model.safetensors")
    assert not marker.exists()


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no model"):
        checkpoint.find(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoint.find(tmp_path)


def test_what_was_cut_after_the_step_that_training_goes_on_from_is_moved_away(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    (checkpoint.folder(tmp_path, 2) / "manifest.json").unlink()
    assert [path.name for path in checkpoint.set_aside(tmp_path, 1)] == ["superseded_00000002"]
    assert checkpoint.newest_good(tmp_path) == checkpoint.folder(tmp_path, 1)  # and nothing is warned of
