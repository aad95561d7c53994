"""Scores and exports of models whose pictures are not squares, or larger than 64 pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import enliven
from PIL import Image
from test_shapes import pictures

from flowt2i import Pipeline
from flowt2i.cli import main
from flowt2i.codec import PixelCodec
from flowt2i.config import resolve
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.evaluation import pictures as scored
from flowt2i.evaluation import reference
from flowt2i.export.export import export
from flowt2i.training.loop import train

SHORT = ["--train.eval_every", "0", "--train.score_prompts", "0", "--sample.images", "2", "--sample.steps", "2", "--train.steps", "2"]


def trained_on(folder: Path, tiny: list[str], sizes: list[tuple[int, int]], **options) -> tuple[Path, Path]:
    source = pictures(folder / "source", 60, sizes)
    prepare(PrepareOptions(sources=[str(source)], out=folder / "data", heldout=0.4, workers=1, **options), progress=False)
    train(resolve("quickstart", [*tiny, *SHORT]), folder / "data", folder / "run", progress=False)
    return enliven(folder / "run"), folder / "data"


@pytest.fixture(scope="module")
def buckets(tiny, tmp_path_factory):
    """Squares, wide and tall ones."""
    return trained_on(tmp_path_factory.mktemp("buckets"), tiny, [(100, 100), (200, 100), (100, 180)], buckets="auto")


@pytest.fixture(scope="module")
def tall(tiny, tmp_path_factory):
    """At 128 pixels, no squares: most are tall, some wide."""
    return trained_on(tmp_path_factory.mktemp("tall"), tiny, [(100, 180), (100, 180), (200, 100)], image_size=128, buckets="96x168,160x104")


def test_the_model_draws_of_its_own_what_most_of_its_data_are(tall):
    pipeline = Pipeline.from_pretrained(tall[0], device="cpu")
    assert pipeline.description.home == (96, 168) and pipeline.model.shape == (3, 128, 128)
    samples = pipeline.sample("a picture", seed=3)
    assert samples.images.shape == (1, 168, 96, 3) and samples.settings["width"] == 96
    assert np.array_equal(pipeline.redraw(samples.pictures()[0]).images, samples.images)
    assert pipeline.sample("a picture", width=128, height=128).images.shape == (1, 128, 128, 3)


def test_real_pictures_are_squeezed_to_squares_in_order(buckets):
    dataset = ImageTextDataset(buckets[1], "heldout")
    rows = np.random.default_rng(0).permutation(len(dataset))
    images = reference.real_images(dataset, PixelCodec(64), rows)
    assert images.shape == (len(dataset), 64, 64, 3)
    for row, image in zip(rows, images):
        one = dataset.fetch([row]).stored[0].permute(1, 2, 0).numpy()
        assert np.array_equal(image, np.asarray(Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC)) if one.shape[0] != 64 else one)
    assert reference.sizes_of(dataset, rows) == [dataset.description.sizes[k] for k in dataset.bucket_of()[rows]]


def test_scores_draw_each_caption_in_the_shape_of_its_own_picture(buckets, capsys, monkeypatch):
    asked = []
    sample = Pipeline.sample

    def noting(self, prompts, **settings):
        asked.extend((prompt, settings["width"], settings["height"]) for prompt in prompts)
        return sample(self, prompts, **settings)

    monkeypatch.setattr(Pipeline, "sample", noting)
    words = ["evaluate", "--model", str(buckets[0]), "--data", str(buckets[1]), "--num", "20", "--steps", "1", "--json"]
    assert main([*words, "--metrics", "loss"]) == 0
    assert any(name.startswith("loss-") for name in json.loads(capsys.readouterr().out.splitlines()[-1]))
    pytest.importorskip("efficientnet_lite_pytorch")
    assert main([*words, "--metrics", "kid"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert any(name.startswith("kid-") and name.endswith("@64") for name in found)
    assert len(asked) == 20 and len({(width, height) for _, width, height in asked}) == 3
    for prompt, width, height in asked:
        wide, high = map(int, prompt.split(" of ")[1].split(" by "))
        assert (wide > high) == (width > height) and (wide < high) == (width < height)


def test_drawn_pictures_do_not_depend_on_their_neighbours(buckets):
    pipeline = Pipeline.from_pretrained(buckets[0], device="cpu")
    together = scored.draw(pipeline, ["a", "b", "c"], [(88, 48), (64, 64), (88, 48)], 7, steps=2)
    alone = scored.draw(pipeline, ["c"], [(88, 48)], 9, steps=2)
    assert together.shape == (3, 64, 64, 3) and np.abs(together[2].astype(int) - alone[0]).max() <= 1


@pytest.mark.parametrize("which", ["buckets", "tall"])
def test_native_export(which, request, tmp_path):
    run, _ = request.getfixturevalue(which)
    export(run, tmp_path / "out", samples=2)
    ours, theirs = Pipeline.from_pretrained(run, device="cpu"), Pipeline.from_pretrained(tmp_path / "out", device="cpu")
    for size in ((None, None), (88, 48)):
        wanted, found = (p.sample("a picture", steps=2, seed=1, width=size[0], height=size[1]).images for p in (ours, theirs))
        assert np.array_equal(wanted, found)
    card = (tmp_path / "out/README.md").read_text()
    assert ("96×168, 160×104" if which == "tall" else "48×88, 64×64, 88×48") in card


@pytest.mark.parametrize("which", ["buckets", "tall"])
def test_diffusers_draws_every_shape(which, request):
    from flowt2i.export.diffusers_format import as_diffusers

    ours = Pipeline.from_pretrained(request.getfixturevalue(which)[0], device="cpu")
    theirs = as_diffusers(ours)
    theirs.set_progress_bar_config(disable=True)
    for width, height in ((None, None), *ours.description.sizes):
        start = [torch.Generator().manual_seed(3)]
        found = theirs("a picture", num_inference_steps=2, guidance_scale=2.0, generator=start, output_type="np", width=width, height=height).images
        settings = {"steps": 2, "guidance": 2.0, "shift": ours.settings()["shift"], "seed": 3, "solver": "euler"}
        wanted = ours.sample("a picture", **settings, width=width, height=height).images
        assert found.shape == wanted.shape and np.abs(found * 255 - wanted).max() < 1.5 and wanted.std() > 5
    with pytest.raises(ValueError, match="multiples of 8: take 96 and 48"):
        theirs("a picture", width=100, height=48)


@pytest.mark.slow
def test_onnx_draws_the_models_own_shape(tall, tmp_path):
    pytest.importorskip("onnxruntime")
    result = export(tall[0], tmp_path / "out", format="onnx", samples=0)
    assert max(result["errors"].values()) < 1e-4
    assert json.loads((tmp_path / "out/sampling.json").read_text())["shape"] == [3, 168, 96]


def test_a_model_draws_at_half_its_size(tall, tmp_path):
    out = tmp_path / "small.png"
    assert main(["generate", "a picture", "--model", str(tall[0]), "--out", str(out), "--width", "64", "--height", "64", "--steps", "1"]) == 0
    assert Image.open(out).size == (64, 64)
