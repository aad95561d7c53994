"""Shared: a small real dataset of scenes, tiny model settings, and the real data beside the checkout where it exists."""

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("WANDB_SILENT", "true")

TINY = [
    "--model.width", "64", "--model.depth", "2", "--model.heads", "2", "--model.time_width", "32", "--model.text_width", "32", "--model.text_depth", "1",
    "--model.bottleneck", "16", "--data.batch_size", "8", "--train.micro_batch", "0", "--train.minutes", "0", "--train.precision", "fp32",
    "--train.compile", "off",
    "--train.log_every", "1", "--train.eval_images", "16", "--train.score_prompts", "4", "--sample.steps", "2", "--sample.images", "4",
    "--train.score_images", "0", "--train.checkpoint_every", "1000",
]  # fmt: skip

# And little that is shown of a run besides its losses.
QUIET = ["--train.eval_every", "0", "--train.eval_images", "8", "--train.score_prompts", "0", "--sample.steps", "1", "--sample.images", "1"]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Overrides that make any preset small enough for a test."""
    return list(TINY)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Callable[[int, float], Path]:
    """prepared(count, heldout): a dataset of so many scenes at 64 pixels, a share of them held out, with the built-in tokenizer."""
    from flowt2i.data.options import PrepareOptions
    from flowt2i.data.prepare import prepare

    def make(count: int, heldout: float) -> Path:
        out = tmp_path_factory.mktemp("data") / "scenes"
        prepare(PrepareOptions(sources=["scenes"], out=out, count=count, heldout=heldout, workers=1), progress=False)
        return out

    return make


@pytest.fixture(scope="session")
def scenes_data(prepared) -> Path:
    """A prepared dataset of 96 scenes."""
    return prepared(96, 0.2)


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Callable[..., Path]:
    """trained(data, *settings): the run folder of a tiny model of the preset `quickstart`."""
    from flowt2i.config import resolve
    from flowt2i.training.loop import train

    def make(data: Path, *settings: str) -> Path:
        folder = tmp_path_factory.mktemp("run") / "tiny"
        train(resolve("quickstart", [*tiny, *settings]), data, folder, progress=False)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_run(trained, scenes_data) -> Path:
    """A run folder with two checkpoints, after 2 and 4 steps of training, of a tiny model of scenes."""
    return trained(scenes_data, "--train.steps", "4", "--optim.lr", "1e-2", "--train.ema", "0.5", "--train.checkpoint_every", "2")


@pytest.fixture(scope="module")
def shaken(tiny_run):
    """A pipeline of the tiny model, its weights shaken so that its pictures depend on every word, seed and time, as four steps of training cannot make them."""
    import torch

    from flowt2i import Pipeline

    pipeline = Pipeline.from_pretrained(tiny_run, device="cpu")
    g = torch.Generator().manual_seed(0)
    for weight in pipeline.model.parameters():
        if weight.ndim == 2:
            weight.add_(torch.randn(weight.shape, generator=g) * weight.shape[1] ** -0.5)
    return pipeline


@pytest.fixture
def one_line(capsys) -> Callable[[], str]:
    """one_line(): what was said on stderr, which must be one line."""

    def said() -> str:
        told = capsys.readouterr().err
        assert told.count("\n") == 1, told
        return told

    return said


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout; the test is skipped where there is none."""
    path = Path(os.environ.get("FLOWT2I_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.exists():
        pytest.skip("no real data beside the checkout (FLOWT2I_SHARED)")
    return path


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A CLIPModel of random weights with a real tokenizer (byte-level BPE, learned here) and CLIP's own preprocessing, saved as from the hub."""
    import torch
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from flowt2i.data import scenes
    from flowt2i.text import learn_tokenizer

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learn_tokenizer(scenes.prompts(0, 200), 400), pad_token="<pad>", eos_token="<end>", model_max_length=77
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = shape | {"vocab_size": 400, "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    CLIPModel(CLIPConfig(text_config=text, vision_config=shape | {"image_size": 32, "patch_size": 8}, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def torch_fidelity(monkeypatch):
    """torch-fidelity without its `__init__`, which asks for torchvision: enough for its Inception, and for torchmetrics to load."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    return package
