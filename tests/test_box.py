"""Models in the box: what comes with the package, how it is found and taken, what is said where it is damaged, and how a model gets into it."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowt2i import Pipeline, box, hub
from flowt2i.cli import main
from flowt2i.commands.common import newest_run
from flowt2i.data import scenes, scenes_check
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.demo import Library, library
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import scenes as scenes_score
from flowt2i.export.export import export
from flowt2i.exported import read_mark, read_scores
from flowt2i.pictures import read_settings
from flowt2i.training import checkpoint

ROOT = Path(__file__).parents[1]
PACKAGED = sorted(path.name for path in box.folders())


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def packed(tiny_run, tmp_path_factory):
    """A folder of packaged models with one tiny model `scenes` in it, put there by the script."""
    place = tmp_path_factory.mktemp("box")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        pack_model = importlib.import_module("pack_model")
        words = [str(tiny_run), "--name", "scenes", "--num", "6", "--work", str(place / "work"), "--to", str(place / "models")]
        pack_model.main(words)
    return place / "models"


@pytest.fixture
def boxed(packed, tmp_path, monkeypatch):
    """An empty folder to work in; its package holds a copy of the tiny model."""
    shutil.copytree(packed, tmp_path / "package" / "models")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(box, "BOX", tmp_path / "package" / "models")
    return tmp_path / "package" / "models" / "scenes"


# ---- what really comes with this package ------------------------------------------------------------------------------


def test_a_model_of_scenes_comes_with_the_package_and_all_are_small_enough():
    assert PACKAGED[:1] and box.default() == box.BOX / "scenes"
    assert sum(map(box.weight_bytes, box.folders())) <= box.LIMIT


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_model_is_whole_and_says_all_that_it_has_to(name):
    folder = box.BOX / name
    assert checkpoint.damage(folder) is None
    mark, scores = read_mark(folder), read_scores(folder / "scores.json")
    assert mark and (mark.format, mark.weights) == ("flowt2i", "ema") and mark.licence and mark.training.seconds
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert scores.scores and all(score.low is not None and score.high is not None and score.protocol for score in scores.scores if score.share)
    card = (folder / "README.md").read_text()
    parts = ("## Data", "## Training", "flowt2i train ", "| time in steps |", "## Scores", "95% interval", "## Licence", "## Attribution")
    assert all(part in card for part in (*parts, "seeds 0 to 15, not picked"))
    assert (folder / "samples.png").stat().st_size < 500_000


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_model_tells_no_path_of_the_machine_that_made_it(name):
    for file in (f for f in (box.BOX / name).rglob("*") if f.is_file() and f.suffix != ".safetensors"):
        text = file.read_bytes().decode("utf-8", "replace")
        assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|mnt|Users|var)\b", text), file


def test_the_packaged_model_follows_prompts():
    """A weak bound on few prompts: that the right weights are in the box, and the bytes are read as what they are."""
    prompts = scenes.prompts(0, 24)
    found = scenes_score.score_images(Pipeline.from_pretrained("scenes", device="cpu").sample(prompts, seed=scenes_score.FIRST_SEED).images, prompts)
    assert found["all"]["accuracy"] > 0.8


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as pip installs it, built from a copy: a build leaves files beside its source."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, place / name)
    shutil.copytree(ROOT / "flowt2i", place / "flowt2i", ignore=shutil.ignore_patterns("__pycache__"))
    pip(place, "wheel", "--no-build-isolation", "-w", str(place / "out"), str(place))
    (found,) = (place / "out").glob("*.whl")
    return found


def pip(place, command, *words):
    done = subprocess.run([sys.executable, "-m", "pip", command, "--no-deps", "--no-index", "-q", *words], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_the_models(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("flowt2i/models/")}
    assert held == {file.relative_to(ROOT).as_posix() for file in box.BOX.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_installed_from_the_wheel_it_draws_in_an_empty_folder(wheel, tmp_path):
    pip(tmp_path, "install", "--target", str(tmp_path / "site"), str(wheel))
    (tmp_path / "here").mkdir()
    words = [sys.executable, "-m", "flowt2i", "generate", "a red circle"]
    done = subprocess.run(words, cwd=tmp_path / "here", env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True)
    assert done.returncode == 0 and "model: scenes, which comes with flowt2i" in done.stderr
    picture = np.asarray(Image.open(tmp_path / "here" / "picture.png"))
    assert "wrote picture.png" in done.stdout and scenes_check.check(picture, scenes.parse("a red circle")).all


# ---- found by name, and taken where nothing is named -------------------------------------------------------------------


def test_in_an_empty_folder_it_draws_at_once(boxed, capsys):
    assert main(["generate", "a red circle", "--steps", "1"]) == 0
    told = capsys.readouterr()
    assert "model: scenes, which comes with flowt2i" in told.err and told.err.count("\n") == 1
    assert read_settings(Path("picture.png"))["model"] == "scenes"
    assert [path.name for path in Path().iterdir()] == ["picture.png"]


def test_a_bare_name_finds_it_everywhere(boxed, scenes_data, capsys):
    assert hub.local("scenes") == boxed
    pictures = Pipeline.from_pretrained("scenes", device="cpu").sample(["a red circle"], steps=1).images
    assert np.array_equal(pictures, Pipeline.from_pretrained(boxed, device="cpu").sample(["a red circle"], steps=1).images)
    assert main(["generate", "a red circle", "--model", "scenes", "--steps", "1"]) == 0
    assert not capsys.readouterr().err  # it was named: there is nothing to say
    assert main(["train", "--init", "scenes", "--data", str(scenes_data), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["origin"]["model"] == "scenes"
    prepare(PrepareOptions.of(sources=["scenes"], count=12, out=Path("like"), like="scenes", workers=1), progress=False)
    assert DatasetDescription.load(Path("like")).text == DatasetDescription.load(boxed).text


def test_a_path_wins_over_a_name(boxed, tiny_run, one_line):
    shutil.copytree(checkpoint.find(tiny_run), "scenes")
    assert hub.local("scenes") == Path("scenes") and Pipeline.from_pretrained("scenes", device="cpu").step == 4
    assert hub.local("./scenes") == Path("./scenes") and hub.local("emoji") == Path("emoji")
    shutil.rmtree("scenes")
    Path("scenes").mkdir()  # no model at all: `prepare scenes --out scenes`, for instance
    assert main(["generate", "a red circle", "--model", "scenes"]) == 2 and "it hides the packaged model 'scenes'" in one_line()
    Path("scenes").rmdir()
    assert hub.local("./scenes") == Path("./scenes")  # a path is never a name


def test_the_newest_run_comes_before_it(boxed, tiny_run, capsys):
    shutil.copytree(tiny_run, "runs/mine")
    assert main(["generate", "a red circle", "--steps", "1"]) == 0
    assert "model: runs/mine, the newest" in capsys.readouterr().err and read_settings(Path("picture.png"))["model"] == "mine"
    shutil.copytree(tiny_run, "runs/older")
    for path, date in ((Path("runs/older/checkpoints"), 1_000_000_000), (Path("runs/mine/checkpoints"), 1_100_000_000)):
        for step in path.iterdir():
            os.utime(step, (date, date))
    Path("runs/older/evaluation").mkdir(exist_ok=True)  # looking at a run makes it no newer (other tests may have scored the tiny run)
    os.utime("runs/older/evaluation")
    Path("runs/begun/checkpoints").mkdir(parents=True)
    assert newest_run() == Path("runs/mine") == library.found()[0]


def test_evaluate_and_export_take_it_and_leave_the_package_as_it_was(boxed, capsys):
    before = sorted(boxed.rglob("*"))
    assert main(["evaluate", "--num", "2", "--steps", "1", "--json"]) == 0
    told = capsys.readouterr()
    assert "scenes-prompts-2@64/all" in json.loads(told.out.splitlines()[-1]) and told.err.count("which comes with flowt2i") == 1
    assert main(["export", "--to", "out", "--samples", "0"]) == 0
    assert (Path("out") / "model.safetensors").stat().st_size > 1.8 * (boxed / "model.safetensors").stat().st_size  # fp32 again, unless asked for bf16
    assert sorted(boxed.rglob("*")) == before and sorted(path.name for path in Path().iterdir()) == ["out"]


def test_the_demo_offers_it_behind_the_runs(boxed, tiny_run, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("flowt2i.demo.serve", lambda library, **options: seen.append(library))
    assert main(["demo"]) == 0 and "model: scenes, which comes with flowt2i" in capsys.readouterr().err
    shutil.copytree(tiny_run, "runs/mine")
    assert main(["demo"]) == 0 and "model: runs/mine, the newest" in capsys.readouterr().err
    assert main(["demo", "--model", "scenes"]) == 0 and not capsys.readouterr().err
    assert main(["demo", "--model", "runs/mine", "--only"]) == 0
    assert [library.names for library in seen] == [["scenes"], ["mine", "scenes"], ["scenes", "mine"], ["mine"]]
    assert isinstance(seen[0], Library) and seen[0].load("scenes").name.endswith("scenes")


def test_the_list_of_models(boxed, capsys):
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert "scenes: " in text and "licence apache-2.0" in text and "trained on: scenes" in text and "scenes-prompts-6@64/all: " in text
    assert main(["models", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["models"]
    assert (told["name"], told["path"], told["image_size"], told["licence"]) == ("scenes", str(boxed), 64, "apache-2.0")
    assert told["score"]["n"] == 6 and told["bytes"] == checkpoint.total_bytes(boxed) and told["parameters"] > 10_000


def test_without_any_model_it_is_said_what_to_do(boxed, one_line, capsys):
    shutil.rmtree(boxed)
    for words in (["generate", "a red circle"], ["evaluate"], ["export", "--to", "out"]):
        assert main(words) == 2 and "which model? give --model PATH" in one_line()
    assert main(["demo"]) == 2 and "no model to serve" in one_line()
    assert main(["generate", "a red circle", "--model", "scenes"]) == 2 and "see `flowt2i models`" in one_line()
    assert main(["models"]) == 0 and "no model came with this installation" in capsys.readouterr().out


def test_a_name_that_is_nearly_one_is_told(boxed, one_line):
    assert main(["generate", "a red circle", "--model", "scens"]) == 2 and "no model at scens (did you mean 'scenes'?): give" in one_line()
    for other in ("faces", "runs/scenes"):
        assert main(["generate", "a red circle", "--model", other]) == 2 and "did you mean" not in one_line()


# ---- damaged ----------------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name, harm, told",
    [
        ("model.safetensors", cut, "model.safetensors has"),
        ("model.safetensors", change_a_byte, "model.safetensors does not match its checksum"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("config.json", lambda file: file.write_text("{"), "config.json has"),
        ("tokenizer/tokenizer.json", change_a_byte, "tokenizer/tokenizer.json does not match its checksum"),
        ("manifest.json", lambda file: file.write_text("[]"), "manifest.json cannot be read"),
        ("manifest.json", Path.unlink, "manifest.json cannot be read"),
        ("export.json", Path.unlink, "export.json is missing"),
    ],
)
def test_a_damaged_model_is_one_line_that_says_to_install_again(name, harm, told, boxed, capsys):
    harm(boxed / name)
    for words in (["generate", "a red circle"], ["generate", "a red circle", "--model", "scenes"], ["evaluate", "--num", "2"], ["export", "--to", "out"]):
        assert main(words) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(error) == 1 and told in error[0] and "the packaged model 'scenes'" in error[0] and "install flowt2i again" in error[0]
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name, text", [("export.json", "[" * 100_000), ("dataset.json", "{"), ("scores.json", '{"scores": [{"value": "much"}]}')])
def test_the_list_says_which_file_is_broken(name, text, boxed, one_line):
    (boxed / name).write_text(text)
    assert main(["models"]) == 2 and name in one_line()


def test_a_foreign_folder_among_them_is_one_line(boxed, one_line, capsys):
    shutil.rmtree(boxed)
    boxed.mkdir()
    (boxed / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert main(["generate", "a red circle", "--model", "scenes"]) == 2 and "is not whole (export.json is missing)" in one_line()
    (boxed.parent / ".scenes.tmp").mkdir()
    assert [folder.name for folder in box.folders()] == ["scenes"]


# ---- how a model gets into the box -------------------------------------------------------------------------------------


def test_bf16_rounds_weights_and_little_of_the_pictures(tiny_run, packed):
    """Eight bits of each number remain: at most 2^-8 of it is lost. Read back they are fp32, and what they draw stays near what the run draws."""
    whole = load_file(checkpoint.find(tiny_run) / "ema.safetensors")
    pipeline = Pipeline.from_pretrained(packed / "scenes", device="cpu")
    rounded = pipeline.model.state_dict()
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float32}
    for name, tensor in whole.items():
        assert torch.equal(rounded[name], tensor.bfloat16().float())
        assert (rounded[name] - tensor).abs().max() <= tensor.abs().max() * 2**-8
    prompts = scenes.prompts(0, 8)
    ours, theirs = (p.sample(prompts, steps=8, guidance=3.0).images.astype(int) for p in (pipeline, Pipeline.from_pretrained(tiny_run, device="cpu")))
    assert np.abs(ours - theirs).max() > 0 and np.abs(ours - theirs).mean() < 4  # of 255 levels


def test_what_the_script_writes(packed, tiny_run):
    folder, card = packed / "scenes", (packed / "scenes" / "README.md").read_text()
    assert sorted(path.name for path in packed.iterdir()) == ["scenes"] and checkpoint.damage(folder) is None
    groups = list(dict.fromkeys(score.group for score in read_scores(folder / "scores.json").scores))
    assert groups == [f"scenes-{which}-6@64" for which in ("prompts", "heldout-pairs", "counts", "relations")]
    assert all(f"| {group}/all |" in card for group in groups) and "prompt seed 0, EMA weights" in card
    command = next(line for line in card.splitlines() if line.startswith("flowt2i train --config quickstart --data DATA "))
    assert "--data.batch_size 8 " in command and "--train.steps 4" in command and "--train.minutes" not in command
    assert "## Attribution" in card and str(tiny_run.parent) not in card and "seeds 0 to 15, not picked" in card


def test_packing_again_replaces_and_draws_nothing_twice(packed, tiny_run, tmp_path, benchmark, monkeypatch, capsys):
    pack_model = benchmark("pack_model")
    shutil.copytree(packed.parent / "work", tmp_path / "work")
    words = [str(tiny_run), "--name", "scenes", "--work", str(tmp_path / "work"), "--to", str(tmp_path / "models")]
    drawn = []
    monkeypatch.setattr(Pipeline, "sample", lambda self, prompts, _sample=Pipeline.sample, **s: drawn.append(len(prompts)) or _sample(self, prompts, **s))
    for _ in range(2):
        pack_model.main([*words, "--num", "6"])
    assert drawn == [16, 16] and "packed" in capsys.readouterr().out  # the samples of the card alone
    pack_model.main([*words, "--scores", str(tmp_path / "models" / "scenes" / "scores.json"), "--license", "mit"])
    assert box.describe(tmp_path / "models" / "scenes").licence == "mit"


def test_what_may_not_be_shipped_is_refused_and_the_earlier_model_stays(packed, tiny_run, tmp_path, benchmark, monkeypatch):
    pack_model = benchmark("pack_model")
    shutil.copytree(packed, tmp_path / "models")
    before = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*") if path.is_file()}
    (tmp_path / "notes.md").write_text(f"## Attribution\n\nsee {tmp_path}/data")
    words = [str(tiny_run), "--name", "scenes", "--work", str(tmp_path / "work"), "--to", str(tmp_path / "models")]
    words += ["--scores", str(packed / "scenes" / "scores.json")]
    told = {
        "on this machine": ["--notes", str(tmp_path / "notes.md")],
        "is no name of a model": ["--name", "../scenes"],
        "no notes at": ["--notes", str(tmp_path / "none.md")],
        "holds no scores": ["--scores", str(packed / "scenes" / "config.json")],
        "leave it out": ["--source", "my pictures"],
    }
    for what, more in told.items():
        with pytest.raises(UserError, match=what):
            pack_model.main([*words, *more])
    monkeypatch.setattr(box, "LIMIT", 100_000)
    with pytest.raises(UserError, match="is the limit"):
        pack_model.main(words)
    assert {path: path.read_bytes() for path in (tmp_path / "models").rglob("*") if path.is_file()} == before


def test_a_model_of_own_pictures_names_them(tiny_run, packed, tmp_path):
    """`--source` says what the card and the list call them; scenes are known as scenes."""
    from flowt2i.export.card import Told

    for source in ("scenes", "my pictures"):
        with pytest.raises(UserError, match="--source"):
            export(tiny_run, tmp_path / "out", told=Told(source=source), samples=0, device="cpu")


def test_prompts_of_a_kind():
    for kind in ("several_alike", "two_objects"):
        found = scenes_score.prompts_of_kind(kind, 0, 40)
        assert len(found) == 40 and {scenes_score.kind(prompt) for prompt in found} == {kind}
        assert scenes_score.prompts_of_kind(kind, 0, 10) == found[:10]


# ---- fine-tuning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory):
    """A folder of 48 captioned pictures that are no scenes: stripes."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    lines = []
    for k in range(48):
        stripes = (np.arange(48)[:, None, None] // (2 + k % 5) % 2) * rng.integers(60, 255, 3) + np.zeros((48, 48, 1))
        Image.fromarray(stripes.astype(np.uint8)).save(folder / f"{k:02d}.png")
        lines.append(json.dumps({"file_name": f"{k:02d}.png", "text": f"stripes {2 + k % 5} wide, number {k}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_the_benchmark_of_fine_tuning(tiny_run, own_pictures, tmp_path, benchmark, monkeypatch, capsys):
    pytest.importorskip("peft")
    fine_tune, trained = benchmark("fine_tune"), []

    def here(words):
        trained.append(words)
        assert main(["train", *words, "--resume", "latest", "--train.dry_run", "false"]) == 0

    monkeypatch.setattr(benchmark("learning_runs"), "train_apart", here)
    words = ["--model", str(tiny_run), "--images", str(own_pictures), "--heldout", "0.45", "--out", str(tmp_path), "--num", "16", "--minutes", "0.01"]
    words += ["--sample.steps", "1"]
    fine_tune.main(words)
    told = json.loads((tmp_path / "fine_tune.json").read_text())
    assert list(told["results"]) == ["before", "full", "lora"] and told["train"] + told["heldout"] == 48
    for found in told["results"].values():
        assert found["loss"]["value"] > 0 and found["kid-heldout"]["error"] > 0 and found["kid-train"]["error"] > 0 and len(found["loss"]["bins"]) == 5
    assert "--flow.edges" in told["results"]["full"]["settings"] and "--lora" in told["results"]["lora"]["settings"] and told["results"]["full"]["steps"] > 2
    assert told["results"]["full"]["loss"]["protocol"] == told["results"]["before"]["loss"]["protocol"]  # the same noise and times, floor and all
    assert "| lora |" in capsys.readouterr().out and (tmp_path / "fine_tune.png").exists() and "| full |" in (tmp_path / "fine_tune.md").read_text()
    fine_tune.main(words)  # once more: nothing is trained again
    assert len(trained) == 2
    with pytest.raises(UserError, match=r"holds a comparison with minutes 0\.01"):
        fine_tune.main([*words, "--minutes", "2"])


@pytest.fixture(scope="module")
def misfits(own_pictures, tmp_path_factory):
    """The same pictures, prepared as a model of 64 pixels cannot take them: as latents of a VAE, at 60 pixels, at 128, too few."""
    from export_models import save_vae

    folder = tmp_path_factory.mktemp("misfits")
    vae = save_vae(folder / "vae")
    like = {"workers": 1, "heldout": 0.45}
    for name, more in {"latents": {"codec": str(vae)}, "60": {"image_size": 60}, "128": {"image_size": 128}}.items():
        prepare(PrepareOptions.of(sources=[str(own_pictures)], out=folder / name, **like, **more), progress=False)
    return folder


@pytest.mark.parametrize(
    "data, words, told",
    [
        ("latents", [], "draws with codec 'pixels', the data were prepared with"),
        ("latents", ["--lora", "4"], "prepare the data again with --like"),
        ("128", ["--image-size", "64"], "was prepared at 128 pixels"),
        ("60", [], "prepare the data again with --like"),  # another tokenizer too
    ],
)
def test_data_of_another_codec_or_size_are_one_line(data, words, told, misfits, tiny_run, tmp_path, one_line):
    command = ["train", "--init", str(tiny_run), "--data", str(misfits / data), "--out", str(tmp_path / "run"), *words]
    assert main(command) == 2 and told in one_line() and not (tmp_path / "run").exists()


def test_a_size_that_the_patches_do_not_divide_is_one_line(own_pictures, tiny_run, scenes_data, tmp_path, one_line):
    of = lambda like: PrepareOptions.of(sources=[str(own_pictures)], out=tmp_path / "60", like=str(like), image_size=60, workers=1)
    with pytest.raises(UserError, match="multiples of 8; take 64, or give its data for --like"):
        prepare(of(tiny_run), progress=False)
    prepare(of(scenes_data), progress=False)
    assert main(["train", "--init", str(tiny_run), "--data", str(tmp_path / "60"), "--out", str(tmp_path / "run")]) == 2
    assert "60" in one_line() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "give --images DIR, or --data DIR"),
        (["--data", "LATENTS"], "draws with codec 'pixels'"),
        (["--data", "LARGE"], "was prepared at 128 pixels, and"),
        (["--data", "FEW"], "is too small: it holds out"),
        (["--images", "OWN", "--num", "4"], "--num at least 16"),
        (["--images", "OWN", "--optim.speed", "1"], "no setting --optim.speed"),
    ],
)
def test_mistakes_of_the_benchmark_are_one_line_and_exit_2(words, told, misfits, own_pictures, tiny_run, scenes_data, tmp_path, benchmark, one_line):
    own = {"sources": [str(own_pictures)], "like": str(tiny_run), "workers": 1}
    if "LARGE" in words:
        prepare(PrepareOptions.of(**own, out=tmp_path / "large", image_size=128, heldout=0.45), progress=False)
    if "FEW" in words:
        prepare(PrepareOptions.of(**own, out=tmp_path / "few", heldout=0.05), progress=False)
    places = {"LATENTS": misfits / "latents", "LARGE": tmp_path / "large", "FEW": tmp_path / "few", "OWN": own_pictures}
    fine_tune = benchmark("fine_tune")
    given = ["--model", str(tiny_run), "--out", str(tmp_path / "out"), *(str(places.get(word, word)) for word in words)]
    assert benchmark("ending").told(fine_tune.main)(given) == 2 and told in one_line()
