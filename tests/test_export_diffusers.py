"""`flowt2i export --format diffusers`: the same pictures from diffusers' own classes, also where flowt2i is not installed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from export_models import drawn, enliven, same, train_on_latents

from flowt2i import Pipeline
from flowt2i.errors import UserError
from flowt2i.export.carry import self_contained
from flowt2i.export.diffusers_format import as_diffusers, transformer_code
from flowt2i.export.export import export
from flowt2i.schedules import shift_times, uniform_times

PROMPTS = ["a red circle", "<end> three small \u202eblue stars </s>, twice: three small blue stars"]
STEPS, GUIDANCE, SHIFT = 6, 2.5, 1.7


@pytest.fixture(scope="module")
def pixels(trained, scenes_data):
    return enliven(trained(scenes_data, "--train.steps", "3", "--optim.lr", "1e-2", "--sample.shift", str(SHIFT)))


@pytest.fixture(scope="module")
def latents(tiny, tmp_path_factory):
    return train_on_latents(tmp_path_factory.mktemp("latents"), [*tiny, "--sample.shift", str(SHIFT)])


def noise(count):
    return [torch.Generator().manual_seed(3 + i) for i in range(count)]


def test_the_schedulers_times_are_ours():
    """t = 1 - sigma, and both shifts are the same number."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (0.5, 1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10))
        assert torch.allclose(1 - scheduler.sigmas, shift_times(uniform_times(10), shift), atol=1e-6)
        assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_the_same_pictures(kind, guidance, request):
    ours = Pipeline.from_pretrained(request.getfixturevalue(kind), device="cpu")
    theirs = as_diffusers(ours)
    theirs.set_progress_bar_config(disable=True)
    wanted = drawn(ours, PROMPTS, steps=STEPS, guidance=guidance)
    found = theirs(PROMPTS, num_inference_steps=STEPS, guidance_scale=guidance, generator=noise(2), output_type="np").images
    assert same(found, wanted) and wanted.std() > 0.05


def test_what_its_pipeline_offers(pixels):
    ours = Pipeline.from_pretrained(pixels, device="cpu")
    theirs = as_diffusers(ours)
    theirs.set_progress_bar_config(disable=True)
    start = ours.initial_noise([3, 4])
    settings = {"num_inference_steps": 2, "latents": start}
    images = theirs(PROMPTS, **settings).images
    assert [i.size for i in images] == [(64, 64)] * 2
    assert np.abs(np.stack([np.asarray(i) for i in images]).astype(int) - ours.sample(PROMPTS, steps=2, seed=3).images.astype(int)).max() <= 1
    seen = []
    theirs(PROMPTS, callback_on_step_end=lambda pipe, i, t, kept: seen.append((i, float(t))) or {}, **settings)
    assert [i for i, _ in seen] == [0, 1] and seen[0][1] == 1000
    assert theirs("a star", num_inference_steps=1, num_images_per_prompt=3, output_type="pt").images.shape == (3, 3, 64, 64)
    assert theirs("a star", num_inference_steps=1, output_type="latent", return_dict=False)[0].shape == (1, 3, 64, 64)
    throughout = theirs(PROMPTS, guidance_interval=(0, 1), output_type="np", **settings).images
    assert same(throughout, drawn(ours, PROMPTS, steps=2, guidance_until=1.0))
    assert np.abs(throughout - np.stack([np.asarray(i) for i in images]) / 255).max() > 0.01
    unlike = theirs(PROMPTS, negative_prompt="a blue star", output_type="np", **settings).images
    assert np.abs(unlike - np.stack([np.asarray(i) for i in images]) / 255).max() > 0.01
    each = theirs(PROMPTS, negative_prompt=["a blue star", ""], output_type="np", **settings).images
    assert np.abs(each[0] - unlike[0]).max() < 1e-5 and np.abs(each[1] - np.asarray(images[1]) / 255).max() < 0.01
    wrongs = ({"num_inference_steps": 0}, {"output_type": "jpeg"}, {"negative_prompt": ["a", "b"]}, {"latents": start}, {"latents": start[:1, :, :32]})
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"must be at least 1|choose pil|negative prompts for 1|begin at \(1, 3, 64, 64\)"):
            theirs("a star", **wrong)
    half = theirs.to(torch.bfloat16)(PROMPTS, output_type="np", **settings).images
    assert np.isfinite(half).all() and np.abs(half - np.stack([np.asarray(i) for i in images]) / 255).mean() < 0.05


def test_captions_are_read_where_the_transformer_runs(pixels, monkeypatch):
    """With `enable_model_cpu_offload` it goes to the device when it is called; with the built-in encoder it is needed before."""
    from accelerate import cpu_offload_with_hook

    theirs = as_diffusers(Pipeline.from_pretrained(pixels, device="cpu"))
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs("a star", num_inference_steps=1, output_type="latent", latents=torch.ones(1, 3, 64, 64)).images
    cpu_offload_with_hook(theirs.transformer, "cpu")
    calls = []
    read, called = theirs.transformer.encode_captions, theirs.transformer._hf_hook.pre_forward
    monkeypatch.setattr(theirs.transformer._hf_hook, "pre_forward", lambda *args, **kwargs: calls.append("moved") or called(*args, **kwargs))
    monkeypatch.setattr(theirs.transformer, "encode_captions", lambda *args: calls.append("read") or read(*args))
    found = theirs("a star", num_inference_steps=1, output_type="latent", latents=torch.ones(1, 3, 64, 64)).images
    assert calls == ["moved", "read", "moved"] and torch.equal(found, wanted)


ALONE = """
import sys
sys.modules["flowt2i"] = None  # as where it is not installed
import numpy as np, torch
from diffusers import DiffusionPipeline, AutoencoderKL, FlowMatchEulerDiscreteScheduler
prompts, out, ways = eval(sys.argv[1]), sys.argv[2], {"pixels": {}, "latents": {"low_cpu_mem_usage": False}}
found = {}
for folder, (kind, extra) in zip(sys.argv[3:], ways.items()):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True, **extra)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) and (kind == "pixels") == (pipe.vae is None)
    assert type(pipe.text_encoder).__name__ == ("NoneType" if kind == "pixels" else "T5EncoderModel")
    assert kind == "pixels" or isinstance(pipe.vae, AutoencoderKL)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(len(prompts))]
    found[kind] = pipe(prompts, num_inference_steps=%d, guidance_scale=%f, generator=generators, output_type="np").images
np.savez(out, **found)
""" % (STEPS, GUIDANCE)  # noqa: UP031 (the text has braces)


def test_the_folders_run_where_flowt2i_is_not_installed(pixels, latents, tmp_path):
    for kind, run in (("pixels", pixels), ("latents", latents)):
        export(run, tmp_path / kind, format="diffusers", samples=0, device="cpu")
    index = json.loads((tmp_path / "latents" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"] and not list(tmp_path.rglob("*.bin"))
    assert {file.stat().st_mode for file in tmp_path.rglob("*.safetensors")} == {(tmp_path / "latents" / "model_index.json").stat().st_mode}
    env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", ALONE, repr(PROMPTS), str(tmp_path / "found.npz"), str(tmp_path / "pixels"), str(tmp_path / "latents")]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    for kind, run in (("pixels", pixels), ("latents", latents)):
        wanted = drawn(Pipeline.from_pretrained(run, device="cpu"), PROMPTS, steps=STEPS, guidance=GUIDANCE)
        assert same(found[kind], wanted)
    with pytest.raises(UserError, match="was exported for diffusers"):
        Pipeline.from_pretrained(tmp_path / "pixels")


def test_the_code_that_travels_imports_nothing_of_ours(tmp_path):
    text = transformer_code()
    assert "class FlowTransformer" in text and "class FlowT2ITransformer" in text
    assert not [line for line in text.splitlines() if line.strip().startswith(("import flowt2i", "from flowt2i"))]
    (tmp_path / "lazy.py").write_text("def f():\n    from flowt2i.flow import to_data\n    return to_data\n")
    with pytest.raises(ValueError, match="still imports flowt2i"):
        self_contained(tmp_path / "lazy.py")
    (tmp_path / "carried.py").write_text("from flowt2i.data.captions import clean\n\nassert clean('a\\x00 b ') == 'a b'\n")
    exec(compile(self_contained(tmp_path / "carried.py"), "carried", "exec"), {})


def test_latent_models_take_their_nets_along(latents, tmp_path):
    """In our own format: VAE and text encoder lay in folders here, so no other machine could find them."""
    wanted = Pipeline.from_pretrained(latents, device="cpu").sample(PROMPTS, steps=2).images
    export(latents, tmp_path / "model", samples=2, device="cpu")
    said = (tmp_path / "model" / "dataset.json").read_text() + (tmp_path / "model" / "README.md").read_text()
    assert str(latents.parent) not in said and "from local files." in said and '"source": "local files"' in said
    moved = (latents.parent / "nets").rename(latents.parent / "gone")
    try:
        assert np.array_equal(Pipeline.from_pretrained(tmp_path / "model", device="cpu").sample(PROMPTS, steps=2).images, wanted)
        export(tmp_path / "model", tmp_path / "again", samples=0, device="cpu")
        assert np.array_equal(Pipeline.from_pretrained(tmp_path / "again", device="cpu").sample(PROMPTS, steps=2).images, wanted)
        with pytest.raises(UserError, match="no such folder"):
            export(latents, tmp_path / "other", samples=0, device="cpu")
        export(latents, tmp_path / "other", samples=0, device="cpu", codec=str(moved / "vae"), text=str(moved / "t5"))
        assert (tmp_path / "other" / "vae" / "config.json").exists()
    finally:
        moved.rename(latents.parent / "nets")
