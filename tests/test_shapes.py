"""Aspect buckets: which there are, what falls into them, what is lost, and the dataset that comes of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowt2i import shapes
from flowt2i.cli import main
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.data.images import load_fitted, load_square
from flowt2i.data.merge import merge
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.data.sample import Dropped
from flowt2i.errors import UserError

SIZES = [(120, 120), (200, 100), (96, 150), (130, 120), (90, 170)]  # of the pictures of a folder, over and over


def pictures(folder: Path, count: int = 60, sizes=SIZES) -> Path:
    """Captioned PNGs of several sizes: each red on its left half and blue on its right, a green line of 6 pixels along the top."""
    folder.mkdir(parents=True)
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        image = np.zeros((height, width, 3), np.uint8)
        image[:, : width // 2, 0] = 200 + number % 50
        image[:, width // 2 :, 2] = 200
        image[:6, :, 1] = 255
        Image.fromarray(image).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number} of {width} by {height}")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "many")


@pytest.fixture(scope="module")
def data(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "buckets"
    prepare(PrepareOptions(sources=[str(source)], out=out, buckets="auto", heldout=0.2, workers=1, unit_rows=16), progress=False)
    return out


# ---- which shapes


@pytest.mark.parametrize(("size", "unit", "aspect"), [(64, 8, 3.0), (128, 8, 3.0), (256, 16, 2.0), (512, 8, 3.0), (1024, 32, 4.0), (64, 1, 1.5)])
def test_derived_buckets_have_about_the_squares_area(size, unit, aspect):
    found = shapes.derived(size, unit, aspect)
    assert (size, size) in found and found == sorted(set(found)) and len(found) <= 17
    for width, height in found:
        assert width % unit == height % unit == 0
        assert (height, width) in found, "lying and standing"
        assert max(width, height) <= aspect * min(width, height)
        assert 0.93 < width * height / size**2 < 1.07


def test_the_nearest_ratio_loses_least():
    found = shapes.derived(64, 8, 3.0)
    assert [shapes.name(shape) for shape in found] == ["40x104", "48x88", "56x72", "64x64", "72x56", "88x48", "104x40"]
    generator = np.random.default_rng(0)
    for width, height in generator.integers(40, 400, (200, 2)).tolist():
        chosen = shapes.fitting(width, height, found)
        assert shapes.kept(width, height, chosen) == max(shapes.kept(width, height, shape) for shape in found)
        left, top, right, bottom = shapes.cover(width, height, chosen)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert math.isclose((right - left) * (bottom - top) / (width * height), shapes.kept(width, height, chosen))
        assert math.isclose((right - left) / (bottom - top), chosen[0] / chosen[1])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("64", "'64' is no shape"),
        ("64x", "no shape"),
        ("0x64", "no shape"),
        ("64x64,64x64", "64x64 is there twice"),
        ("128x128", "4 times the pixels of --image-size 64.*give --image-size 128"),
        ("60x68,64x64", "multiples of 8, such as 64x64"),
        ("automatic", "'automatic' is no shape"),
    ],
)
def test_lists_that_cannot_be_are_refused(asked, words):
    with pytest.raises(UserError, match=words):
        shapes.buckets(asked, 64, 8, 3.0)


def test_lists_are_put_in_order():
    assert shapes.buckets("80x48, 64x64,48x80", 64, 8, 3.0) == [(48, 80), (64, 64), (80, 48)]
    assert shapes.buckets("", 64, 8, 3.0) == []
    with pytest.raises(UserError, match=r"not a multiple of 8.*take 64"):
        shapes.buckets("auto", 60, 8, 3.0)


# ---- one picture


def test_a_picture_keeps_its_shape_and_its_middle(tmp_path):
    folder = pictures(tmp_path / "p", 1, [(200, 100)])
    content = (folder / "000.png").read_bytes()
    wide, seen = load_fitted(content, shapes.derived(64, 8, 3.0))
    assert wide.shape == (48, 88, 3) and seen == (200, 100)
    assert wide[20, 5].tolist() == [200, 0, 0] and wide[20, 82].tolist() == [0, 0, 200], "both ends are there"
    assert np.array_equal(load_fitted(content, [(64, 64)])[0], load_square(content, 64))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_falls_into_the_bucket_it_is_seen_in(tmp_path, orientation):
    upright = np.zeros((100, 200, 3), np.uint8)  # red above, blue below, green at the left
    upright[:50, :, 0] = upright[50:, :, 2] = 220
    upright[:, :30] = (0, 220, 0)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that stores what the tag undoes (FLIP_LEFT_RIGHT, …)
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    found, seen = load_fitted((tmp_path / "a.png").read_bytes(), [(88, 48), (48, 88), (64, 64)])
    assert seen == (200, 100) and found.shape == (48, 88, 3)
    assert found[10, 60, 0] > 200 and found[40, 60, 2] > 200 and found[20, 3, 1] > 200


def test_a_bad_picture_is_dropped():
    with pytest.raises(Dropped):
        load_fitted(b"no picture", [(64, 64), (80, 48)])


# ---- a dataset


def test_the_description_counts_the_buckets_and_the_report_tells_what_is_kept(source, data):
    report, dataset = json.loads((data / "report.json").read_text()), ImageTextDataset(data)
    description = dataset.description
    assert [(b.size, b.train + b.heldout) for b in description.buckets] == [((48, 88), 24), ((64, 64), 24), ((88, 48), 12)]
    assert sum(b.train for b in description.buckets) == description.train_count and sum(b.heldout for b in description.buckets) == description.heldout_count
    assert description.home == (64, 64) and description.codec.shape == (3, 64, 64)
    assert report["buckets"]["88x48"] == {"train": description.buckets[2].train, "heldout": description.buckets[2].heldout}
    assert report["empty_buckets"] == ["40x104", "56x72", "72x56", "104x40"]
    assert report["pixels_kept"]["square"] == round(np.mean([min(size) / max(size) for size in SIZES]), 4)
    assert report["pixels_kept"]["buckets"] > 0.9 > report["pixels_kept"]["square"]


def test_every_sample_has_the_shape_of_its_picture(data):
    for split in ("train", "heldout"):
        dataset = ImageTextDataset(data, split)
        seen = 0
        for size, rows in zip(dataset.description.sizes, dataset.by_bucket()):
            batch = dataset.fetch(rows)
            assert batch.stored.shape == (len(rows), 3, size[1], size[0])
            for row, picture in zip(rows, batch.stored.numpy()):
                width, height = map(int, dataset.caption(int(row)).split(" of ")[1].split(" by "))
                assert shapes.fitting(width, height, dataset.description.sizes) == size
                assert picture[0, 20, 3] >= 198 and picture[2, 20, -3] >= 198, "red left, blue right"
                assert picture[1, 0, size[0] // 2] > 200 or size[1] / height < size[0] / width, "the green line on top, unless it was cut"
            seen += len(rows)
        assert seen == len(dataset) and len(dataset.by_bucket(10)[0]) <= 10
        with pytest.raises(ValueError, match="one shape"):
            dataset.fetch(range(len(dataset)))
        assert dataset.fetch(range(len(dataset)), pictures=False).mask.shape[0] == len(dataset)


def test_statistics_are_those_of_all_pixels(data):
    dataset = ImageTextDataset(data)
    pixels = np.concatenate([dataset.fetch(rows).stored.numpy().transpose(1, 0, 2, 3).reshape(3, -1) for rows in dataset.by_bucket()], 1) / 127.5 - 1
    assert np.allclose(pixels.mean(1), dataset.description.latent_mean) and np.allclose(pixels.std(1), dataset.description.latent_std)


def test_datasets_opens_it(data):
    from datasets import load_from_disk

    theirs, ours = load_from_disk(str(data))["train"], ImageTextDataset(data)
    for row in (0, 7, len(ours) - 1):
        assert theirs[row]["size"] == list(ours.description.sizes[ours.bucket_of()[row]])
        assert np.array_equal(np.array(theirs[row]["pixels"], np.uint8), ours.fetch([row]).stored.numpy().reshape(-1))


def test_workers_and_a_merge_write_the_same(source, data, tmp_path):
    common = {"sources": [str(source)], "buckets": "auto", "heldout": 0.2, "workers": 1, "unit_rows": 16}
    for worker in ("0/2", "1/2"):
        prepare(PrepareOptions(**common, out=tmp_path / worker[0], worker=worker), progress=False)
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged", progress=False)
    prepare(PrepareOptions(**common | {"workers": 2}, out=tmp_path / "two"), progress=False)
    for other in ("merged", "two"):
        for path in [*sorted(data.glob("*/*.arrow")), data / "dataset.json"]:
            assert (tmp_path / other / path.relative_to(data)).read_bytes() == path.read_bytes(), path


def test_duplicates_over_units_and_a_limit_are_settled(source, tmp_path):
    """Parts are written anew where something in them is left out: shapes and statistics go along."""
    again = tmp_path / "twice"
    again.mkdir()
    for number, path in enumerate(sorted(source.glob("*.png"))[:30]):
        for copy in "ab":
            (again / f"{copy}{number:03d}.png").write_bytes(path.read_bytes())
            (again / f"{copy}{number:03d}.txt").write_text(f"picture {number}")
    report = prepare(PrepareOptions(sources=[str(again)], out=tmp_path / "d", buckets="auto", heldout=0.2, unit_rows=8, workers=1, limit=25), progress=False)
    assert report["kept"] == 25 and sum(sum(of.values()) for of in report["buckets"].values()) == 25
    dataset = ImageTextDataset(tmp_path / "d")
    assert sum(map(len, dataset.by_bucket())) == len(dataset)
    pixels = np.concatenate([dataset.fetch(rows).stored.numpy().transpose(1, 0, 2, 3).reshape(3, -1) for rows in dataset.by_bucket()], 1) / 127.5 - 1
    assert np.allclose(pixels.mean(1), dataset.description.latent_mean)


def test_a_dataset_of_squares_is_as_it_was(source, tmp_path):
    prepare(PrepareOptions(sources=[str(source)], out=tmp_path / "d", workers=1), progress=False)
    dataset = ImageTextDataset(tmp_path / "d")
    assert dataset.description.buckets == () and dataset.description.sizes == [(64, 64)]
    assert len(dataset.by_bucket()) == 1 and np.array_equal(dataset.by_bucket(7)[0], np.arange(7))
    older = json.loads((tmp_path / "d/dataset.json").read_text())
    del older["buckets"]
    (tmp_path / "d/dataset.json").write_text(json.dumps(older))
    assert ImageTextDataset(tmp_path / "d").fetch(range(9)).stored.shape == (9, 3, 64, 64), "written before there were buckets"


def test_a_description_that_names_other_shapes_is_refused(data, tmp_path):
    import shutil

    for change in ({"width": 56, "height": 72}, {"train": 99}):
        folder = Path(shutil.copytree(data, tmp_path / "d"))
        for path in (folder / "dataset.json", folder / "units/description.json"):
            told = json.loads(path.read_text())
            told["buckets"][0] |= change
            path.write_text(json.dumps(told))
        with pytest.raises(UserError, match="prepare the data again"):
            ImageTextDataset(folder)
        shutil.rmtree(folder)


# ---- the command


def test_the_command_says_what_fell_where(source, tmp_path, capsys):
    assert main(["prepare", str(source), "--out", str(tmp_path / "d"), "--buckets", "--workers", "1"]) == 0
    told = capsys.readouterr().err
    assert "buckets: 48x88 24, 64x64 24, 88x48 12" in told
    assert "of the pictures' area 93.2% is kept, by square crops it would be 71.9%" in told
    assert "no picture fell into 40x104, 56x72, 72x56, 104x40: left out" in told
    assert main(["inspect", str(tmp_path / "d")]) == 0
    assert "48x88 24, 64x64 24, 88x48 12" in capsys.readouterr().out
    assert (tmp_path / "d/contact.png").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--buckets", "64x64,80x4"], "times the pixels"),
        (["--buckets", "64x64,80x48", "--bucket-step", "8"], "leave one of them out"),
        (["--bucket-step", "8"], "add --buckets auto"),
        (["--buckets", "wide"], "no shape"),
    ],
)
def test_mistakes_are_told_in_one_line(source, tmp_path, words, told, one_line):
    assert main(["prepare", str(source), "--out", str(tmp_path / "d"), *words]) == 2
    assert told in one_line()


def test_scenes_are_squares(tmp_path, one_line):
    assert main(["prepare", "scenes", "--count", "50", "--out", str(tmp_path / "d"), "--buckets"]) == 2
    assert "scenes are squares" in one_line()


def test_where_only_the_square_can_be_made_it_is_said():
    with pytest.raises(UserError, match="no shape but the square of 64: take a larger --image-size or --max-aspect"):
        shapes.derived(64, 32, 3.0)
    assert len(shapes.derived(128, 32, 3.0)) == 3


def test_a_patch_that_does_not_divide_names_one_that_does_and_a_size():
    from flowt2i.config import ModelConfig

    with pytest.raises(UserError, match=r"model\.patch 8 does not divide the 100x60 pictures: choose 5, or prepare data that give 96x64 pictures"):
        ModelConfig().resolve("pixels", (3, 60, 100))
    with pytest.raises(UserError, match=r"model\.patch 3 does not divide the 8x8 latents: choose 2, or prepare data that give 9x9 latents"):
        ModelConfig(patch=3).resolve("vae", (4, 8, 8))
