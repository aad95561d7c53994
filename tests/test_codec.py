"""Image codecs: real (small, random) AutoencoderKLs saved to disk and loaded by path, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowt2i.codec import codec_from_spec, load_codec, stored_to_latents
from flowt2i.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_vae(folder: Path, seed: int = 0, **changes) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = len(changes.get("block_out_channels", (8, 8, 8, 8)))
    shape = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4} | changes
    net = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **shape)
    net.save_pretrained(folder)
    return folder


def edit_weights(folder: Path, change) -> None:
    save_file({name: change(name, value) for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def refused(call, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_pixels_round_trip_exactly(images):
    codec = load_codec("pixels", 32).to("cpu")
    stored = codec.encode(images)
    assert stored.dtype == codec.stored_dtype == np.uint8 and stored.shape[1:] == codec.stored_shape == codec.spec.shape == (3, 32, 32)
    latents = stored_to_latents("pixels", torch.from_numpy(stored))
    assert latents.dtype == torch.float32 and latents.min() >= -1 and latents.max() <= 1
    back = ((codec.decode(latents) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back, images)
    assert codec.decode(latents * 9).abs().max() == 1
    assert codec_from_spec(codec.spec).spec == codec.spec


def test_vae_shapes_and_types(vae, images):
    codec = load_codec(str(vae), 32).to("cpu")
    assert codec.spec.kind == "vae" and codec.spec.id == str(vae) and codec.spec.shape == (4, 4, 4)
    stored = codec.encode(images)
    assert stored.dtype == codec.stored_dtype == np.float16 and stored.shape == (3, *codec.stored_shape) == (3, 8, 4, 4)
    latents = stored_to_latents("vae", torch.from_numpy(stored))
    decoded = codec.decode(latents * 50)
    assert decoded.shape == (3, 3, 32, 32) and decoded.dtype == torch.float32 and decoded.abs().max() <= 1


def test_vae_stores_the_posterior_unscaled(vae, images):
    from diffusers import AutoencoderKL

    net = AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        posterior = net.encode(images / 127.5 - 1).latent_dist
    stored = torch.from_numpy(load_codec(str(vae), 32).encode(images))
    torch.testing.assert_close(stored_to_latents("vae", stored), posterior.mean, atol=2e-3, rtol=2e-3)
    noise = torch.randn(posterior.mean.shape)
    torch.testing.assert_close(stored_to_latents("vae", stored, noise), posterior.mean + posterior.std * noise, atol=1e-2, rtol=1e-2)


def test_sampling_formula():
    mean, logvar, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    stored = torch.cat([mean, logvar], dim=1)
    assert torch.equal(stored_to_latents("vae", stored), mean)
    torch.testing.assert_close(stored_to_latents("vae", stored, noise), mean + torch.exp(logvar / 2) * noise)


def test_shape_comes_from_the_vae(tmp_path):
    folder = save_vae(tmp_path, block_out_channels=(8, 8), latent_channels=16)
    assert load_codec(str(folder), 6).spec.shape == (16, 3, 3)
    refused(lambda: load_codec(str(folder), 7), "7", "multiple of 2", "take 8")
    refused(lambda: load_codec("pixels", 0), "0")


def test_bf16_is_near_and_fp16_refused(vae, images):
    exact, rough = load_codec(str(vae), 32), load_codec(str(vae), 32, dtype=torch.bfloat16)
    a, b = (stored_to_latents("vae", torch.from_numpy(codec.encode(images))) for codec in (exact, rough))
    assert not torch.equal(a, b) and (a - b).norm() < 0.05 * a.norm()
    assert rough.decode(a).dtype == torch.float32
    refused(lambda: load_codec(str(vae), 32, dtype=torch.float16), "float16")


def test_autocast_around_does_not_change_the_encoding(vae, images):
    codec = load_codec(str(vae), 32)
    plain = codec.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(codec.encode(images), plain)


def test_weights_named_as_in_2022_load_too(vae, images, tmp_path):
    # sd-vae-ft-mse itself names its attention query, key, value and proj_attn.
    folder = save_vae(tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for new, former in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        old[name] = value
    assert any("proj_attn" in name for name in old)
    save_file(old, folder / WEIGHTS)
    assert np.array_equal(load_codec(str(folder), 32).encode(images), load_codec(str(vae), 32).encode(images))


def test_codec_from_spec_notices_another_vae(vae, tmp_path):
    spec = load_codec(str(vae), 32).spec
    other = save_vae(tmp_path / "other", seed=1)
    refused(lambda: codec_from_spec(spec, str(other)), "fingerprint", spec.fingerprint[:12])
    refused(lambda: codec_from_spec(spec, "pixels"), "prepared")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", WEIGHTS):
        (moved / name).write_bytes((vae / name).read_bytes())
    codec = codec_from_spec(spec, str(moved))
    assert codec.spec.fingerprint == spec.fingerprint and codec.spec.id == str(moved)


def test_a_pipeline_folder_gives_its_vae(tmp_path):
    save_vae(tmp_path / "vae")
    assert load_codec(str(tmp_path), 32).spec.shape == (4, 4, 4)


def test_broken_vaes_are_named(tmp_path, images):
    folder = save_vae(tmp_path)
    good = (folder / WEIGHTS).read_bytes()
    edit_weights(folder, lambda name, value: torch.full_like(value, float("nan")) if name == "quant_conv.bias" else value)
    refused(lambda: load_codec(str(folder), 32).encode(images), "NaN", str(folder))
    (folder / WEIGHTS).write_bytes(good)
    edit_weights(folder, lambda name, value: torch.zeros_like(value) if name == "quant_conv.weight" else value)
    refused(lambda: load_codec(str(folder), 32).encode(images), "constant", str(folder))
    load_codec(str(folder), 32).encode(torch.full_like(images, 200))  # flat pictures prove nothing
    (folder / WEIGHTS).write_bytes(good)
    edit_weights(folder, lambda name, value: value * 1e6 if name == "quant_conv.weight" else value)
    refused(lambda: load_codec(str(folder), 32).encode(images), "inf", str(folder))
    (folder / WEIGHTS).write_bytes(good)
    weights = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in weights.items() if name != "quant_conv.bias"}, folder / WEIGHTS)
    refused(lambda: load_codec(str(folder), 32), "quant_conv.bias", str(folder))
    (folder / WEIGHTS).write_bytes(good[: len(good) // 2])
    refused(lambda: load_codec(str(folder), 32), str(folder))
    (folder / WEIGHTS).write_bytes(b"not safetensors")
    refused(lambda: load_codec(str(folder), 32), str(folder))


def test_what_is_not_a_vae_is_refused(tmp_path):
    folder = save_vae(tmp_path / "kind")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    refused(lambda: load_codec(str(folder), 32), "AutoencoderTiny", "AutoencoderKL")
    (folder / "config.json").write_text("{")
    refused(lambda: load_codec(str(folder), 32), "JSON")
    (folder / "config.json").unlink()
    refused(lambda: load_codec(str(folder), 32), "config.json")
    file = tmp_path / "file"
    file.write_text("")
    refused(lambda: load_codec(str(file), 32), "not a folder")
    for missing in ("/nowhere/vae", "./nowhere", "../nowhere/x", "~/nowhere", "a/b/c", f"{tmp_path}/x"):
        refused(lambda id=missing: load_codec(id, 32), "no such folder", missing)
    refused(lambda: load_codec("", 32), "empty")
    refused(lambda: load_codec("what ever?", 32), "hub id")


def test_pickled_weights_are_refused(vae, tmp_path):
    (tmp_path / "config.json").write_bytes((vae / "config.json").read_bytes())
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    refused(lambda: load_codec(str(tmp_path), 32), "pickled", "diffusion_pytorch_model.bin", "safetensors")


def test_images_that_cannot_be_encoded_are_an_error(vae, images):
    for codec, wrong in ((load_codec("pixels", 64), images.float()), (load_codec(str(vae), 64), images[..., :30]), (load_codec(str(vae), 64), images[:, :1])):
        with pytest.raises(ValueError, match="uint8"):
            codec.encode(wrong)


@pytest.mark.parametrize(("blocks", "channels"), [(4, 4), (4, 16), (5, 16), (3, 4)])
def test_large_pictures_are_decoded_in_tiles(tmp_path, blocks, channels):
    """Factors 8, 16 and 4, 4 and 16 channels, not square: in tiles much what it is in one piece, and exactly where all is below the limit."""
    factor = 2 ** (blocks - 1)
    codec = load_codec(str(save_vae(tmp_path / "vae", block_out_channels=(8,) * blocks, latent_channels=channels)), 8 * factor)
    latents = torch.randn(2, channels, 24, 40, generator=torch.Generator().manual_seed(0))
    whole, calls = codec.decode(latents), []
    hook = codec.net.decoder.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    codec.tile_above = 32 * factor
    tiled = codec.decode(latents)
    hook.remove()
    assert tiled.shape == whole.shape == (2, 3, 24 * factor, 40 * factor)
    assert len(calls) > 10 and max(max(shape[2:]) for shape in calls) == 16 * factor, "tiles of half of the limit"
    assert all(shape[0] == 1 for shape in calls), "one picture after another"
    # Norms and attention see a tile alone, which is much where the weights are random: the same picture, without seams where tiles meet.
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.85
    for axis in (2, 3):
        jumps = tiled.diff(dim=axis).abs().mean([d for d in range(4) if d != axis])
        seams = jumps[12 * factor - 1 :: 12 * factor]
        assert seams.max() < 1.5 * jumps.mean(), "no seam"
    assert torch.equal(codec.decode(latents[:, :, :16, :16]), load_codec(str(tmp_path / "vae"), 8 * factor).decode(latents[:, :, :16, :16]))
    assert not codec.net.use_tiling and not codec.net.use_slicing


def test_latents_of_any_shape_come_back_as_pictures_of_it(vae):
    codec = load_codec(str(vae), 64)
    stored = codec.encode(torch.randint(0, 256, (2, 3, 48, 88), dtype=torch.uint8))
    assert stored.shape == (2, 8, 6, 11) and codec.spec.latent_shape((88, 48)) == (4, 6, 11)
    assert codec.decode(stored_to_latents("vae", torch.from_numpy(stored))).shape == (2, 3, 48, 88)


def run_offline(code: str, home: Path, **env: str) -> subprocess.CompletedProcess:
    """The Hugging Face libraries read their settings when imported: a fresh process each."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    code = f"from flowt2i.errors import UserError\ntry:\n    {code}\nexcept UserError as error:\n    print('REFUSED', error)"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


NEEDS = {
    "vae": ("from flowt2i.codec import load_codec; load_codec('sd-vae-ft-mse', 64)", "'stabilityai/sd-vae-ft-mse'", "'pixels'"),
    "text": ("from flowt2i.text import make_tokenizer; make_tokenizer('t5-small')", "'t5-small'", "'builtin'"),
}


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("REFUSED"), lines
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "unreachable"])
@pytest.mark.parametrize("need", list(NEEDS))
def test_one_line_where_something_would_have_to_be_downloaded(tmp_path, need, env):
    code, id, instead = NEEDS[need]
    why = "HF_HUB_OFFLINE" if "HF_HUB_OFFLINE" in env else "cannot be reached"
    one_line(run_offline(code, tmp_path, **env), id, why, "pass the folder", instead)


@pytest.fixture
def hub(vae):
    """A stand-in for the hub on this machine: serves one VAE, and pickles, and refuses whatever else."""
    commit = "b" * 40
    repos = {
        "stabilityai/sd-vae-ft-mse": {name: (vae / name).read_bytes() for name in ("config.json", WEIGHTS)},
        "old/pickles": {"config.json": b"{}", "diffusion_pytorch_model.bin": b"never read"},
    }

    class Hub(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": commit} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
            id = "/".join(path.split("/")[:2])
            files = repos.get(id)
            if files is None:
                self.answer(503 if id.startswith("busy") else 404, X_Error_Code="RepoNotFound")
            elif path == id or path.startswith(f"{id}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, json.dumps({"id": id, "sha": commit, "siblings": siblings}).encode(), Content_Type="application/json")
            elif path.startswith(f"{id}/tree/"):
                tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            else:
                name = path.split("/")[-1]
                self.answer(200, files[name], ETag=f'"{hashlib.sha256(files[name]).hexdigest()}"')

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_from_a_hub_then_offline(hub, vae, tmp_path):
    code = "from flowt2i.codec import load_codec; print('SPEC', load_codec('sd-vae-ft-mse', 64).spec.model_dump_json())"
    first = run_offline(code, tmp_path, HF_ENDPOINT=hub, HF_HUB_DISABLE_XET="1")
    again = run_offline(code, tmp_path, HF_HUB_OFFLINE="1")
    spec = json.loads(again.stdout.removeprefix("SPEC "))
    assert spec["id"] == "stabilityai/sd-vae-ft-mse" and spec["fingerprint"] == load_codec(str(vae), 64).spec.fingerprint
    assert first.stdout == again.stdout and again.stderr == ""


@pytest.mark.parametrize(
    "id, words",
    [("no/such", ("404", "check the name")), ("busy/hub", ("503", "pass the folder")), ("old/pickles", ("pickled", ".bin"))],
)
def test_what_a_hub_refuses_is_one_line(hub, tmp_path, id, words):
    one_line(run_offline(f"from flowt2i.codec import load_codec; load_codec({id!r}, 64)", tmp_path, HF_ENDPOINT=hub), id, *words)


def test_half_a_copy_in_the_hub_cache_is_not_used(vae, tmp_path):
    repo = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_bytes((vae / "config.json").read_bytes())
    one_line(run_offline(NEEDS["vae"][0], tmp_path, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE", "pass the folder")


def test_a_batch_is_decoded_so_many_pixels_at_a_time(vae):
    codec = load_codec(str(vae), 64)
    latents = torch.randn(5, *codec.spec.shape, generator=torch.Generator().manual_seed(0))
    whole, calls = codec.decode(latents), []
    hook = codec.net.decoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    codec.pixels_at_once = 2 * 64 * 64 + 1
    parted = codec.decode(latents)
    codec.pixels_at_once = 1  # a picture at least
    assert len(codec.decode(latents[:2])) == 2
    hook.remove()
    assert calls == [2, 2, 1, 1, 1] and torch.allclose(parted, whole, atol=1e-5)
