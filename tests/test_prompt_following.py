"""Prompt following on scenes, intervals of shares and of paired differences, CLIP score and retrieval."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowt2i.data import scenes
from flowt2i.errors import UserError
from flowt2i.evaluation import clip, compare, intervals
from flowt2i.evaluation import scenes as score

# ---- intervals


def test_wilson_interval():
    low, high = intervals.wilson(90, 100)
    assert abs(low - 0.8256) < 1e-3 and abs(high - 0.9448) < 1e-3  # Agresti & Coull's worked value
    assert intervals.wilson(0, 50)[0] == 0.0 and intervals.wilson(50, 50)[1] == 1.0 and intervals.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(  # Newcombe 1998, table II, method 10: cells (both, only first, only second, neither) and the interval of first - second
    "cells, low, high",
    [((36, 12, 2, 0), 0.0569, 0.3404), ((53, 10, 0, 0), 0.0686, 0.2665), ((54, 0, 0, 0), -0.0664, 0.0664), ((0, 30, 0, 0), 0.8395, 1.0)],
)
def test_paired_interval_is_newcombes(cells, low, high):
    first = [True] * (cells[0] + cells[1]) + [False] * (cells[2] + cells[3])
    second = [True] * cells[0] + [False] * cells[1] + [True] * cells[2] + [False] * cells[3]
    found = intervals.paired_difference(second, first)  # first - second
    assert found["difference"] == pytest.approx((cells[1] - cells[2]) / sum(cells))
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=2e-3), pytest.approx(high, abs=2e-3))


def test_mcnemar_is_the_exact_binomial():
    exact = lambda few, n: min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)
    for a, b in ((0, 0), (2, 12), (12, 2), (10, 10), (59, 121), (0, 6)):
        assert intervals.mcnemar(a, b) == pytest.approx(exact(min(a, b), a + b), rel=1e-9)
    assert intervals.mcnemar(2000, 2100) == pytest.approx(0.1221, abs=1e-3)  # many cases: no overflow


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    first = rng.random(1000) < 0.4
    second = first ^ (rng.random(1000) < 0.05)  # nearly the same model
    paired = intervals.paired_difference(first, second)
    apart = intervals.paired_difference(first, rng.permutation(second))
    assert paired["high"] - paired["low"] < 0.5 * (apart["high"] - apart["low"])
    with pytest.raises(ValueError):
        intervals.paired_difference([True], [True, False])


# ---- scenes


def perfect(prompts):
    return [scenes.render(replace(scenes.parse(p), seed=k)) for k, p in enumerate(prompts)]


def test_concepts_are_what_a_prompt_says():
    assert score.concepts("a red star") == 2 and score.concepts("a small red star") == 3 and score.concepts("two small red stars") == 4
    assert score.concepts("a small red star left of a large blue ring on a white background") == 8


def test_true_pictures_score_whole_and_nothing_is_swapped():
    prompts = scenes.prompts(0, 200)
    found = score.score_images(perfect(prompts), prompts)
    assert all(found[name]["accuracy"] > 0.98 for name in found if "swapped" not in name)
    assert found["relation_swapped"]["accuracy"] == 0.0 and found["relation_swapped"]["n"] == found["relation"]["n"] == found["two_objects"]["n"] > 50
    assert sum(found[name]["n"] for name in found if name.startswith("concepts_")) == 200 == found["all"]["n"]
    assert list(found)[:2] == ["all", "one_object"] and {f"concepts_{k}" for k in range(2, 9)} <= set(found)


def test_swapped_pictures_are_found_out():
    prompts = [p for p in scenes.prompts(0, 200) if scenes.parse(p).relation]
    swapped = [scenes.render(replace(s, relation=score.OPPOSITE[s.relation], seed=k)) for k, s in enumerate(map(scenes.parse, prompts))]
    found = score.score_images(swapped, prompts)
    assert found["relation"]["accuracy"] == 0.0 and found["relation_swapped"]["accuracy"] > 0.98
    assert found["all"]["accuracy"] == 0.0 and found["shape"]["accuracy"] > 0.98  # the things are there, only their places are exchanged
    assert found["relation_swapped_shown"]["n"] > 0.9 * len(prompts) and found["relation_shown"]["accuracy"] == 0.0


def test_a_grey_picture_scores_nothing():
    prompts = scenes.prompts(0, 40)
    found = score.score_images([np.full((64, 64, 3), 128, np.uint8)] * 40, prompts)
    assert found["all"]["accuracy"] == 0.0 and "relation_shown" not in found and found["all"]["high"] < 0.1


# ---- CLIP


def test_clip_score_is_that_of_the_model_itself(tiny_clip):
    from transformers import CLIPModel

    net = clip.Clip.load(str(tiny_clip), "cpu")
    prompts = list(dict.fromkeys(scenes.prompts(0, 250)))[:150]  # different ones
    images = np.stack(perfect(prompts))
    found = clip.score(net, images, prompts)
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.no_grad():
        words = net.tokenizer(prompts, padding=True, return_tensors="pt")
        output = model(pixel_values=net.preprocess(list(images), return_tensors="pt")["pixel_values"],
                       **{key: words[key] for key in ("input_ids", "attention_mask")})  # fmt: skip
    expected = 100 * (output.image_embeds * output.text_embeds).sum(-1).clamp_min(0)
    assert found["clip"]["mean"] == pytest.approx(float(expected.mean()), abs=1e-3) and found["clip"]["n"] == 150
    assert found["clip"]["low"] < found["clip"]["mean"] < found["clip"]["high"] and found["candidates"] == 100
    assert 0 <= found["retrieval"]["accuracy"] < 0.2 and found["retrieval"]["n"] == 150  # random weights: near 1 in 100
    assert net.name == "tiny-clip"


def test_pictures_of_one_caption_are_no_further_cases(tiny_clip):
    """Ten times the pictures of as many captions: the interval stays as wide as the captions make it, also between two models."""
    net = clip.Clip.load(str(tiny_clip), "cpu")
    prompts = scenes.prompts(0, 12)
    images = np.stack(perfect(prompts))
    once, often = clip.score(net, images, prompts), clip.score(net, np.concatenate([images] * 10), prompts * 10)
    for part in ("clip", "retrieval"):
        assert often[part] == pytest.approx(once[part], rel=1e-4) and often[part]["n"] == len(set(prompts))
    assert often["pictures"] == 10 * once["pictures"]
    blurred = images // 2
    pair = [compare.of_clip(net, np.concatenate([images] * k), np.concatenate([blurred] * k), prompts * k) for k in (1, 10)]
    assert list(pair[0]) == list(pair[1])
    name = next(iter(pair[0]))
    assert pair[1][name]["difference"] == pytest.approx(pair[0][name]["difference"], rel=1e-3) and "p" not in pair[1]["retrieval"]["difference"]
    assert intervals.by_group([1, 0, 4], ["a", "b", "a"]).tolist() == [2.5, 0]


def test_retrieval_finds_what_is_there():
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(300, 64), dim=-1)
    captions = [f"caption {k}" for k in range(300)]
    own = list(range(0, 300, 2))
    right = clip.retrieved(texts[own], texts, own, captions)
    wrong = clip.retrieved(texts[[(k + 1) % 300 for k in own]], texts, own, captions)
    blind = clip.retrieved(torch.nn.functional.normalize(torch.randn(3000, 64), dim=-1), texts, [k % 300 for k in range(3000)], captions)
    assert all(right) and sum(wrong) <= 5 and 0.004 < sum(blind) / 3000 < 0.02  # chance is 1 in 100
    assert not any(clip.retrieved(torch.ones(2, 4) / 2, torch.ones(3, 4) / 2, [0, 1], ["a", "b", "c"]))  # all alike is not found


@pytest.mark.parametrize("what, told", [
    ("absent", "no such folder"), ("offline", "HF_HUB_OFFLINE"), ("pickled", "pickled"), ("bert", "not 'clip'"),
    ("no scaling", "preprocessor_config.json"), ("cut", "cannot be loaded"),
])  # fmt: skip
def test_a_clip_that_cannot_be_had_is_one_line(tiny_clip, tmp_path, what, told):
    import shutil

    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    if what == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif what == "bert":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif what == "no scaling":
        (folder / "preprocessor_config.json").unlink()
    elif what == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    name = {"absent": str(tmp_path / "nowhere"), "offline": "openai/clip-vit-base-patch32"}.get(what, str(folder))
    with pytest.raises(UserError, match=told) as caught:
        clip.Clip.load(name, "cpu")
    assert "\n" not in str(caught.value)
