"""Shared: a small real dataset of scenes, tiny model settings, and the real data beside the checkout where it exists."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("WANDB_SILENT", "true")

TINY = [
    "--model.width", "64", "--model.depth", "2", "--model.heads", "2", "--model.time_width", "32", "--model.text_width", "32", "--model.text_depth", "1",
    "--model.bottleneck", "16", "--data.batch_size", "8", "--train.micro_batch", "0", "--train.minutes", "0", "--train.precision", "fp32",
    "--train.compile", "off",
    "--train.log_every", "1", "--train.eval_images", "16", "--train.score_prompts", "4", "--sample.steps", "2", "--sample.images", "4",
    "--train.checkpoint_every", "1000",
]  # fmt: skip

# And little that is shown of a run besides its losses.
QUIET = ["--train.eval_every", "0", "--train.eval_images", "8", "--train.score_prompts", "0", "--sample.steps", "1", "--sample.images", "1"]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Overrides that make any preset small enough for a test."""
    return list(TINY)


@pytest.fixture(scope="session")
def scenes_data(tmp_path_factory) -> Path:
    """A prepared dataset of 96 scenes at 64 pixels with the built-in tokenizer."""
    from flowt2i.data.options import PrepareOptions
    from flowt2i.data.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "scenes"
    prepare(PrepareOptions(sources=["scenes"], out=out, count=96, heldout=0.2, workers=1), progress=False)
    return out


@pytest.fixture(scope="session")
def tiny_run(scenes_data, tiny, tmp_path_factory) -> Path:
    """A run folder with two checkpoints, after 2 and 4 steps of training, of a tiny model of scenes."""
    from flowt2i.config import resolve
    from flowt2i.training.loop import train

    folder = tmp_path_factory.mktemp("run") / "tiny"
    settings = ["--train.steps", "4", "--optim.lr", "1e-2", "--train.ema", "0.5", "--train.checkpoint_every", "2"]
    train(resolve("quickstart", [*tiny, *settings]), scenes_data, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout; the test is skipped where there is none."""
    path = Path(os.environ.get("FLOWT2I_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.exists():
        pytest.skip("no real data beside the checkout (FLOWT2I_SHARED)")
    return path
