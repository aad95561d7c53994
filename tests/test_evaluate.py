"""`flowt2i evaluate`: distribution scores of a small real model and of folders, references, what is kept and gone on with, ranks, mistakes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_nets import dinov2, images, inception_file  # noqa: F401

from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import distribution, pictures, reference
from flowt2i.evaluation.frechet import Moments, frechet_distance
from flowt2i.evaluation.kid import kernel_distance
from flowt2i.evaluation.nets import load_net
from flowt2i.evaluation.reference import captioned, data_hash, same_data, spread
from flowt2i.export.export import export
from flowt2i.pipeline import Pipeline
from flowt2i.training.distributed import World
from flowt2i.training.loop import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(trained, scenes_data):
    return trained(scenes_data, "--train.steps", "4", "--optim.lr", "1e-2", "--train.ema", "0.5", "--train.score_prompts", "0")


@pytest.fixture
def small_blocks():
    with mock.patch.object(pictures, "BLOCK", 8):
        yield


def scores(words: list[str], capsys) -> dict:
    assert main(["evaluate", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def write(folder: Path, pictures_: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, picture in enumerate(pictures_):
        Image.fromarray(picture).save(folder / f"{k:04d}.png")
    return folder


def test_kernel_distance_of_a_model(run, dinov2, scenes_data, capsys, small_blocks):  # noqa: F811
    """The number is what the formulas give on the pictures that the pipeline draws of the held-out captions."""
    words = ["--model", str(run), "--metrics", "kid", "--net", str(dinov2), "--num", "30", "--steps", "2"]
    found = scores(words, capsys)
    name = "kid-dinov2-tiny-30@64"
    assert found["protocol"].startswith(f"{name}, reference ")
    assert "euler 2 steps, guidance 3, shift 3, guidance rule mean-kept, guidance until 0.3, seed 0, EMA weights" in found["protocol"]
    heldout = ImageTextDataset(scenes_data, "heldout")
    order = spread(len(heldout))  # of prompts and of real pictures alike
    prompts = [heldout.caption(int(order[k % len(heldout)])) for k in range(30)]
    drawn = Pipeline.from_pretrained(run, device="cpu").sample(prompts, seed=1_000_000, steps=2, batch_size=8).images
    net = load_net(str(dinov2))
    real = heldout.fetch(range(len(heldout))).stored.permute(0, 2, 3, 1).numpy()
    assert found[name] == pytest.approx(kernel_distance(net(drawn), net(real)).value, rel=1e-6)
    mixed = net(real)[torch.from_numpy(spread(len(real)))]
    a, b = mixed[: min(30, len(mixed) // 2)], mixed[min(30, len(mixed) // 2) :]
    assert found[f"{name}/floor"] == pytest.approx(kernel_distance(a, b).value, rel=1e-6) and found["errors"][name] > 0
    assert len(list((scenes_data / "references").iterdir())) == 1
    assert scores(words, capsys) == found
    assert len(list((run / "evaluation").iterdir())) == 1


def test_captions_are_asked_for_in_a_mixed_order():
    """Data lies sorted by source: the first few captions would be all of one. What has no caption is left out, of both."""
    captions = [f"{source} {k}" for source in "abcd" for k in range(100)]
    captions[::7] = [" "] * len(captions[::7])
    rows = captioned(captions)
    assert sorted(rows) == [k for k, caption in enumerate(captions) if caption.strip()]
    assert rows.tolist() == [k for k in spread(len(captions)) if captions[k].strip()]
    first = [captions[k][0] for k in rows[:60]]
    assert all(first.count(source) >= 8 for source in "abcd")


def test_data_are_the_same_where_pictures_division_and_captions_are(scenes_data, tmp_path):
    ours = ImageTextDataset(scenes_data, "heldout")
    again, other = ImageTextDataset(scenes_data, "heldout"), ImageTextDataset(scenes_data, "heldout")
    other.description = ours.description.model_copy(update={"heldout_fraction": 0.3})
    reworded = ImageTextDataset(scenes_data, "heldout")
    reworded.captions = lambda: ["a", *ours.captions()[1:]]  # type: ignore[method-assign]
    found = [data_hash(dataset) for dataset in (ours, again, other, reworded, ImageTextDataset(scenes_data, "train"))]
    assert found[0] == found[1] and len(set(found)) == 4
    assert same_data(ours.description, again.description) and not same_data(ours.description, other.description)


def test_an_evaluation_goes_on_where_it_was_stopped(run, dinov2, tmp_path, capsys, small_blocks):  # noqa: F811
    """Stopped after two blocks of four: these are not drawn again, a broken one is, and the score is that of an undisturbed evaluation."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    words = ["--model", str(copy), "--metrics", "kid", "--net", str(dinov2), "--num", "30", "--steps", "2", "--seed", "3"]
    sample, drawn = Pipeline.sample, []

    def stopped(self, *args, **settings):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(settings["seeds"][0])
        return sample(self, *args, **settings)

    with mock.patch.object(Pipeline, "sample", stopped):
        assert main(["evaluate", *words, "--json"]) == 130
    assert drawn == [4_000_000, 4_000_008]
    kept = sorted((copy / "evaluation").glob("*/*.npy"))
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:500])  # a disk that was full
    again = []

    def noting(self, *args, **settings):
        again.append(settings["seeds"][0])
        return sample(self, *args, **settings)

    capsys.readouterr()
    with mock.patch.object(Pipeline, "sample", noting):
        found = scores(words, capsys)
    assert again == [4_000_000, 4_000_016, 4_000_024]
    shutil.rmtree(copy / "evaluation")
    assert scores(words, capsys) == found
    with mock.patch.object(Pipeline, "sample", noting):  # other settings, other pictures
        scores([*words, "--guidance", "1"], capsys)
    assert len(again) == 3 + 4


def test_folders_against_closed_form(dinov2, tmp_path, capsys, small_blocks):  # noqa: F811
    """Without a model and data: the Fréchet and kernel distances of two folders."""
    made, real = write(tmp_path / "made", images(40, seed=1)), write(tmp_path / "real", images(50, seed=2))
    words = ["--images", str(made), "--reference", str(real), "--metrics", "frechet,kid", "--net", str(dinov2)]
    with mock.patch.object(distribution, "LEAST", 32):
        found = scores(words, capsys)
    net = load_net(str(dinov2))
    a, b = net(images(40, seed=1)), net(images(50, seed=2))
    assert found["frechet-dinov2-tiny-40@40"] == pytest.approx(frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-6)
    assert found["kid-dinov2-tiny-40@40"] == pytest.approx(kernel_distance(a, b).value, rel=1e-6)
    assert f"pictures of {made}" in found["protocols"]["kid"]
    assert main(["evaluate", *words]) == 0  # few pictures: only the kernel distance, and why
    text = capsys.readouterr().out
    assert "frechet was left out: a Fréchet distance of fewer than 2,048" in text and "25 real pictures against 25 others; wider" in text
    assert (real / ".references").is_dir() and main(["evaluate", *words[:4], "--metrics", "kid", "--net", str(dinov2), "--num", "20", "--json"]) == 0
    array = tmp_path / "made.npy"
    np.save(array, images(40, seed=1))
    capsys.readouterr()
    assert scores(["--images", str(array), *words[2:]], capsys)["kid-dinov2-tiny-40@40"] == found["kid-dinov2-tiny-40@40"]


def test_the_floor_of_a_frechet_distance(dinov2, tmp_path, capsys):  # noqa: F811
    """As many real pictures as are scored against the rest; of too few it is said, and none is given where a side is too small for any Fréchet distance."""
    made, real = write(tmp_path / "made", images(30, seed=1)), write(tmp_path / "real", images(50, seed=2))
    words = ["evaluate", "--images", str(made), "--reference", str(real), "--metrics", "frechet", "--net", str(dinov2)]
    cases = [(10, 20, "20 real pictures against 30 others\n"), (10, 30, "25 real pictures against 25 others; too high"), (26, 30, "no floor")]
    for least, num, told in cases:
        with mock.patch.object(distribution, "LEAST", least):
            assert main([*words, "--num", str(num)]) == 0
        assert told in capsys.readouterr().out


def test_fid_is_only_of_inception(inception_file, tmp_path, capsys):  # noqa: F811
    made, real = write(tmp_path / "made", images(4, seed=1)), write(tmp_path / "real", images(4, seed=2))
    words = ["--images", str(made), "--reference", str(real), "--metrics", "fid", "--net-weights", str(inception_file)]
    apart = lambda a, b: (a.mean - b.mean).square().sum().item()  # eigenvalues of 2,048 dimensions take their time
    with mock.patch.object(distribution, "LEAST", 4), mock.patch.object(distribution, "frechet_distance", apart):
        found = scores(words, capsys)
    net = load_net("inception", weights=inception_file)
    expected = apart(*(Moments.of(net(images(4, seed=seed))) for seed in (1, 2)))
    assert found["fid-inception-4@40"] == pytest.approx(expected, rel=1e-5) and found["protocol"].startswith("fid-inception-4@40, ")


def test_a_reference_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    identity = reference.Identity(net="n", net_fingerprint="f", resize="r", resolution=8, count=3, source="folder", source_hash="h", made="m")
    found = reference.Reference(identity, torch.rand(3, 4))
    for _ in range(2):  # the second time as where another evaluation was quicker
        found.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [identity.hash]
    monkeypatch.setattr(reference, "save_tensors", mock.Mock(side_effect=SafetensorError("No space left on device")))
    with pytest.warns(UserWarning, match="could not be kept .*No space left"):
        found.save(tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


def test_a_reference_that_does_not_fit_is_refused_by_name(run, dinov2, inception_file, tmp_path, capsys):  # noqa: F811
    made, real = write(tmp_path / "made", images(20)), write(tmp_path / "real", images(24, seed=2))
    assert main(["evaluate", "--images", str(made), "--reference", str(real), "--metrics", "kid", "--net", str(dinov2)]) == 0
    (kept,) = (real / ".references").iterdir()
    assert sorted(file.name for file in kept.iterdir()) == ["reference.json", "reference.safetensors"]
    again = ["evaluate", "--images", str(made), "--reference", str(kept), "--metrics", "kid"]
    assert main([*again, "--net", str(dinov2)]) == 0
    other = tmp_path / "dinov2-tiny"
    shutil.copytree(dinov2, other)
    (other / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.1, 0.1]}')

    def changed(name: str, **fields) -> str:
        folder = tmp_path / name
        shutil.copytree(kept, folder)
        facts = json.loads((folder / "reference.json").read_text())
        (folder / "reference.json").write_text(json.dumps(facts | fields))
        return str(folder)

    def other_features(name: str, features: torch.Tensor, **fields) -> str:
        folder = Path(changed(name))
        save_file({"features": features}, folder / "reference.safetensors")
        digest = hashlib.sha256((folder / "reference.safetensors").read_bytes()).hexdigest()
        facts = json.loads((folder / "reference.json").read_text())
        (folder / "reference.json").write_text(json.dumps(facts | {"features_sha256": digest} | fields))
        return str(folder)

    model = ["evaluate", "--model", str(run), "--metrics", "kid", "--net", str(dinov2), "--reference", str(kept), "--num", "16", "--steps", "1"]
    cases = [
        (model, "another resolution: 40, and 64"),
        ([*again, "--net", "inception", "--net-weights", str(inception_file)], "another net: 'dinov2-tiny'"),
        ([*again, "--net", str(other)], "another net_fingerprint"),
        ([*again[:4], changed("count", count=30), *again[5:], "--net", str(dinov2)], "count is 30"),
        ([*again[:4], changed("resize", resize="bilinear"), *again[5:], "--net", str(dinov2)], "another resize: 'bilinear'"),
        ([*again[:4], changed("coloured", colour="blue"), *again[5:], "--net", str(dinov2)], "not a reference this version reads"),
        ([*again[:4], changed("list", count=[30]), *again[5:], "--net", str(dinov2)], "not a reference this version reads"),
        ([*again[:4], other_features("nan", torch.full((24, 32), float("nan"))), *again[5:], "--net", str(dinov2)], "not finite"),
        ([*again[:4], other_features("narrow", torch.zeros(24, 7)), *again[5:], "--net", str(dinov2)], "7 numbers a picture, and dinov2-tiny gives 32"),
        ([*again[:4], other_features("more", torch.zeros(24, 32), features_sha256="0"), *again[5:], "--net", str(dinov2)], "not those that were written"),
    ]
    capsys.readouterr()
    for words, told in cases:
        assert main(words) == 2
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1, message


def test_mistakes_are_one_line_and_exit_2(run, dinov2, scenes_data, tmp_path, capsys):  # noqa: F811
    good = write(tmp_path / "good", images(20))
    (tmp_path / "empty").mkdir()
    mixed = write(tmp_path / "mixed", images(3))
    Image.new("RGB", (50, 50)).save(mixed / "z.png")
    oblong = tmp_path / "oblong"
    oblong.mkdir()
    Image.new("RGB", (50, 40)).save(oblong / "a.png")
    broken = write(tmp_path / "broken", images(2))
    (broken / "0001.png").write_bytes(b"no picture")
    nan = tmp_path / "nan"
    nan.mkdir()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(nan / "a.tif")
    np.save(tmp_path / "nan.npy", np.full((4, 8, 8, 3), np.nan, np.float32))
    np.save(tmp_path / "float.npy", np.zeros((4, 8, 8, 3), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", a=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(20))
    net = ["--net", str(dinov2)]
    model = ["--model", str(run), *net]
    folder = lambda path, *more: ["--images", str(path), "--reference", str(good), *net, *more]
    cases = [
        (folder(tmp_path / "empty"), "holds no images"),
        (folder(tmp_path / "nowhere"), "no folder of images"),
        (folder(mixed), "mixed sizes (0000.png 40x40, z.png 50x50)"),
        (folder(oblong), "not square (50x40)"),
        (folder(broken), "0001.png cannot be read"),
        (folder(nan), "not finite"),
        (folder(tmp_path / "nan.npy"), "not finite"),
        (folder(tmp_path / "float.npy"), "float32"),
        (folder(tmp_path / "objects.npy"), "nothing is unpickled"),
        (folder(tmp_path / "archive.npy"), "several arrays"),
        (folder(tmp_path / "zip.npy"), "cannot be read as an array"),
        (folder(good, "--device", "foo"), "cannot be used here"),
        (folder(write(tmp_path / "few", images(5))), "all error"),
        (folder(good, "--metrics", "frechet"), "fewer than 2,048"),
        (["--images", str(good), "--metrics", "loss"], "needs a model"),
        (["--images", str(good), "--metrics", "scenes"], "needs a model"),
        (folder(good, "--model", str(run)), "leave out --model"),
        (["--images", str(good), *net], "give --data DIR"),
        (["--images", str(good), *net, "--data", str(scenes_data)], "another resolution"),
        (["--images", str(good), *net, "--reference", str(tmp_path / "empty")], "holds no images"),
        (["--images", str(good), *net, "--reference", str(broken)], "cannot be read"),
        (["--model", str(run), "--metrics", "fid", "--num", "2048"], "--net-weights"),
        ([*model, "--metrics", "kid", "--num", "0"], "--num"),
        ([*model, "--metrics", "kid,"], "no metric ''"),
        ([*model, "--metrics", "fidd"], "'fid'"),
        (["--model", str(run), "--metrics", "kid", "--net", "facebook/dinov2-small"], "not on this machine"),
        ([*model, "--metrics", "kid", "--net-weights", "x.pth"], "goes with inception"),
        ([*model, "--metrics", "kid", "--seed", "-1"], "--seed"),
        ([*model, "--metrics", "kid", "--guide", str(tmp_path / "nowhere")], "nowhere"),
        ([*model, "--metrics", "kid", "--curve-num", "8"], "--curve-num is about the report"),
        ([*model, "--metrics", "kid", "--heldout-pairs"], "--heldout-pairs is about"),
        ([*model, "--metrics", "kid", "--clip", "x"], "--clip is about"),
        ([*model, "--metrics", "fid,scenes"], "--net is about"),
        (["--model", str(run), "--metrics", "scenes,loss", "--reference", "train"], "--reference is about"),
        ([*model, "--metrics", "scenes", "--out", str(broken / "0000.png" / "report")], "cannot write the report"),
        *(
            (folder(good, *words), f"{words[0]} is about a model's")
            for words in (
                ["--steps", "2"],
                ["--guidance", "0"],
                ["--guidance-interval", "0", "1"],
                ["--clip", "x"],
                ["--seed", "1"],
                ["--weights", "raw"],
                ["--heldout-pairs"],
                ["--compile"],
            )
        ),
        ([*model, "--metrics", "kid", "--steps", "0"], "steps 0"),
    ]
    with mock.patch.object(torch.hub, "get_dir", lambda: str(tmp_path / "hub")), mock.patch.object(
        torch.hub, "download_url_to_file", side_effect=OSError("no network")
    ):  # fmt: skip
        for words, told in cases:
            assert main(["evaluate", *words]) == 2, words
            message = capsys.readouterr().err
            assert told in message and message.count("\n") == 1, (words, message)


def test_a_model_or_codec_that_gives_nan_is_told(run):
    pipeline = Pipeline.from_pretrained(run, device="cpu")
    with pytest.raises(ValueError, match="not finite"):
        pipeline.to_images(torch.full((1, *pipeline.model.shape), float("nan")))


def test_loss_is_what_training_logged(run, capsys):
    found = scores(["--model", str(run), "--metrics", "loss"], capsys)
    logged = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    for name, key in (("raw", "validation"), ("ema", "validation_ema")):
        assert found[f"loss-16@64/{name}"] == pytest.approx(logged[key]["loss"], rel=1e-6)
        assert found[f"loss-16@64/{name}/t0.4-0.6"] == pytest.approx(logged[key]["t0.4-0.6"], rel=1e-6)
    assert found["loss-16@64/raw"] != found["loss-16@64/ema"]


def test_loss_of_an_exported_model_and_of_fewer_images(run, scenes_data, tmp_path, capsys):
    """An export of the averaged weights has the loss of these, under their name. Images that the model was trained on are no held-out ones."""
    whole = scores(["--model", str(run), "--metrics", "loss"], capsys)
    export(run, tmp_path / "export", samples=1)
    found = scores(["--model", str(tmp_path / "export"), "--data", str(scenes_data), "--metrics", "loss"], capsys)
    assert found["loss-16@64/ema"] == whole["loss-16@64/ema"] and "loss-16@64/raw" not in found
    few = scores(["--model", str(run), "--metrics", "loss", "--num", "8"], capsys)
    assert "the first 8 heldout" in few["protocol"] and few["loss-8@64/ema"] != whole["loss-16@64/ema"] and "floor 0.4, fp32" in few["protocol"]
    other = tmp_path / "data"
    shutil.copytree(scenes_data, other)
    DatasetDescription.load(other).model_copy(update={"heldout_fraction": 0.3}).save(other)
    assert main(["evaluate", "--model", str(run), "--metrics", "loss", "--data", str(other)]) == 2
    assert "divides the data of the model otherwise" in capsys.readouterr().err


def test_several_metrics_at_once(run, dinov2, capsys):  # noqa: F811
    found = scores(["--model", str(run), "--metrics", "kid,scenes,loss,frechet", "--net", str(dinov2), "--num", "20", "--steps", "1"], capsys)
    assert set(found["protocols"]) == {"kid", "scenes", "loss"} and "2,048" in found["skipped"]["frechet"]
    assert "scenes-prompts-20@64/all" in found["intervals"]
    assert main(["evaluate", "--model", str(run), "--num", "4", "--steps", "1"]) == 0  # a scenes model: the scenes score
    assert "scenes-prompts-4@64" in capsys.readouterr().out


def test_mistakes_come_before_the_work_and_scores_before_a_failure(run, tmp_path, capsys):
    """What a later metric refuses is said before a picture is drawn; where it fails at its work, what was found is printed first."""
    words = ["evaluate", "--model", str(run), "--metrics", "scenes,loss", "--num", "4", "--steps", "1"]
    late = mock.patch("flowt2i.evaluation.loss.metric", side_effect=UserError("too late"))
    with late:
        assert main(words) == 2
    told = capsys.readouterr()
    assert "scenes-prompts-4@64" in told.out and "too late" in told.err
    with late:
        assert main([*words, "--json"]) == 2
    assert "scenes-prompts-4@64/all" in json.loads(capsys.readouterr().out.splitlines()[-1])
    with mock.patch.object(Pipeline, "sample", side_effect=AssertionError("drawn")), mock.patch(
        "flowt2i.evaluation.loss.check", side_effect=UserError("in time")
    ):  # fmt: skip
        assert main([*words, "--seed", "5"]) == 2
    assert "in time" in capsys.readouterr().err


def test_a_guide_is_known_by_its_weights(run, capsys):
    """In the name of the pictures that are kept, where its path is the same, and in the protocol."""
    pipeline, guide = (Pipeline.from_pretrained(run, device="cpu") for _ in range(2))
    prints = [pictures.Drawing(pipeline, ["a"], 0, settings).fingerprint() for settings in ({}, {"guide": guide})]
    next(guide.model.parameters()).data.add_(1)
    prints.append(pictures.Drawing(pipeline, ["a"], 0, {"guide": guide}).fingerprint())
    assert len(set(prints)) == 3
    found = scores(["--model", str(run), "--metrics", "scenes", "--num", "2", "--steps", "1", "--guide", str(run)], capsys)
    assert f"guide tiny@{pictures.weights_hash(pipeline)[:8]}" in found["protocol"]


def test_a_model_of_the_hub(run, scenes_data, dinov2, capsys):  # noqa: F811
    """Named by its id; the hub's cache takes no pictures."""
    words = ["--data", str(scenes_data), "--metrics", "kid,loss", "--net", str(dinov2), "--num", "16", "--steps", "1", "--seed", "9"]
    kept = sorted(run.glob("evaluation/*"))
    with mock.patch("flowt2i.hub.local", lambda model: run if str(model) == "owner/name" else Path(model)):
        found = scores(["--model", "owner/name", *words], capsys)
    assert {"kid", "loss"} == set(found["protocols"]) and sorted(run.glob("evaluation/*")) == kept


def test_one_and_two_ranks_agree(run, dinov2, tiny_clip, tmp_path):  # noqa: F811
    """29 pictures in blocks of 8 over one and two ranks, each with nothing kept: the same numbers to 1e-6; a mistake is said once."""
    found = []
    for size in (1, 2):
        copy = tmp_path / f"run-{size}"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluation"))
        data = json.loads((run / "config.json").read_text())["resolved"]["data"]
        shutil.copytree(data, tmp_path / f"data-{size}", ignore=shutil.ignore_patterns("references"))
        words = ["--model", str(copy), "--data", str(tmp_path / f"data-{size}"), "--net", str(dinov2), "--num", "29", "--steps", "2", "--json"]
        words += ["--clip", str(tiny_clip), "--metrics"]
        script = tmp_path / f"evaluate-{size}.py"
        script.write_text(
            "import sys\nfrom flowt2i import cli\nfrom flowt2i.evaluation import distribution, memorisation, pictures\n"
            "pictures.BLOCK = distribution.LEAST = memorisation.LEAST_HELDOUT = 8\ncli.run(sys.argv[1:])\n"
        )  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--", str(script), "evaluate", *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, "kid,frechet,loss,scenes,clip,memorisation"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(done.stdout.strip().splitlines()) == 1
        found.append(json.loads(done.stdout))
    done = subprocess.run([*command, "frechet", "--num", "7", "--clip", ""], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode != 0 and done.stderr.count("flowt2i evaluate: error") == 1 and "fewer than 8" in done.stderr
    one, two = ({name: value for name, value in each.items() if isinstance(value, float)} for each in found)
    assert one.keys() == two.keys() and set(found[0]["protocols"]) == {"kid", "frechet", "loss", "scenes", "clip", "memorisation"}
    assert {"frechet-dinov2-tiny-29@64", "frechet-dinov2-tiny-29@64/floor", "clip-tiny-clip-29@64", "clip-tiny-clip-29@64/real pictures"} <= one.keys()
    assert all(one[name] == pytest.approx(two[name], rel=1e-6, abs=1e-9) for name in one), (one, two)


class TwoRanks(World):
    """Two ranks in two threads, which meet in a list each."""

    meeting, said = threading.Barrier(2), [None, None]

    def together(self, mine):
        self.said[self.rank] = mine
        self.meeting.wait(10)
        both = list(self.said)
        self.meeting.wait(10)
        return both

    def any(self, flag):
        return any(self.together(flag))

    def collect(self, mine, count):
        return np.concatenate(self.together(mine))[:count]


def test_ranks_share_their_pictures_after_every_block(small_blocks):
    """However long a block takes, no rank has more than one block to wait for, and a mistake ends both at the end of its round."""
    done: list[list[int]] = [[], []]

    def both(wrong: int) -> list:
        def rank(number: int):
            def work(rows):
                done[number].append(rows.start // 8)
                assert abs(len(done[0]) - len(done[1])) <= 1
                if rows.start // 8 == wrong:
                    raise UserError("broken")
                return np.arange(rows.start, rows.stop)[:, None]

            world = TwoRanks(number, 2, torch.device("cpu"))
            try:
                return pictures.over_ranks(world, 36, work, (1,), np.int64, False, "")[:, 0].tolist()
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(rank, (0, 1)))

    assert both(-1) == [list(range(36))] * 2 and done == [[0, 2, 4], [1, 3, 4]]
    done[:] = [], []
    with mock.patch.object(pictures, "raise_everywhere", told_by_any):
        assert both(1) == ["broken"] * 2 and done == [[0], [1]]


def told_by_any(world, failure):
    said = [error for error in world.together(failure) if error]
    if said:
        raise said[0]


@pytest.fixture(scope="module")
def latents(tiny, tmp_path_factory):
    """A folder of pictures, a dataset of a small random VAE's latents of them, and a model trained on these for two steps."""
    from diffusers import AutoencoderKL

    from flowt2i.data import scenes
    from flowt2i.data.options import PrepareOptions
    from flowt2i.data.prepare import prepare

    home = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (8, 8, 8, 8)}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, layers_per_block=1).save_pretrained(home / "vae")
    samples = [scenes.sample(0, i) for i in range(40)]
    write(home / "images", np.stack([image for image, _ in samples]))
    lines = [json.dumps({"file_name": f"{i:04d}.png", "text": caption}) for i, (_, caption) in enumerate(samples)]
    (home / "images" / "metadata.jsonl").write_text("\n".join(lines))
    prepare(PrepareOptions(sources=[str(home / "images")], out=home / "data", codec=str(home / "vae"), heldout=0.5, workers=1), progress=False)
    train(resolve("quickstart", [*tiny, "--train.steps", "2"]), home / "data", home / "run", progress=False)
    return home


def test_what_a_vae_loses(latents, dinov2, capsys, small_blocks):  # noqa: F811
    """Against the original pictures there is a reconstruction floor; against the data's own latents it is said that there is none."""
    words = ["--model", str(latents / "run"), "--metrics", "kid", "--net", str(dinov2), "--num", "20", "--steps", "1"]
    found = scores([*words, "--reference", str(latents / "images")], capsys)
    rebuilt = found["kid-dinov2-tiny-20@64/reconstruction"]
    pipeline, net = Pipeline.from_pretrained(latents / "run", device="cpu"), load_net(str(dinov2))
    files = sorted((latents / "images").glob("*.png"))
    real = np.stack([np.asarray(Image.open(files[k])) for k in spread(len(files))])
    through = distribution.through_codec(pipeline, real[:20])
    assert rebuilt == pytest.approx(kernel_distance(net(through), net(real[20:])).value, rel=1e-3) and rebuilt > 0  # a grey level by the batch
    assert np.abs(through.astype(int) - real[:20]).mean() > 5
    floor = found["kid-dinov2-tiny-20@64/floor"]
    with mock.patch.object(distribution, "through_codec", lambda _, images_: images_):  # a codec that loses nothing: no better than real pictures
        found = scores([*words, "--reference", str(latents / "images")], capsys)
    assert found["kid-dinov2-tiny-20@64/reconstruction"] == pytest.approx(floor, rel=1e-5, abs=1e-8)
    assert main(["evaluate", *words]) == 0
    text = capsys.readouterr().out
    assert "seen through the VAE" in text and "reconstruction" not in text
    facts = [json.loads(path.read_text()) for path in (latents / "data" / "references").glob("*/reference.json")]
    assert {fact["source"] for fact in facts} == {"folder", "heldout"} and any("decoded by VAE" in fact["made"] for fact in facts)


def test_kernel_distance_while_training(latents, tiny, tmp_path, recwarn):
    """On data that is not scenes, with EfficientNet-lite0: logged at evaluations. Without it: one note."""
    pytest.importorskip("efficientnet_lite_pytorch")
    words = [*tiny, "--train.steps", "2", "--train.eval_every", "1", "--train.score_images", "4"]
    train(resolve("quickstart", words), latents / "data", tmp_path / "with", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "with" / "eval.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["kid_error"] > 0 and np.isfinite(line["kid"]) for line in lines)
    recwarn.clear()
    with mock.patch("flowt2i.evaluation.nets.has_efficientnet", lambda: False):
        train(resolve("quickstart", words), latents / "data", tmp_path / "without", progress=False)
    assert "kid" not in (tmp_path / "without" / "eval.jsonl").read_text()
    assert sum("no kernel distance" in str(warning.message) for warning in recwarn) == 1


@pytest.mark.slow
def test_scores_order_damage_of_real_pictures(shared):
    """Blur, noise, JPEG and colours of real emoji: each of four strengths scores worse than the one before, under both distances."""
    import tarfile

    from flowt2i.data.images import load_square
    from flowt2i.evaluation.corruptions import CORRUPTIONS, corrupt

    pytest.importorskip("efficientnet_lite_pytorch")
    net, real = load_net("efficientnet-lite0"), []
    for path in sorted((shared / "data" / "emoji").glob("*.tar")):
        with tarfile.open(path) as tar:
            real += [load_square(tar.extractfile(member).read(), 64) for member in tar if member.name.endswith(".jpg")][:400]
    real = np.stack(real)[spread(len(real))]
    reference, pictures_ = net(real[64:128]), real[:64]
    whole, moments = net(pictures_), Moments.of(reference)
    for kind, (_, strengths) in CORRUPTIONS.items():
        features = [whole, *(net(corrupt(pictures_, kind, strength)) for strength in strengths)]
        distances = [frechet_distance(Moments.of(x), moments) for x in features]
        kernels = [kernel_distance(x, reference).value for x in features]
        assert distances == sorted(distances) and kernels == sorted(kernels), (kind, distances, kernels)
