"""`flowt2i export` in our own format: what travels, what it says of itself, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from flowt2i import Pipeline
from flowt2i.cli import main
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.export import native
from flowt2i.export.export import export
from flowt2i.export.facts import public_source
from flowt2i.training import checkpoint

ASKED = {"steps": 2, "seed": 7, "guidance": 2.0}
PROMPTS = ["a red circle", "three small blue stars"]


@pytest.fixture(scope="module")
def run(trained, scenes_data):
    return trained(scenes_data, "--train.steps", "3", "--optim.lr", "1e-2", "--train.ema", "0.5")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    to = tmp_path_factory.mktemp("export") / "tiny"
    assert main(["export", str(run), "--to", str(to), "--license", "apache-2.0", "--samples", "4"]) == 0
    return to


def pictures(path, **settings):
    return Pipeline.from_pretrained(path, device="cpu", **settings).sample(PROMPTS, **ASKED).images


def test_it_draws_the_same_pictures_bit_by_bit(run, exported):
    assert np.array_equal(pictures(exported), pictures(run))
    assert not list(exported.parent.glob(".*"))  # nothing is left beside it


def test_what_is_in_the_folder(exported):
    files = {f.relative_to(exported).as_posix() for f in exported.rglob("*") if f.is_file()}
    assert files == {
        "README.md", "samples.png", "config.json", "dataset.json", "export.json", "manifest.json", "model.safetensors", "tokenizer/tokenizer.json"
    }  # fmt: skip
    assert checkpoint.damage(exported) is None
    (exported / "README.md").write_text((exported / "README.md").read_text() + "\nedited\n")  # cards are for people to edit
    assert checkpoint.damage(exported) is None


def test_the_model_card_says_what_the_run_recorded(run, exported):
    from huggingface_hub import ModelCard

    text, data = (exported / "README.md").read_text(), ModelCard.load(exported / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "flowt2i", "text-to-image")
    state = json.loads((checkpoint.newest_good(run) / "state.json").read_text())
    last = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert f"| steps | {state['step']} |" in text and f"| images seen | {state['images_seen']} |" in text and "| time in steps |" in text
    assert f"| validation/loss | {last['validation']['loss']:.4g} |" in text and f"| score | {last['score']:.4g} |" in text
    assert "seeds 0 to 3, not picked" in text and "64×64" in text and str(run.parent) not in text
    assert Image.open(exported / "samples.png").width > 128


def test_raw_weights_and_an_export_of_an_export(run, exported, tmp_path):
    raw, again = tmp_path / "raw", tmp_path / "again"
    export(run, raw, weights="raw", samples=0, device="cpu")
    assert np.array_equal(pictures(raw), pictures(run, weights="raw")) and not (raw / "samples.png").exists()
    with pytest.raises(UserError, match="no ema weights: choose raw"):
        Pipeline.from_pretrained(raw, weights="ema")
    result = export(exported, again, samples=0, device="cpu")
    assert (result["weights"], result["step"]) == ("ema", 3) and Pipeline.from_pretrained(again, device="cpu").weights == "EMA"
    assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert json.loads((again / "export.json").read_text())["training"] == json.loads((exported / "export.json").read_text())["training"]
    assert "No licence was stated" in (again / "README.md").read_text()


def test_the_mean_of_several_trainings(run, trained, scenes_data, tmp_path, one_line, capsys):
    other = trained(scenes_data, "--train.steps", "2", "--optim.lr", "1e-2", "--train.seed", "5")
    assert main(["export", str(run), "--average", str(other), str(run), "--to", str(tmp_path / "mean"), "--samples", "0"]) == 0
    states = [Pipeline.from_pretrained(m, device="cpu").model.state_dict() for m in (run, other, tmp_path / "mean")]
    for a, b, mean in zip(*(state.values() for state in states)):
        assert torch.allclose((2 * a + b) / 3, mean, atol=1e-6)
    assert not torch.equal(states[0]["unembed.weight"], states[2]["unembed.weight"])
    card, mark = (tmp_path / "mean" / "README.md").read_text(), json.loads((tmp_path / "mean" / "export.json").read_text())
    assert other.name == run.name and f"the mean of this training's and those of `{run.name}` (2 times)" in card and str(run.parent) not in card
    assert mark["training"]["averaged"] == [other.name, run.name] and mark["training"]["scores"] == {}
    export(tmp_path / "mean", tmp_path / "again", samples=0, device="cpu")
    assert json.loads((tmp_path / "again" / "export.json").read_text())["training"]["averaged"] == [other.name, run.name]
    wider = trained(scenes_data, "--train.steps", "1", "--model.depth", "3")
    capsys.readouterr()
    assert main(["export", str(run), "--average", str(wider), "--to", str(tmp_path / "no"), "--samples", "0"]) == 2
    assert "architecture is another" in one_line() and not (tmp_path / "no").exists()
    assert main(["export", str(run), "--average", str(tmp_path / "nowhere"), "--to", str(tmp_path / "no"), "--samples", "0"]) == 2
    assert "nowhere" in one_line()


def test_half_precision_is_half_the_size_and_nearly_the_same(run, exported, tmp_path):
    export(run, tmp_path / "half", dtype="bf16", samples=0, device="cpu")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", exported)]
    assert 0.45 < sizes[0] / sizes[1] < 0.6
    assert np.abs(pictures(tmp_path / "half").astype(int) - pictures(exported).astype(int)).mean() < 8


def test_complete_or_absent(run, tmp_path, monkeypatch):
    to = tmp_path / "model"
    export(run, to, samples=0, device="cpu")
    before = (to / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        (args[1] / "model.safetensors").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "write", full)
    for target, force in ((tmp_path / "new", False), (to, True)):
        with pytest.raises(UserError, match="No space left on device"):
            export(run, target, samples=0, force=force, device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (to / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    to.rename(tmp_path / ".model.old")  # killed between the two renames
    with pytest.raises(UserError, match="add --force"):
        export(run, to, samples=0, device="cpu")
    export(run, to, samples=0, force=True, weights="raw", device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (to / "model.safetensors").read_bytes() != before


def test_other_peoples_files_are_never_replaced(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        export(run, tmp_path / "mine", samples=0, force=True, device="cpu")
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.tmp").mkdir()  # of an export that was killed
    export(run, tmp_path / "empty", samples=0, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "mine"]
    assert DatasetDescription.load(tmp_path / "empty").prompts == ()  # no caption travels that the card does not show
    with FileLock(tmp_path / ".empty.lock"), pytest.raises(UserError, match="another export is writing"):
        export(run, tmp_path / "empty", samples=0, force=True, device="cpu")


@pytest.mark.parametrize(
    "words, told",
    [
        (["/nowhere"], "no model at /nowhere"),
        (["FOREIGN"], "holds no checkpoint yet"),
        (["DAMAGED"], "is damaged"),
        (["RUN", "--format", "difusers"], "'diffusers'"),
        (["RUN", "--format", "onnx", "--dtype", "bf16"], "is fp32"),
        (["RUN", "--dtype", "fp16"], "no dtype 'fp16'"),
        (["RUN", "--weights", "best"], "no weights 'best'"),
        (["RUN", "--samples", "-1"], "--samples -1"),
        (["RUN", "--license", "All rights"], "--license"),
        (["RUN", "--push", "not a name"], "--push 'not a name'"),
        (["RUN", "--push", "scenes"], "--push 'scenes'"),
        (["RUN", "--push", "a/b/c"], "--push 'a/b/c'"),
        (["RUN", "--private"], "add --push OWNER/NAME"),
        (["RUN", "--format", "onnx", "--take-nets"], "leave out --take-nets"),
        (["RUN", "--format", "diffusers", "--take-nets"], "leave out --take-nets"),
        (["RUN", "--push", "me/name"], "nobody is logged in"),
        (["RUN", "--to", "RUN"], "holds other files"),
        (["RUN", "--to", "FILE"], "is a file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words, told, run, exported, tmp_path, monkeypatch, one_line):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "file").write_text("x")
    if "DAMAGED" in words:
        shutil.copytree(exported, tmp_path / "damaged")
        (tmp_path / "damaged" / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-1])
    places = {"RUN": run, "FOREIGN": tmp_path / "foreign", "FILE": tmp_path / "file", "DAMAGED": tmp_path / "damaged"}
    words = [str(places.get(word, word)) for word in words]
    before = sorted(p.name for p in run.iterdir())
    assert main(["export", "--to", str(tmp_path / "to"), *words]) == 2 and told in one_line()
    assert not (tmp_path / "to").exists() and sorted(p.name for p in run.iterdir()) == before


def test_a_foreign_mark_is_one_line(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "export.json").write_text("[]")
    with pytest.raises(UserError, match=r"export\.json cannot be read"):
        Pipeline.from_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "export.json").write_text('{"format": "onnx", "weights": "raw"}')
    with pytest.raises(UserError, match="was exported for onnx"):
        Pipeline.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("text", ['{"format": "flowt2i", "weights": "../raw"}', '{"format": "exe", "weights": "ema"}', '{"format": "onnx"}', "[" * 200_000, ""])
def test_a_torn_or_hostile_mark_is_one_line(text, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "export.json").write_text(text)
    with pytest.raises(UserError, match=r"export\.json cannot be read"):
        Pipeline.from_pretrained(tmp_path / "copy")
    with pytest.raises(UserError, match="holds other files"):
        export(exported, tmp_path / "copy", force=True)


@pytest.mark.parametrize("training", [None, "much", {"step": "many"}, {"scores": {"loss": [1]}}, {"scores": {"loss": 1.0}}, {"step": 3, "device": "cuda:0"}])
def test_facts_that_are_none_leave_the_model_usable(training, exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "export.json").write_text(json.dumps({"format": "flowt2i", "weights": "ema", "training": training}))
    checkpoint.write_manifest(tmp_path / "copy", leave_out=("README.md", "samples.png"))
    assert main(["export", str(tmp_path / "copy"), "--to", str(tmp_path / "to"), "--samples", "0"]) == 0
    card, known = (tmp_path / "to" / "README.md").read_text(), training == {"step": 3, "device": "cuda:0"}
    assert "| seed |" in card and ("| steps | 3 |" in card) == known == ("1 × CUDA GPU" in card) and "None" not in card
    assert ("step 3" in capsys.readouterr().out) == known


def manifest_of(folder, change):
    entries = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(change(entries)))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda e: e | {"../outside": e["config.json"]}, "'../outside' is not in this folder"),
        (lambda e: e | {"/etc/passwd": e["config.json"]}, "'/etc/passwd' is not in this folder"),
        (lambda e: {k: v for k, v in e.items() if k != "config.json"}, "says nothing of config.json"),
        (lambda e: {k: v for k, v in e.items() if k != "model.safetensors"}, "says nothing of model.safetensors"),
        (lambda e: {"config.json": 3, "model.safetensors": 3}, "cannot be read"),
        (lambda e: [], "cannot be read"),
    ],
)
def test_a_manifest_that_vouches_for_nothing_is_refused(change, told, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    manifest_of(tmp_path / "copy", change)
    with pytest.raises(UserError, match="is damaged") as error:
        Pipeline.from_pretrained(tmp_path / "copy")
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "dataset.json", "tokenizer/tokenizer.json", "model.safetensors"])
def test_torn_files_and_those_nested_too_deep_are_one_line(name, exported, tmp_path):
    for number, text in enumerate(("[" * 200_000, "", None)):
        copy = tmp_path / str(number)
        shutil.copytree(exported, copy)
        if text is None:
            (copy / name).unlink()
        else:
            (copy / name).write_text(text)
            if name != "manifest.json":
                checkpoint.write_manifest(copy, leave_out=("README.md", "samples.png"))  # as one with bad intent would
        with pytest.raises(UserError) as error:
            Pipeline.from_pretrained(copy)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000 and "train longer" not in str(error.value)


def test_a_link_is_followed_and_kept(run, tmp_path):
    (tmp_path / "large" / "there").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "large" / "there")
    for force in (False, True):
        result = export(run, tmp_path / "link", samples=0, force=force, device="cpu")
        assert result["bytes"] > 100_000 and (tmp_path / "link").is_symlink() and (tmp_path / "large" / "there" / "export.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "link"] and [p.name for p in (tmp_path / "large").iterdir()] == ["there"]


def test_an_error_that_is_not_of_writing_is_not_blamed_on_it(run, tmp_path, monkeypatch):
    def fails(error):
        def write(*args, **kwargs):
            raise error

        monkeypatch.setattr(native, "write", write)

    fails(PermissionError(13, "Permission denied", "/elsewhere/vae/config.json"))
    with pytest.raises(UserError, match=r"^/elsewhere/vae/config\.json: Permission denied; nothing was exported"):
        export(run, tmp_path / "to", samples=0, device="cpu")
    fails(PermissionError(13, "Permission denied", str(tmp_path / ".to.tmp" / "model.safetensors")))
    with pytest.raises(UserError, match=r"cannot write --to .*: Permission denied"):
        export(run, tmp_path / "to", samples=0, device="cpu")
    fails(ConnectionError("reset"))
    with pytest.raises(ConnectionError):
        export(run, tmp_path / "to", samples=0, device="cpu")
    assert not list(tmp_path.iterdir())


def test_only_what_was_read_from_the_hub_is_named(exported):
    description = DatasetDescription.load(exported)

    def told(source, *hub):
        return public_source(description.model_copy(update={"source": source, "hub_sources": hub}))

    assert told("scenes") == "scenes" and told("me/pictures", "me/pictures") == "me/pictures"
    assert told("clients/acme") == told("data/*.tar, ~/acme, acme") == told("") == "local files"
    assert told("me/pictures, scenes, clients/acme", "me/pictures") == "me/pictures, scenes, local files"


def test_an_export_cannot_be_resumed(exported, scenes_data, tiny, tmp_path, capsys):
    words = ["train", "--config", "quickstart", "--data", str(scenes_data), "--out", str(tmp_path / "run"), *tiny, "--resume", str(exported)]
    assert main(words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "is an exported model, without the optimizer's state: resume from a run" in told
