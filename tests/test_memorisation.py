"""An exact copy of the training set is flagged, pictures that were held out are not."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from flowt2i.codec import codec_from_spec
from flowt2i.data import scenes
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import memorisation as m
from flowt2i.evaluation.metrics import Skipped
from flowt2i.training.distributed import World

PIXELS = {"pixels": m.pixel_features}


def chunked(images, size=700):
    return [(start, images[start : start + size]) for start in range(0, len(images), size)]


def drawn(seed, count):
    return np.stack([scenes.sample(seed, index)[0] for index in range(count)])


@pytest.fixture(scope="module")
def train():
    return drawn(1, 1500)


@pytest.fixture(scope="module")
def heldout(train):
    return m.nearest(drawn(2, 500), chunked(train), PIXELS)["pixels"].distance


def test_a_copy_is_flagged_and_held_out_pictures_are_not(train, heldout):
    copies = m.nearest(train[::5], chunked(train), PIXELS)["pixels"]
    assert (copies.index == np.arange(0, 1500, 5)).all() and copies.distance.max() == 0.0  # exact, and found across chunks
    copied = m.judge(copies.distance, heldout)
    assert copied["near_copies"]["accuracy"] == 1.0 and copied["z"] < -3
    others = m.nearest(drawn(3, 500), chunked(train), PIXELS)["pixels"].distance
    honest = m.judge(others, heldout)
    assert honest["near_copies"]["low"] <= 0.02 and honest["near_copies"]["accuracy"] < 0.04 and abs(honest["z"]) < 3
    assert honest["expected"] == pytest.approx(0.01, abs=0.004) and honest["heldout_n"] == 500


def test_a_changed_copy_is_still_a_copy(train, heldout):
    """Noise, a shift of brightness and a move by a pixel: within the near-copy distance still."""
    rng = np.random.default_rng(0)
    some = train[:100].astype(np.int16)
    noisy = np.clip(some + rng.normal(0, 8, some.shape), 0, 255).astype(np.uint8)
    lighter = np.clip(some * 0.97 + 6, 0, 255).astype(np.uint8)
    for changed in (noisy, lighter):
        found = m.nearest(changed, chunked(train), PIXELS)["pixels"]
        assert m.judge(found.distance, heldout)["near_copies"]["accuracy"] > 0.9 and (found.index == np.arange(100)).mean() > 0.95


def test_blurred_and_flat_pictures_are_no_copies(train, heldout):
    """They lie near everything: z falls as far as for copies, the share of near copies does not rise."""
    new = drawn(3, 200)
    blurred = np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(8))) for image in new])
    flat = np.broadcast_to(new.mean((1, 2), keepdims=True).astype(np.uint8), new.shape)
    for changed in (blurred, flat):
        judged = m.judge(m.nearest(changed, chunked(train), PIXELS)["pixels"].distance, heldout)
        assert judged["z"] < -5 and not judged["copies"] and judged["near_copies"]["accuracy"] <= judged["expected"]


def test_a_model_that_copies_some_of_its_samples(train, heldout):
    honest = m.nearest(drawn(4, 270), chunked(train), PIXELS)["pixels"].distance
    judged = m.judge(np.concatenate([honest, np.zeros(30)]), heldout)
    assert judged["copies"] and 0.08 < judged["near_copies"]["accuracy"] < 0.15 and judged["near_copies"]["low"] > 0.05
    assert not m.judge(honest, heldout)["copies"]


def test_ranks_find_together_what_one_finds(scenes_data, train):
    dataset = ImageTextDataset(scenes_data)
    codec = codec_from_spec(dataset.description.codec)
    queries = train[:20]
    alone = m.nearest(queries, m.chunks_of(dataset, codec, size=10), PIXELS)["pixels"]
    worlds = [World(rank, 3, torch.device("cpu")) for rank in range(3)]
    shares = [m.nearest(queries, m.chunks_of(dataset, codec, world=world, size=10), PIXELS)["pixels"] for world in worlds]
    together = m.merge(np.stack([share.distance for share in shares]), np.stack([share.index for share in shares]))
    assert np.array_equal(together.distance, alone.distance) and np.array_equal(together.index, alone.index)
    assert len({tuple(share.index) for share in shares}) == 3  # each saw a part only
    assert m.merge(np.array([[1.0], [1.0], [np.inf]]), np.array([[7], [5], [0]])).index.tolist() == [5]  # of two alike the first


def test_the_data_of_the_model_and_enough_of_it(scenes_data):
    ours = DatasetDescription.load(scenes_data)
    with pytest.raises(Skipped, match="100 at least"):
        m.check_data(ours, scenes_data)  # 19 or so are held out: no percentile of these
    with pytest.raises(UserError, match="other data"):
        m.check_data(ours.model_copy(update={"train_count": 500, "heldout_count": 500}), scenes_data)  # the same pictures in another split
    with pytest.raises(UserError, match="has none"):
        m.check_data(ours.model_copy(update={"heldout_count": 0}), scenes_data)


def test_features_of_a_net_and_of_a_dataset(scenes_data):
    """Through a prepared dataset, in chunks, with two kinds of features at once."""
    dataset = ImageTextDataset(scenes_data)
    codec = codec_from_spec(dataset.description.codec)
    torch.manual_seed(0)
    weights = torch.randn(3 * 64 * 64, 24)
    net = lambda images: torch.from_numpy(images.reshape(len(images), -1)).float() @ weights
    real = m.real_images(dataset, codec, np.arange(5, 25))
    assert real.dtype == np.uint8 and np.array_equal(real[0], dataset.fetch([5]).stored[0].permute(1, 2, 0).numpy())
    found = m.nearest(real, m.chunks_of(dataset, codec, progress=True), {"pixels": m.pixel_features, "net": m.net_features(net)})
    for kind in ("pixels", "net"):
        assert (found[kind].index == np.arange(5, 25)).all() and found[kind].distance.max() < 1e-6
    first_ten = m.nearest(real, m.chunks_of(dataset, codec, limit=10), PIXELS)["pixels"]  # a run on the first ten samples only
    assert (first_ten.index < 10).all() and (first_ten.distance[:5] == 0).all() and (first_ten.distance[5:] > 0).any()
    order, pairs = m.closest_pairs(real, first_ten, 4, lambda index: m.real_images(dataset, codec, index))
    assert len(order) == 4 and pairs.shape == (4, 2, 64, 64, 3) and np.array_equal(pairs[:, 0], pairs[:, 1])


def test_the_rank_test_agrees_with_counting_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40).astype(float), rng.integers(1, 8, 30).astype(float)  # many ties
    u = (a[:, None] > b).sum() + 0.5 * (a[:, None] == b).sum()
    shuffled = []
    both = np.concatenate([a, b])
    for _ in range(4000):
        mixed = rng.permutation(both)
        x, y = mixed[:40], mixed[40:]
        shuffled.append((x[:, None] > y).sum() + 0.5 * (x[:, None] == y).sum())
    assert m.mann_whitney_z(a, b) == pytest.approx((u - 600) / np.std(shuffled), rel=0.05)
    assert m.mann_whitney_z(np.zeros(5), np.zeros(7)) == 0.0
