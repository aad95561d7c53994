"""`train --init`: a model goes on with the same data, at another size, with other patches, or by low-rank adapters; and `prepare --like`."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET
from export_models import enliven
from safetensors.torch import load_file

from flowt2i import Pipeline, flow
from flowt2i.cli import main
from flowt2i.config import load_config, resolve
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.description import DatasetDescription
from flowt2i.export.export import export
from flowt2i.model import FlowTransformer
from flowt2i.training import checkpoint, grow, start
from flowt2i.training.loop import Trainer, train

SHORT = [*QUIET, "--train.steps", "2", "--train.log_every", "1", "--train.checkpoint_every", "1000", "--train.dry_run", "false"]


@pytest.fixture(scope="module")
def larger(tiny_run, tmp_path_factory):
    """Other scenes than the model of `tiny_run` has seen, at 128 pixels, with its tokenizer."""
    out = tmp_path_factory.mktemp("larger") / "scenes128"
    prepare(PrepareOptions.of(sources=["scenes"], out=out, count=24, seed=5, heldout=0.2, workers=1, like=str(tiny_run), image_size=128), progress=False)
    return out


def begin(model, data, words, base=None):
    """Configuration and folder of a run that begins from a model."""
    found = start.find(model)
    return start.configuration(model, found, DatasetDescription.load(data), words, base), found.folder


def drawn(model, **settings):
    pipeline = model if isinstance(model, Pipeline) else Pipeline.from_pretrained(model, device="cpu")
    return pipeline.sample(["a small red circle", "two blue stars"], steps=2, seed=3, guidance=2.0, shift=2.0, **settings).images


# ---- the mathematics --------------------------------------------------------------------------------------------------


def test_times_shift_by_the_number_of_places():
    assert grow.time_shift((3, 64, 64), (3, 128, 128)) == 2 and grow.time_shift((4, 8, 8), (4, 8, 8)) == 1
    u, choice = torch.rand(1000, dtype=torch.float64), torch.ones(1000, dtype=torch.float64)
    shifted = flow.times(u, choice, "logit_normal", mean=0.3, shift=2.0)
    assert torch.allclose(shifted, flow.times(u, choice, "logit_normal", mean=0.3 - np.log(2)))
    # Esser et al., eq. 23, in their direction of time: t_m = s t_n / (1 + (s - 1) t_n)
    theirs = 1 - flow.times(u, choice, "uniform")
    assert torch.allclose(1 - flow.times(u, choice, "uniform", shift=2.0), 2 * theirs / (1 + theirs))


@pytest.mark.parametrize("old, new", [(2, 4), (8, 16), (4, 6)])
def test_enlarged_patches_are_seen_and_drawn_as_before(old, new):
    g = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((5, 3, old, old), (7, 3 * old * old), (3 * old * old,)))
    large = torch.nn.functional.interpolate(x, size=(new, new), mode="bilinear", align_corners=False)
    seen = large.flatten(1) @ grow.resize_embedding(w, 3, old, new).T
    assert torch.allclose(seen, x.flatten(1) @ w.T, atol=1e-6)
    said = torch.nn.functional.interpolate(bias.view(1, 3, old, old), size=(new, new), mode="bilinear", align_corners=False)
    assert torch.allclose(grow.resize_output(bias, 3, old, new), said.flatten(), atol=1e-9)
    assert torch.allclose(grow.resize_output(w.T, 3, old, new)[:, 2], grow.resize_output(w.T[:, 2], 3, old, new))


# ---- beginning from a model -------------------------------------------------------------------------------------------


def test_with_the_same_data_it_predicts_as_before(tiny_run, scenes_data, tmp_path):
    config, folder = begin(tiny_run, scenes_data, SHORT)
    assert (config.flow.time_shift, config.sample.shift, config.preset) == (1, 3, "quickstart")
    assert (config.sample.guidance_from, config.sample.guidance_until) == (0, 0.3)
    trainer = Trainer(config, scenes_data, tmp_path / "run", progress=False, init=folder)
    trainer.close()
    assert trainer.step == 0 and not trainer.optimizer.state()
    ours, theirs = trainer.model.state_dict(), load_file(folder / "ema.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert np.array_equal(drawn(trainer.pipeline()), drawn(tiny_run))


def test_grown_trained_resumed_and_drawn(tiny_run, larger, tmp_path, capsys):
    """The same command twice, as a spot instance runs it; the second time the model it began from is gone."""
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_run, model)
    command = ["train", "--init", str(model), "--data", str(larger), "--out", str(run), "--image-size", "128", "--resume", "latest", *SHORT]
    assert main([*command, "--optim.lr", "1e-3"]) == 0
    told = json.loads((run / "config.json").read_text())
    assert told["origin"]["image_size"] == 64 and told["origin"]["step"] == 4 and told["origin"]["weights"] == "ema"
    assert told["flow"]["time_shift"] == 2 and told["sample"]["shift"] == 6
    assert "begins from" in capsys.readouterr().err
    before = DatasetDescription.load(start.find(model).folder)
    shutil.rmtree(model)
    assert main([*command, "--optim.lr", "1e-3", "--train.steps", "3", "--optim.schedule_steps", "2"]) == 0
    assert checkpoint.list_steps(run) == [2, 3]
    saved = checkpoint.find(run)
    ours = DatasetDescription.load(saved)
    assert (ours.latent_mean, ours.latent_std) == (before.latent_mean, before.latent_std) != (DatasetDescription.load(larger).latent_mean, ours.latent_std)
    assert load_config(saved / "config.json").origin == load_config(run / "config.json").origin is not None
    assert drawn(run).shape == (2, 128, 128, 3)
    assert main(["evaluate", "--model", str(run), "--data", str(larger), "--metrics", "loss", "--num", "4"]) == 0
    (checkpoint.folder(run, 3) / "config.json").write_text("{")  # cut off by a full disk: the one before it is good
    with pytest.warns(UserWarning, match="passing over it"):
        assert main([*command, "--optim.lr", "1e-3", "--train.steps", "3", "--optim.schedule_steps", "2"]) == 0
    assert checkpoint.is_whole(checkpoint.folder(run, 3))


def test_what_was_special_to_the_run_of_the_model_is_not_taken_over(trained, larger, scenes_data):
    model = trained(scenes_data, "--train.steps", "1", "--data.subset", "8", "--optim.schedule_steps", "60000", "--train.stop_after", "1h")
    config, _ = begin(model, larger, SHORT)
    assert (config.optim.schedule_steps, config.data.subset, config.train.stop_after) == (0, 0, "")


def test_a_model_shrinks_too(tiny_run, larger, scenes_data, tmp_path):
    config, folder = begin(tiny_run, larger, SHORT)
    assert config.sample.guidance_until == pytest.approx(0.3 / (0.3 + 2 * 0.7)), "it moves with the solver's times"
    assert config.flow.perceptual_from == pytest.approx(0.3 / (0.3 + 2 * 0.7))
    train(config, larger, tmp_path / "large", progress=False, init=folder)
    config, folder = begin(tmp_path / "large", scenes_data, SHORT)
    assert config.sample.guidance_until == pytest.approx(0.3)
    assert config.flow.time_shift == 1 and config.sample.shift == 3 and config.origin is not None and config.origin.image_size == 128
    small = Trainer(config, scenes_data, tmp_path / "small", progress=False, init=folder)
    small.close()
    saved = load_file(folder / "ema.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in small.model.state_dict().items())


def test_settings_that_are_given_win(tiny_run, larger):
    config, _ = begin(tiny_run, larger, ["--flow.time_shift", "1.5", "--sample.shift", "3"], resolve("stability"))
    assert (config.flow.time_shift, config.sample.shift, config.train.steps, config.model.width, config.preset) == (1.5, 3, 30_000, 64, "stability")


def test_another_patch_keeps_the_tokens(tiny_run, larger):
    config, folder = begin(tiny_run, larger, ["--model.patch", "16"])
    old = Pipeline.from_pretrained(tiny_run, device="cpu").model
    statistics = config.origin.latent_mean, config.origin.latent_std
    new = FlowTransformer(config.model, (3, 128, 128), 0, DatasetDescription.load(larger).text.vocab_size, *statistics).eval()
    start.load(new, folder)
    z, t, mask = torch.randn(2, 3, 64, 64), torch.tensor([0.3, 0.8]), torch.ones(2, 3, dtype=torch.bool)
    text = old.encode_captions(torch.tensor([[5, 6, 7], [8, 9, 1]]), mask)
    tiles = torch.nn.functional.interpolate  # patch by patch: neighbours are not looked at
    patches = lambda x, p: x.view(2, 3, 8, p, 8, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, p, p)
    whole = lambda x, p: x.view(2, 8, 8, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 8 * p, 8 * p)
    enlarge = lambda x: whole(tiles(patches(x, 8), size=(16, 16), mode="bilinear", align_corners=False), 16)
    with torch.no_grad():
        for model in (old, new):  # the tanh of an enlarged mask is not quite the enlarged tanh: what is left is linear in the picture, and exact
            for part in (model.colours.weight, model.colours.bias):
                part[3 * model.config.masks :] = 0
        assert torch.allclose(new(enlarge(z), t, text, mask), enlarge(old(z, t, text, mask)), atol=1e-4)


def test_learned_positions_are_interpolated():
    old, new = ({"embed.weight": torch.randn(3, 4), "positions": torch.randn(n, 8)} for n in (16, 64))
    model = FlowTransformer(resolve("seed", ["--model.width", "32", "--model.heads", "2", "--model.depth", "1"]).model.resolve("vae", (4, 8, 8)), (4, 8, 8), 8)
    grown = grow.fitted(old, 1, (4, 4), model)
    assert grown["positions"].shape == (64, 8) and torch.allclose(grown["positions"].mean(0), old["positions"].mean(0), atol=0.15)
    assert grow.fitted(new, 1, (8, 8), model)["positions"] is new["positions"]


# ---- low-rank adapters ------------------------------------------------------------------------------------------------


def test_adapters_alone_are_trained_and_load_anywhere(tiny_run, scenes_data, tmp_path):
    pytest.importorskip("peft")
    run, words = tmp_path / "run", [*SHORT, "--optim.warmup", "0", "--optim.lr", "1e-2"]
    command = ["train", "--init", str(tiny_run), "--data", str(scenes_data), "--out", str(run), "--lora", "4", "--resume", "latest", *words]
    assert main(command) == 0
    saved, before = load_file(checkpoint.find(run) / "model.safetensors"), load_file(checkpoint.find(tiny_run) / "ema.safetensors")
    assert all(torch.equal(saved[name], before[name.replace(".base_layer", "")]) for name in saved if "lora_" not in name)
    moved = {name.split("/")[0] for name in load_file(checkpoint.find(run) / "optimizer.safetensors")}
    assert moved and all("lora_" in name for name in moved)
    assert json.loads((run / "config.json").read_text())["resolved"]["parameters"]["total"] == sum(saved[name].numel() for name in moved)
    assert not np.array_equal(drawn(run), drawn(tiny_run))
    assert main([*command, "--train.steps", "3"]) == 0  # resumed, adapters and all

    # Merged, it is a model like any other, and draws what the adapters drew.
    trainer = Trainer(load_config(checkpoint.find(run) / "config.json"), scenes_data, run, "latest", progress=False)
    trainer.close()
    assert trainer.step == 3 and trainer.ema is not None
    difference = drawn(trainer.pipeline()).astype(int) - drawn(run).astype(int)
    assert np.abs(difference).max() <= 1
    export(run, tmp_path / "out", samples=0)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == before.keys()
    assert np.array_equal(drawn(tmp_path / "out"), drawn(run))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "low-rank adapters of rank 4" in card and f"began from | {tiny_run.name} (EMA weights, step 4, 64x64 pixels)" in card
    assert str(tiny_run.parent) not in (tmp_path / "out" / "config.json").read_text()
    config, _ = begin(run, scenes_data, SHORT)
    assert config.train.lora == 0  # the next run trains all weights, unless told otherwise


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, told",
    [
        (["--model.width", "128"], "has model.width 64, not 128: leave out --model.width"),
        (["--image-size", "0"], "is too small for a picture"),
        (["--image-size", "128"], "was prepared at 64 pixels: run `flowt2i prepare SOURCE --image-size 128 --like"),
        (["--resume", "elsewhere"], "--init and --resume PATH both say what to begin from"),
        (["--model.patch", "5"], "model.patch 5 does not divide"),
        (["--model.patch", "2"], "choose one nearer to it, or keep the patch"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(words, told, tiny_run, scenes_data, tmp_path, capsys):
    assert main(["train", "--init", str(tiny_run), "--data", str(scenes_data), "--out", str(tmp_path / "run"), *SHORT, *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert told in err[-1] and len([line for line in err if "error" in line]) == 1


def test_data_that_a_models_patch_cannot_make_are_not_prepared(tiny_run, tmp_path, capsys):
    words = ["prepare", "scenes", "--count", "4", "--like", str(tiny_run), "--image-size", "100", "--out", str(tmp_path / "data")]
    assert main(words) == 2 and "its sides are multiples of 8; take 96" in capsys.readouterr().err
    assert not (tmp_path / "data" / "train").exists()


def test_another_tokenizer_is_refused_with_the_way_out(tiny_run, tmp_path, capsys):
    other = tmp_path / "other"
    prepare(PrepareOptions(sources=["scenes"], out=other, count=12, seed=9, heldout=0.2, workers=1, vocab_size=300), progress=False)
    assert main(["train", "--init", str(tiny_run), "--data", str(other), "--out", str(tmp_path / "run"), *SHORT]) == 2
    assert f"prepare the data again with --like {tiny_run}" in capsys.readouterr().err


def test_adapters_without_a_model_and_models_that_are_not_there(scenes_data, tmp_path, tiny, capsys):
    assert main(["train", "--data", str(scenes_data), "--out", str(tmp_path / "run"), *tiny, *SHORT, "--lora", "4"]) == 2
    assert "add --init MODEL" in capsys.readouterr().err
    assert main(["train", "--init", str(tmp_path / "gone"), "--data", str(scenes_data), "--out", str(tmp_path / "run"), *SHORT]) == 2
    assert "no model at" in capsys.readouterr().err


def test_data_like_a_model(tiny_run, larger, scenes_data, tmp_path, capsys):
    theirs, ours = DatasetDescription.load(scenes_data), DatasetDescription.load(larger)
    assert ours.text == theirs.text and ours.codec.image_size == 128 and ours.fingerprint != theirs.fingerprint
    for words, told in ((["--max-tokens", "7"], "--max-tokens 7 is not that of --like"), (["--vocab-size", "999"], "says how to learn a tokenizer")):
        assert main(["prepare", "scenes", "--count", "9", "--like", str(tiny_run), "--out", str(tmp_path / "x"), *words]) == 2
        assert told in capsys.readouterr().err


# ---- what comes after follows the model's size ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tiny_run, larger, tmp_path_factory):
    """A run at 128 pixels of the model of `tiny_run`, its weights made lively."""
    run = tmp_path_factory.mktemp("grown") / "run"
    config, folder = begin(tiny_run, larger, SHORT)
    train(config, larger, run, progress=False, init=folder)
    return enliven(run)


def test_native_export_of_a_grown_model(grown, tmp_path):
    export(grown, tmp_path / "out", samples=1)
    assert np.array_equal(drawn(tmp_path / "out"), drawn(grown))
    assert "128×128" in (tmp_path / "out" / "README.md").read_text()


def test_diffusers_draws_a_grown_model(grown):
    from flowt2i.export.diffusers_format import as_diffusers

    ours = Pipeline.from_pretrained(grown, device="cpu")
    theirs = as_diffusers(ours)
    theirs.set_progress_bar_config(disable=True)
    start = ours.initial_noise([3])
    found = theirs("a small red circle", num_inference_steps=2, guidance_scale=2.0, latents=start, output_type="np").images
    wanted = ours.sample("a small red circle", steps=2, guidance=2.0, shift=ours.settings()["shift"], seed=3, solver="euler").images
    assert found.shape == (1, 128, 128, 3) and np.abs(found * 255 - wanted).max() < 1.5 and wanted.std() > 5


@pytest.mark.slow
def test_onnx_of_a_grown_model(grown, tmp_path):
    pytest.importorskip("onnxruntime")
    export(grown, tmp_path / "out", format="onnx", samples=0)
    assert json.loads((tmp_path / "out" / "sampling.json").read_text())["shape"] == [3, 128, 128]


@pytest.mark.slow
def test_the_benchmark_tells_what_growing_saves(tiny, scenes_data, larger, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    growing = importlib.import_module("growing")

    def here(run, data, words):
        assert main(["train", "--data", str(data), "--out", str(run), "--resume", "latest", *words]) == 0

    monkeypatch.setattr(growing, "train", here)
    small = ["--train.minutes", "--train.steps"]
    words = [word for pair in zip(tiny[::2], tiny[1::2]) if pair[0] not in small for word in pair]
    words += ["--train.eval_images", "4", "--train.score_prompts", "0", "--sample.steps", "1", "--sample.images", "1", "--train.dry_run", "false"]
    asked = ["--small", str(scenes_data), "--large", str(larger), "--out", str(tmp_path), "--minutes", "0.02", "--every", "10"]
    for arm in (["--only", "scratch"], ["--only", "grown"], []):  # an arm by itself, and then what is left
        monkeypatch.setattr("sys.argv", ["growing.py", *asked, *arm, *words])
        growing.main()
        assert (tmp_path / "growing.json").exists() == (not arm)
    told = json.loads((tmp_path / "growing.json").read_text())
    grown, scratch = told["curves"].values()
    assert len(grown) >= 3 and len(scratch) >= 3 and grown[0]["seconds"] > scratch[0]["seconds"] > 0 and told["saving"]["loss"]["scratch"]["pflop"] > 0
    assert (tmp_path / "growing.png").exists() and "loss: from scratch" in capsys.readouterr().out
    assert load_config(tmp_path / "grown" / "config.json").flow == load_config(tmp_path / "scratch" / "config.json").flow


@pytest.mark.slow
def test_a_model_grows_twice_and_draws_at_every_size_it_came_from(grown, tmp_path):
    data = tmp_path / "scenes256"
    prepare(PrepareOptions.of(sources=["scenes"], out=data, count=16, seed=6, heldout=0.2, workers=1, like=str(grown), image_size=256), progress=False)
    config, folder = begin(grown, data, SHORT)
    assert config.flow.time_shift == pytest.approx(2 * load_config(grown / "config.json").flow.time_shift)
    train(config, data, tmp_path / "run", progress=False, init=folder)
    pipeline = Pipeline.from_pretrained(tmp_path / "run", device="cpu")
    for side in (256, 128, 64):
        images = pipeline.sample("a red circle", steps=1, width=side, height=side).images
        assert images.shape == (1, side, side, 3) and images.std() > 1
    assert pipeline.sample("a red circle", steps=1).images.shape == (1, 256, 256, 3)
