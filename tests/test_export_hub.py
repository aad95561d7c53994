"""To the hub and back, over HTTP, against a hub of the test's own."""

import shutil

import numpy as np
import pytest
from hub_server import serving

from flowt2i import Pipeline
from flowt2i.cli import main
from flowt2i.errors import UserError


@pytest.fixture(scope="module")
def run(trained, scenes_data):
    return trained(scenes_data, "--train.steps", "2")


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Point huggingface_hub at an address, with a cache of the test's own; call it with the address."""
    from huggingface_hub import constants

    def at(address):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.chdir(tmp_path)  # no folder here has the name of a model

    return at


def test_pushed_and_loaded_again(run, tmp_path, online, capsys):
    with serving() as hub:
        online(hub.address)
        words = ["export", str(run), "--to", str(tmp_path / "to"), "--push", "me/scenes", "--samples", "2"]
        assert main(words) == 0
        assert f"sent to {hub.address}/me/scenes" in capsys.readouterr().out
        files = hub.files["me/scenes"]
        assert {"README.md", "samples.png", "model.safetensors", "export.json", "manifest.json", "tokenizer/tokenizer.json"} <= files.keys()
        assert b'from_pretrained("me/scenes")' in files["README.md"]
        files["pytorch_model.bin"] = files["evil.pkl"] = b"pickle"
        wanted = Pipeline.from_pretrained(run, device="cpu").sample("a red circle", steps=2).images
        assert np.array_equal(Pipeline.from_pretrained("me/scenes", device="cpu").sample("a red circle", steps=2).images, wanted)
        assert main(["generate", "a red circle", "--model", "me/scenes", "--out", "a.png", "--steps", "2"]) == 0
        assert "model.safetensors" in hub.fetched and not {"pytorch_model.bin", "evil.pkl"} & set(hub.fetched)
    cached = Pipeline.from_pretrained("me/scenes", device="cpu")  # the hub is gone now; what was fetched is used
    assert np.array_equal(cached.sample("a red circle", steps=2).images, wanted)


def test_what_the_hub_does_not_have(online, one_line):
    with serving() as hub:
        online(hub.address)
        hub.files["else/model"] = {"config.json": b"{}", "model.safetensors": b"gigabytes"}
        assert main(["generate", "x", "--model", "me/nothing"]) == 2
        assert "the hub has no such model" in one_line()
        assert main(["generate", "x", "--model", "else/model"]) == 2
        assert "was not written by `flowt2i export`" in one_line() and hub.fetched == []


def test_a_hub_out_of_reach(run, tmp_path, online, one_line):
    online("http://127.0.0.1:9")
    assert main(["generate", "x", "--model", "me/scenes"]) == 2
    assert "not on this machine and the hub cannot be reached: give a run folder" in one_line()
    assert main(["export", str(run), "--to", str(tmp_path / "to"), "--push", "me/scenes"]) == 2
    assert "the hub cannot be reached: leave out --push" in one_line() and not (tmp_path / "to").exists()


def test_offline_by_choice(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: give a run folder") as told:
        Pipeline.from_pretrained("me/scenes")
    assert "\n" not in str(told.value)


def test_a_push_that_is_refused_leaves_the_export(run, tmp_path, online, one_line):
    with serving() as hub:
        online(hub.address)
        hub.refuse = 403
        assert main(["export", str(run), "--to", str(tmp_path / "to"), "--push", "you/scenes", "--samples", "0"]) == 2
        assert "the hub refused it (403" in one_line()
    assert Pipeline.from_pretrained(tmp_path / "to", device="cpu").sample("a star", steps=1).images.shape == (1, 64, 64, 3)


def test_a_second_push_leaves_nothing_of_the_first_and_all_of_others(run, tmp_path, online):
    from flowt2i import hub as ours

    with serving() as hub:
        online(hub.address)
        words = ["export", str(run), "--to", str(tmp_path / "to"), "--push", "me/scenes", "--force", "--samples"]
        assert main([*words, "1"]) == 0 and "samples.png" in hub.files["me/scenes"]
        own = {"notes.md": b"mine", "pictures/a.png": b"mine"}
        hub.files["me/scenes"] |= own | {"vae/old.safetensors": b"of an earlier export", "transformer/config.json": b"{}", "pipeline.py": b""}
        assert main([*words, "0"]) == 0
        now = {f.relative_to(tmp_path / "to").as_posix() for f in (tmp_path / "to").rglob("*") if f.is_file()}
        assert hub.files["me/scenes"].keys() == now | own.keys() and "samples.png" not in now
        hub.files["me/other"] = {"model.safetensors.index.json": b"{}", "vae/config.json": b"{}"}  # no export of ours: nothing of it is removed
        ours.push(tmp_path / "to", "me/other")
        assert hub.files["me/other"].keys() == now | {"model.safetensors.index.json", "vae/config.json"}


def test_private_is_private_or_nothing_is_sent(run, tmp_path, online, capsys, one_line):
    with serving() as hub:
        online(hub.address)
        words = ["export", str(run), "--to", str(tmp_path / "to"), "--force", "--private", "--samples", "0", "--push"]
        assert main([*words, "me/secret"]) == 0 and hub.private == {"me/secret"} and "model.safetensors" in hub.files["me/secret"]
        assert main([*words, "me/secret"]) == 0
        hub.files["me/public"] = {}
        capsys.readouterr()
        assert main([*words, "me/public"]) == 2
        assert "this repository is public, and nothing was sent" in one_line() and hub.files["me/public"] == {}


def test_a_hub_in_trouble_is_not_about_logging_in(run, tmp_path, online, one_line):
    with serving() as hub:
        online(hub.address)
        hub.refuse = 400
        assert main(["export", str(run), "--to", str(tmp_path / "to"), "--push", "me/scenes", "--samples", "0"]) == 2
        told = one_line()
        assert "refused it (400" in told and "log in" not in told and "send it later with `hf upload me/scenes" in told


def test_a_model_that_was_fetched_in_part(run, tmp_path, online, capsys, one_line):
    """A download was broken off; or the repository itself lacks a file."""
    from huggingface_hub import snapshot_download

    with serving() as hub:
        online(hub.address)
        assert main(["export", str(run), "--to", str(tmp_path / "to"), "--push", "me/scenes", "--samples", "0"]) == 0
        snapshot_download("me/scenes", allow_patterns=["*.json"])
        capsys.readouterr()
    assert main(["generate", "x", "--model", "me/scenes"]) == 2
    assert "'me/scenes' was not fetched whole" in one_line()
    with serving() as other:
        online(other.address)
        other.files["me/torn"] = {name: data for name, data in hub.files["me/scenes"].items() if not name.startswith("tokenizer/")}
        assert main(["generate", "x", "--model", "me/torn"]) == 2
        assert "'me/torn' was not fetched whole" in one_line()


def test_a_path_is_never_looked_for_on_the_hub(run, online, tmp_path):
    with serving() as hub:
        online(hub.address)
        shutil.copytree(run, tmp_path / "runs" / "tiny")
        assert Pipeline.from_pretrained("runs/tiny", device="cpu").weights == "EMA"
        with pytest.raises(UserError, match="no model at runs/tinny"):
            Pipeline.from_pretrained("runs/tinny")
        assert hub.fetched == []
