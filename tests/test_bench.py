"""`flowt2i bench`: the fields that others read, and the count of operations against a count by hand."""

import json
import subprocess
import sys

import pytest
import torch

from flowt2i import bench as module
from flowt2i.bench import BareStep, bench, count_flops, describe
from flowt2i.config import resolve
from flowt2i.model import swiglu_hidden

TINY = ["--model.width", "64", "--model.depth", "2", "--model.heads", "2", "--model.text_width", "64", "--model.text_depth", "1", "--model.time_width", "64",
        "--data.batch_size", "8", "--train.micro_batch", "4", "--train.compile", "off", "--sample.steps", "4"]  # fmt: skip
ALWAYS = {"train_images_per_s", "sample_images_per_s", "model_tflops", "ceiling_tflops", "peers", "verdict"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products, few repetitions: what is measured does not matter here."""
    monkeypatch.setattr(module, "matrix_rate", lambda n, k, m, dtype, device: 1.0)
    fastest = module.fastest_of
    monkeypatch.setattr(module, "fastest_of", lambda work, device, least=1, seconds=0.0: fastest(work, device, 1, 0.0))


@pytest.mark.parametrize("latents", [False, True])
def test_result_has_what_others_read(latents: bool) -> None:
    result = bench(resolve("quickstart", TINY), text_tokens=5, latents=latents, seconds=60)
    assert result.keys() >= ALWAYS
    assert result["train_images_per_s"] > 0 and result["sample_images_per_s"] > 0 and result["peers"] == {}
    assert result["share_of_ceiling"] == pytest.approx(result["model_tflops"] / result["ceiling_tflops"], abs=1e-3)
    assert result["model_tflops"] == pytest.approx(result["train_images_per_s"] * result["gflop_per_image"] / 1e3, rel=0.05, abs=1e-3)
    assert set(result["milliseconds"]) == {"noise", "forward", "backward", "optimizer", "ema"}
    assert set(result["micro_batches"]) == {"1", "2", "4", "8"} and str(result["fastest_micro_batch"]) in result["micro_batches"]
    assert "\n" not in result["verdict"] and "images/s" in result["verdict"]
    json.dumps(result)


def test_time_limit_leaves_other_micro_batches_out() -> None:
    assert set(bench(resolve("quickstart", TINY), seconds=0)["micro_batches"]) == {"4"}


def test_count_of_operations() -> None:
    """2 operations a multiply-add; the backward pass takes twice the forward (less the products into the input and the frozen features)."""
    tokens, text_tokens, width, depth = 64, 16, 256, 4
    config = resolve("stability", ["--model.width", str(width), "--model.depth", str(depth), "--model.heads", "4"])
    step = BareStep(config, describe(text_tokens, latents=True), torch.device("cpu"))
    hidden = swiglu_hidden(width, config.model.mlp_ratio)
    block = tokens * (4 * width**2 + 3 * width * hidden) + text_tokens * 2 * width**2 + 2 * tokens * (tokens + text_tokens) * width
    ends = tokens * 2 * 4 * width + text_tokens * 512 * width
    time = 256 * 512 + 512 * 512 + 512 * 6 * width + 512 * 2 * width + 512 * 512
    by_hand = 3 * 2 * (depth * block + ends + time)
    assert count_flops(step, 2) == pytest.approx(by_hand, rel=0.02)


def test_bad_settings_are_one_line() -> None:
    for words in (["--text-tokens", "0"], ["--config", "quikstart"], ["--model.heads", "7"]):
        done = subprocess.run([sys.executable, "-m", "flowt2i.cli", "bench", *words], capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
