"""Reading prepared data back: batches, processes, errors, inspection, the grid."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from flowt2i.data.dataset import Batch, ImageTextDataset
from flowt2i.data.inspect import inspect
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.data.units import make_batch, part_path, read_part, write_part
from flowt2i.description import CodecSpec, DatasetDescription, TextSpec
from flowt2i.errors import UserError
from flowt2i.grid import grid

COUNT = 57


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of known contents in parts of 10: sample i is filled with i and has i % 11 + 1 tokens of value 100 + i."""
    folder = tmp_path_factory.mktemp("known")
    spec = CodecSpec(kind="pixels", image_size=8, shape=(3, 8, 8))
    for number, start in enumerate(range(0, COUNT, 10)):
        rows = range(start, min(start + 10, COUNT))
        stored = np.stack([np.full((3, 8, 8), i, np.uint8) for i in rows])
        tokens = [[100 + i] * (i % 11 + 1) for i in rows]
        batch = make_batch(spec, [f"k{i}" for i in rows], [f"caption {i}" for i in rows], tokens, [f"{i:064x}" for i in rows], stored)
        write_part(part_path(folder, "train", number), batch)
    write_part(part_path(folder, "heldout", 0), batch)
    description = DatasetDescription(
        codec=spec,
        text=TextSpec(kind="builtin", vocab_size=300, pad_id=7, null_tokens=(1,)),
        latent_mean=(0.0,) * 3,
        latent_std=(1.0,) * 3,
        train_count=COUNT,
        heldout_count=len(batch),
        heldout_fraction=0.1,
    )
    description.save(folder)
    return folder


def check(batch: Batch, numbers) -> None:
    numbers = list(numbers)
    assert batch.index.tolist() == numbers and batch.index.dtype == torch.int64
    assert batch.stored.dtype == torch.uint8 and batch.stored.shape == (len(numbers), 3, 8, 8)
    assert batch.ids.dtype == torch.int64 and batch.mask.dtype == torch.bool and batch.ids.shape == batch.mask.shape
    for i, stored, ids, mask in zip(numbers, batch.stored, batch.ids, batch.mask):
        assert (stored == i).all()
        length = i % 11 + 1
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert ids.tolist() == [100 + i] * length + [7] * (len(ids) - length)


def test_fetch_any_order_and_repeats(folder):
    dataset = ImageTextDataset(folder)
    assert len(dataset) == COUNT
    for numbers in ([0], [56, 0, 9, 10, 9, 9], range(COUNT), np.random.default_rng(0).permutation(COUNT), torch.tensor([3, 41])):
        check(dataset.fetch(numbers), np.asarray(numbers).tolist())
    check(dataset.__getitems__([4, 5]), [4, 5])
    check(dataset[12], [12])
    assert dataset.key(23) == "k23" and dataset.caption(56) == "caption 56"
    assert dataset.captions() == [f"caption {i}" for i in range(COUNT)]


def test_padding(folder):
    for pad_to, numbers, width in ((8, [0], 8), (8, [7], 8), (8, [8], 16), (1, [4], 5), (16, [0, 10], 16)):
        assert ImageTextDataset(folder, pad_to=pad_to).fetch(numbers).ids.shape[1] == width


def test_batches_own_their_memory(folder):
    """Writing into a batch must not reach the file or another batch."""
    dataset = ImageTextDataset(folder)
    dataset.fetch([5]).stored.zero_()
    check(dataset.fetch([5]), [5])


def test_numbers_outside(folder):
    dataset = ImageTextDataset(folder)
    for numbers in ([-1], [COUNT], [0, 99]):
        with pytest.raises(IndexError):
            dataset.fetch(numbers)
    with pytest.raises(IndexError):
        dataset.key(COUNT)


def test_pickle_carries_no_data(folder):
    dataset = ImageTextDataset(folder)
    data = pickle.dumps(dataset)
    assert len(data) < 10_000
    check(pickle.loads(data).fetch([33]), [33])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers(folder, context):
    dataset = ImageTextDataset(folder)
    batches = BatchSampler(SequentialSampler(dataset), 16, drop_last=False)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=ImageTextDataset.collate, num_workers=1, multiprocessing_context=context)
    for number, batch in enumerate(loader):
        check(batch, range(16 * number, min(16 * number + 16, COUNT)))


def refused(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        ImageTextDataset(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copy(folder: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, target))


def test_folders_that_cannot_be_read(folder, tmp_path):
    assert "flowt2i prepare" in refused(tmp_path / "missing")
    (tmp_path / "begun").mkdir()
    assert "dataset.json" in refused(tmp_path / "begun")
    assert "did you mean 'heldout'" in refused(folder, split="heldoud")
    lost = copy(folder, tmp_path / "lost")
    part_path(lost, "train", 2).unlink()
    assert "47 samples" in refused(lost)
    cut = copy(folder, tmp_path / "cut")
    path = part_path(cut, "train", 1)
    path.write_bytes(path.read_bytes()[:-900])
    assert "part-00001-00000.arrow" in refused(cut)
    path.write_bytes(b"")
    assert "part-00001-00000.arrow" in refused(cut)
    other = copy(folder, tmp_path / "other")
    text = json.loads((other / "dataset.json").read_text())
    text["codec"].update(image_size=16, shape=[3, 16, 16])
    (other / "dataset.json").write_text(json.dumps(text))
    assert "does not hold" in refused(other)
    empty = copy(folder, tmp_path / "empty")
    text = json.loads((folder / "dataset.json").read_text()) | {"train_count": 0}
    (empty / "dataset.json").write_text(json.dumps(text))
    assert "empty" in refused(empty)


def test_moments(tmp_path):
    spec = CodecSpec(kind="vae", id="v", fingerprint="f", image_size=64, shape=(4, 8, 8))
    stored = np.random.default_rng(0).normal(size=(5, 8, 8, 8)).astype(np.float16)
    write_part(part_path(tmp_path, "train", 0), make_batch(spec, list("abcde"), list("abcde"), [[1]] * 5, list("abcde"), stored))
    DatasetDescription(
        codec=spec,
        text=TextSpec(kind="builtin"),
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
        train_count=5,
        heldout_count=0,
        heldout_fraction=0,
    ).save(tmp_path)
    assert np.array_equal(ImageTextDataset(tmp_path).fetch([4, 0]).stored.numpy(), stored[[4, 0]])
    result = inspect(tmp_path, quiet=True)  # no VAE of that name can be loaded: numbers, but no sheet
    assert result["contact"].startswith("no contact sheet") and not (tmp_path / "contact.png").exists()


def test_parts_are_mapped_not_read(folder):
    batch = read_part(part_path(folder, "train", 0))
    dataset = ImageTextDataset(folder)
    assert not dataset._open()[0].stored.flags.writeable and len(batch) == 10


# ---- inspect


def test_inspect(tmp_path, capsys):
    prepare(PrepareOptions.of(sources=["scenes"], out=tmp_path / "d", count=60, image_size=32, workers=1), progress=False)
    result = inspect(tmp_path / "d")
    printed = capsys.readouterr().out
    assert result["train"] + result["heldout"] == 60 and "scenes" in printed and "caption length in tokens" in printed
    for name in ("caption_tokens", "caption_words"):
        assert sum(result[name]["histogram"].values()) == 60 and result[name]["min"] <= result[name]["mean"] <= result[name]["max"]
    assert len(result["shortest_caption"]) <= len(result["longest_caption"])
    assert result["bytes_per_sample"] > 3 * 32 * 32 and len(result["latent_std"]) == 3 and result["common_words"]
    assert json.dumps(result)
    from PIL import Image

    with Image.open(tmp_path / "d/contact.png") as sheet:
        assert sheet.width > 8 * 112 and sheet.height > 6 * 128
    assert inspect(tmp_path / "d", out=tmp_path / "other.png", quiet=True)["contact"] == str(tmp_path / "other.png")
    with pytest.raises(UserError):
        inspect(tmp_path / "missing")


# ---- the grid


def test_grid_layout():
    images = np.zeros((5, 16, 16, 3), np.uint8)
    images[:] = np.arange(5)[:, None, None, None] * 40
    sheet = grid(images, ["a", "b " * 200, "", "x" * 300, "日本"], columns=3, scale=2)
    assert sheet.mode == "RGB" and sheet.width == 2 * 16 + 3 * 112 + 2 * 12
    plain = grid(list(images), None, columns=3, scale=1)
    assert plain.size == (2 * 16 + 3 * 16 + 2 * 12, 2 * 16 + 2 * 16 + 12)
    assert plain.getpixel((16 + 28 + 8, 16 + 8)) == (40, 40, 40)
    assert grid(images[:1], ["one"], columns=8).width < 200


def test_grid_refuses():
    with pytest.raises(ValueError, match="at least one"):
        grid([], None, 2)
    with pytest.raises(ValueError, match="captions"):
        grid(np.zeros((2, 8, 8, 3), np.uint8), ["one"], 2)
    with pytest.raises(ValueError, match="uint8"):
        grid(np.zeros((2, 8, 8, 3), np.float32), None, 2)
