"""`benchmarks/word_order.py`: the question it asks, and that its answer is right of networks whose answer is known."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowt2i.data import scenes
from flowt2i.data.dataset import ImageTextDataset

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@pytest.fixture
def word_order(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("word_order")


def test_every_phrasing_is_exchanged_for_its_opposite(word_order):
    asked = [prompt for prompt in scenes.prompts(3, 400) if scenes.parse(prompt).relation]
    assert len(asked) > 100
    for prompt in asked:
        before, after = scenes.parse(prompt), scenes.parse(word_order.exchanged(prompt))
        assert (after.relation, after.things, after.background) == (OPPOSITE[before.relation], before.things, before.background)


@pytest.mark.parametrize("reads", [True, False])
def test_who_expects_the_picture_under_its_caption_is_right(word_order, scenes_data, reads):
    dataset = ImageTextDataset(scenes_data, "heldout")
    captions = dataset.captions()
    rows = [row for row, caption in enumerate(captions) if scenes.parse(caption).relation]
    own = [captions[row] for row in rows]
    data = dataset.fetch(rows).stored.float() / 127.5 - 1

    def field(noise, t, asked):
        return data + (0.0 if (asked == own) == reads else 0.5) - noise  # at t = 0 the expected picture is noise + v

    network = SimpleNamespace(device="cpu", mean=0.0, std=1.0, encode=lambda asked: (asked,), field=field)
    assert word_order.nearer(network, dataset, rows, own).tolist() == [reads] * len(rows)
