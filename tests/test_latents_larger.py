"""Latents of any AutoencoderKL at several shapes and sizes: prepare with buckets, train, draw wide and tall, grow, draw again."""

import pytest
from test_codec import save_vae
from test_shapes import pictures

from flowt2i import Pipeline
from flowt2i.cli import main
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.description import DatasetDescription


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "channels"), [(8, 16), (16, 4), (32, 16)])
def test_buckets_and_growing_on_latents(factor, channels, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    side, blocks = 8 * factor, factor.bit_length()
    vae = save_vae(tmp_path / "vae", block_out_channels=(8,) * blocks, latent_channels=channels)
    source = pictures(tmp_path / "pictures", 24, sizes=[(300, 300), (400, 225), (225, 400)])
    prepare(
        PrepareOptions(sources=[str(source)], out=tmp_path / "data", codec=str(vae), image_size=side, buckets="auto", heldout=0.2, workers=1), progress=False
    )
    description = DatasetDescription.load(tmp_path / "data")
    wide = next(size for size in description.sizes if size[0] > size[1])
    assert description.codec.shape == (channels, 8, 8) and len(description.sizes) == 3 and wide[0] % factor == wide[1] % factor == 0

    few = ["--train.steps", "3", "--train.eval_every", "0", "--sample.images", "1"]
    assert main(["train", "--config", "quickstart", "--data", "data", "--out", "run", *tiny, *few]) == 0
    for size in (wide, wide[::-1], (side, side)):
        drawn = Pipeline.from_pretrained("run", device="cpu").sample("picture 1", steps=1, width=size[0], height=size[1]).images
        assert drawn.shape == (1, size[1], size[0], 3)

    words = ["prepare", str(source), "--like", "run", "--image-size", str(2 * side), "--out", "larger", "--heldout", "0.2", "--workers", "1"]
    assert main(words) == 0
    assert main(["train", "--init", "run", "--data", "larger", "--out", "grown", "--image-size", str(2 * side), "--train.steps", "1"]) == 0
    grown = Pipeline.from_pretrained("grown", device="cpu")
    assert grown.config.flow.time_shift == pytest.approx(2)
    for size in (2 * side, side):
        assert grown.sample("picture 1", steps=1, width=size, height=size).images.shape == (1, size, size, 3)
    assert main(["generate", "picture 1", "--model", "grown", "--width", str(side + 1), "--height", str(side)]) == 2
