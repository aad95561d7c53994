"""Preparation by several workers: the same bytes as by one, on one disk and on several, whoever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_prepare import contents, make_tar, noise_png, rows, run
from test_sources import write_tar

from flowt2i.cli import main
from flowt2i.data.merge import merge
from flowt2i.data.share import Share, parse_share
from flowt2i.data.writer import UnitWriter
from flowt2i.errors import UserError

ROOT = Path(__file__).parents[1]
WORDS = ["--image-size", "16", "--workers", "1", "--vocab-size", "300", "--unit-rows", "7"]
FEW = {"unit_rows": 7}


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Two tars, the second of which repeats ten samples of the first under other keys."""
    folder = tmp_path_factory.mktemp("tars")
    make_tar(folder / "0.tar", range(40))
    members: list = []
    for i in range(30, 75):
        members += [(f"second-{i:04d}.png", noise_png(i)), (f"second-{i:04d}.json", json.dumps({"prompt": f"noise number {i}"}).encode())]
    write_tar(folder / "1.tar", members)
    return folder


@pytest.fixture(scope="module")
def clean(tars, tmp_path_factory) -> dict[str, str]:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("clean") / "d"
    assert run(tars, out, **FEW)["dropped"] == {"duplicate": 10}
    return contents(out)


def start(tars: Path, out: Path, worker: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flowt2i", "prepare", str(tars), "--out", str(out), *WORDS, *words, *(["--worker", worker] if worker else [])]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- who does what


def test_every_unit_has_one_worker():
    for groups in (1, 2, 7, 12, 100):
        for of in (1, 2, 3, 5):
            for group in range(groups):
                for piece in range(9):
                    takers = [n for n in range(of) if Share(n, of).unit(group, piece, groups)]
                    assert len(takers) == 1 and Share(takers[0], of).group(group, groups)


def test_shares(monkeypatch):
    assert parse_share("0/2") == Share(0, 2) and parse_share("") == Share()
    for wrong in ("2/2", "-1/2", "1", "a/b", "0/0", "1/2/3"):
        assert "I/N" in refused(lambda wrong=wrong: parse_share(wrong))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert parse_share("") == Share(1, 3) and parse_share("0/2") == Share(0, 2)


# ---- one disk


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_at_once_make_the_same_dataset(workers, tars, clean, tmp_path):
    children = [start(tars, tmp_path / "d", f"{i}/{workers}") for i in range(workers)]
    errors = [child.communicate(timeout=240)[1] for child in children]
    assert [child.returncode for child in children] == [0] * workers, errors
    assert contents(tmp_path / "d") == clean
    assert sum("whoever finishes last" in text for text in errors) <= workers - 1


def test_a_worker_killed_and_rerun(tars, clean, tmp_path):
    for worker in ("0/3", "1/3"):
        assert run(tars, tmp_path / "d", **FEW, worker=worker)["complete"] is False
    child = start(tars, tmp_path / "d", "2/3")
    deadline = time.monotonic() + 120
    before = len(list((tmp_path / "d/units").glob("*.json")))
    while len(list((tmp_path / "d/units").glob("*.json"))) == before and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    report = run(tars, tmp_path / "d", **FEW, worker="2/3")
    assert report["kept"] == 75 and contents(tmp_path / "d") == clean


def test_one_process_does_what_dead_workers_left(tars, clean, tmp_path):
    run(tars, tmp_path / "d", **FEW, worker="1/2")
    assert run(tars, tmp_path / "d", **FEW)["kept"] == 75
    assert contents(tmp_path / "d") == clean


def test_torchrun(tars, clean, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "load_dataset.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tars), "--out", str(tmp_path / "d"), *WORDS], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "d") == clean


@pytest.mark.slow
def test_the_same_unit_by_two(tars, clean, tmp_path):
    """Workers of different splits at once: most units are made twice."""
    children = [start(tars, tmp_path / "d", worker) for worker in ("0/2", "1/2", "", "1/3")]
    errors = [child.communicate(timeout=240)[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, errors
    assert contents(tmp_path / "d") == clean


def test_the_same_worker_twice_is_refused(tars, tmp_path):
    from filelock import FileLock

    run(tars, tmp_path / "d", **FEW, worker="0/2")
    with FileLock(tmp_path / "d/.work-1-of-2.lock"):
        assert "another worker 1/2" in refused(lambda: run(tars, tmp_path / "d", **FEW, worker="1/2"))


def test_other_options_beside_a_worker_are_refused(tars, tmp_path):
    from filelock import FileLock

    run(tars, tmp_path / "d", **FEW, worker="0/2", min_side=500)  # keeps nothing, so that other options would start again
    with FileLock(tmp_path / "d/.work-0-of-2.lock"):
        assert "other workers" in refused(lambda: run(tars, tmp_path / "d", **FEW, worker="1/2"))


def test_limit_and_held_out_sample_are_those_of_one_process(tars, tmp_path):
    for name, changes in (("limit", {"limit": 44, "heldout": 0.2}), ("one", {"heldout": 1e-9})):
        run(tars, tmp_path / name, **FEW, **changes)
        run(tars, tmp_path / f"{name}-2", **FEW, **changes, worker="1/2")
        run(tars, tmp_path / f"{name}-2", **FEW, **changes, worker="0/2")
        assert contents(tmp_path / name) == contents(tmp_path / f"{name}-2")
    assert len(rows(tmp_path / "limit")) == 44 and [key for key, _, _ in rows(tmp_path / "limit")][-1] == "second-0043"


def test_many_small_tars_share_units_and_many_large_ones_have_a_worker_each(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(20):
        make_tar(tmp_path / f"in/{i:02d}.tar", range(10 * i, 10 * i + 10))
    for name, rows_of_unit, groups in (("small", 40, [4] * 5), ("large", 5, [1] * 20)):
        run(tmp_path / "in", tmp_path / name, unit_rows=rows_of_unit)
        assert json.loads((tmp_path / name / "plan.json").read_text())["groups"] == groups
        for worker in ("2/3", "0/3", "1/3"):
            run(tmp_path / "in", tmp_path / f"{name}-3", unit_rows=rows_of_unit, worker=worker)
        assert contents(tmp_path / name) == contents(tmp_path / f"{name}-3")


# ---- several disks


@pytest.fixture(scope="module")
def parts(tars, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    for i in range(3):
        copied = shutil.copytree(tars, folder / f"machine{i}")  # the source lies elsewhere on every machine
        run(copied, folder / f"part{i}", **FEW, worker=f"{i}/3")
    return [folder / f"part{i}" for i in range(3)]


def without_source(found: dict[str, str]) -> dict[str, str]:
    """The source's place is in these two, for people."""
    return {name: digest for name, digest in found.items() if name not in ("dataset.json", "options.json", "dropped.jsonl")}


def test_merge(parts, clean, tmp_path):
    assert main(["prepare", *map(str, parts), "--merge", "--out", str(tmp_path / "d")]) == 0
    assert without_source(contents(tmp_path / "d")) == without_source(clean)
    assert merge(parts, tmp_path / "d", progress=False)["kept"] == 75  # again: nothing to do


def test_merge_is_refused(parts, tars, tmp_path, capsys):
    def told(*folders: Path, out: str = "out") -> str:
        return refused(lambda: merge(list(folders), tmp_path / out, progress=False))

    assert "in none of the folders: run the worker" in told(parts[0], parts[2])
    assert "is in both" in told(*parts, shutil.copytree(parts[1], tmp_path / "again"))
    run(tars, tmp_path / "other", **FEW, worker="1/3", min_side=33)
    assert "different min_side" in told(parts[0], tmp_path / "other")
    make_tar(tmp_path / "more.tar", range(40))
    run(tmp_path / "more.tar", tmp_path / "more", **FEW, worker="1/3")
    assert "different sources" in told(parts[0], tmp_path / "more")
    run(tars, tmp_path / "whole", **FEW)
    assert "complete dataset" in told(tmp_path / "whole", *parts)
    assert "not a folder" in told(tmp_path)
    assert main(["prepare", str(parts[0]), "--merge", "--out", str(tmp_path / "x"), "--limit", "3"]) == 2
    assert "leave out --limit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_merge_that_broke_off_goes_on_with_its_own_folders_only(parts, tars, clean, tmp_path):
    """Before a unit was copied, only the plan in the folder says what it was to become."""
    copies = [shutil.copytree(part, tmp_path / part.name) for part in parts]
    first = min(copies[0].glob("train/*.arrow"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-9])
    assert "damaged" in refused(lambda: merge(copies, tmp_path / "d", progress=False))
    for number, options in enumerate(({"min_side": 33}, {"unit_rows": 9})):
        others = []
        for i in range(3):
            run(tars, tmp_path / f"{number}-{i}", **{**FEW, **options}, worker=f"{i}/3")
            others.append(tmp_path / f"{number}-{i}")
        told = refused(lambda others=others: merge(others, tmp_path / "d", progress=False))
        assert f"{tmp_path / 'd'} holds another merge that broke off" in told and f"different {next(iter(options))}" in told
    first.write_bytes(whole)
    assert merge(copies, tmp_path / "d", progress=False)["kept"] == 75
    assert without_source(contents(tmp_path / "d")) == without_source(clean)


def test_damage_on_the_way_is_noticed(parts, clean, tmp_path):
    copies = [shutil.copytree(part, tmp_path / part.name) for part in parts]
    path = sorted(copies[1].glob("train/*.arrow"))[0]
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:-99] + bytes([whole[-99] ^ 1]) + whole[-98:]):
        path.write_bytes(damaged)
        assert "damaged" in refused(lambda: merge(copies, tmp_path / "d", progress=False))
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert "regular file" in refused(lambda: merge(copies, tmp_path / "d", progress=False))
    path.unlink()
    path.write_bytes(whole)
    assert merge(copies, tmp_path / "d", progress=False)["kept"] == 75  # goes on from where it was refused
    assert without_source(contents(tmp_path / "d")) == without_source(clean)


def test_latents_of_a_vae_are_the_same(tars, tmp_path):
    """Repeats in other units do not change what a picture is encoded together with."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (8, 8, 8, 8)}
    diffusers.AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, layers_per_block=1).save_pretrained(tmp_path / "vae")
    fields = {**FEW, "codec": str(tmp_path / "vae"), "image_size": 32, "batch_size": 3}
    run(tars, tmp_path / "one", **fields)
    for worker in ("1/2", "0/2"):
        run(tars, tmp_path / "two", **fields, worker=worker)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_dataset_of_an_older_version_is_still_done(tars, tmp_path):
    """Its options know nothing of newer fields, and name the source as it was typed."""
    first = run(tars, tmp_path / "d", **FEW)
    path = tmp_path / "d/options.json"
    old = json.loads(path.read_text())
    del old["follow_links"]
    old["sources"] = [os.path.relpath(tars)]
    path.write_text(json.dumps(old))
    assert run(tars, tmp_path / "d", **FEW) == first


def test_a_unit_that_another_worker_no_longer_waited_for(tars, tmp_path, monkeypatch):
    """Worker 1 is still at a unit beyond the limit while worker 0 completes the dataset: the unit stays out of it."""
    changes = {**FEW, "limit": 5, "heldout": 0.2}
    run(tars, tmp_path / "one", **changes)
    real, out = UnitWriter._commit, tmp_path / "two"

    def late(self, unit, batches):
        monkeypatch.setattr(UnitWriter, "_commit", real)
        done = start(tars, out, "0/2", "--limit", "5", "--heldout", "0.2")
        assert done.wait(60) == 0, done.stderr.read()
        if not (out / "dataset.json").exists():  # worker 0 left the end to the one at work
            pytest.skip("worker 0 waits for worker 1 here")
        return real(self, unit, batches)

    monkeypatch.setattr(UnitWriter, "_commit", late)
    run(tars, out, **changes, worker="1/2")
    assert contents(out) == contents(tmp_path / "one")
