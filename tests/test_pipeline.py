"""From a saved run to pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowt2i import Pipeline
from flowt2i.cli import main
from flowt2i.errors import UserError
from flowt2i.training import checkpoint


@pytest.fixture(scope="module")
def run(trained, scenes_data):
    return trained(scenes_data, "--train.steps", "4", "--optim.lr", "1e-2", "--train.ema", "0.5")


@pytest.fixture(scope="module")
def pipeline(run):
    return Pipeline.from_pretrained(run, device="cpu")


def test_pictures_and_their_metadata(pipeline):
    pictures = pipeline(["a red circle", "a blue star"], steps=3, guidance=2.0, seed=5)
    assert [p.size for p in pictures] == [(64, 64)] * 2
    info = json.loads(pictures[1].info["flowt2i"])
    assert (info["prompt"], info["seed"], info["steps"], info["guidance"], info["solver"]) == ("a blue star", 6, 3, 2.0, "euler")


def test_a_picture_does_not_depend_on_its_batch(pipeline):
    prompts = ["a red circle", "three small blue stars to the left of nothing at all", "a heart"]
    together = pipeline.sample(prompts, steps=4, seed=3).images.astype(int)
    split = pipeline.sample(prompts, steps=4, seed=3, batch_size=1).images.astype(int)
    alone = np.concatenate([pipeline.sample(p, steps=4, seed=3 + i).images for i, p in enumerate(prompts)]).astype(int)
    assert np.abs(together - alone).max() <= 1 and np.abs(together - split).max() <= 1  # rounding of one grey level
    assert np.abs(together[0] - together[1]).max() > 10


def test_the_same_seed_twice(pipeline):
    a, b = (pipeline.sample("a red circle", steps=3, seed=9).images for _ in range(2))
    assert np.array_equal(a, b) and not np.array_equal(a, pipeline.sample("a red circle", steps=3, seed=10).images)


@pytest.mark.parametrize("solver, guidance, evaluations", [("euler", 1.0, 4), ("euler", 2.0, 8), ("heun", 1.0, 7), ("heun", 3.0, 14)])
def test_evaluations_are_counted(pipeline, solver, guidance, evaluations):
    calls = []
    field = pipeline.field
    pipeline.field = lambda z, t, text, mask: calls.append(len(z)) or field(z, t, text, mask)
    try:
        samples = pipeline.sample("a red circle", steps=4, solver=solver, guidance=guidance, guidance_until=1.0)
    finally:
        del pipeline.field
    assert sum(calls) == samples.evaluations == evaluations


def test_previews_form_the_final_picture(pipeline):
    seen = []
    samples = pipeline.sample(["a red circle"], steps=6, preview=lambda step, steps, images: seen.append((step, images)), preview_every=2)
    assert [s for s, _ in seen] == [1, 3, 5, 6]
    assert np.abs(seen[-1][1].astype(int) - samples.images.astype(int)).max() <= 1  # Euler's last step lands on the predicted clean picture


def test_raw_and_ema_weights_differ(run):
    raw, ema = (Pipeline.from_pretrained(run, weights=w, device="cpu").sample("a red circle", steps=2).images for w in ("raw", "ema"))
    assert not np.array_equal(raw, ema)
    with pytest.raises(UserError, match="weights"):
        Pipeline.from_pretrained(run, weights="best")


def test_loads_from_checkpoint_and_run_alike(run, pipeline):
    (step,) = checkpoint.list_steps(run)
    other = Pipeline.from_pretrained(checkpoint.folder(run, step), device="cpu")
    assert np.array_equal(other.sample("a star", steps=2).images, pipeline.sample("a star", steps=2).images)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": -1},
        {"steps": 10**9},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
        {"shift": 0.0},
        {"shift": float("nan")},
        {"solver": "eulr"},
        {"num": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range(pipeline, settings):
    with pytest.raises(UserError):
        pipeline.sample("a red circle", **settings)


def test_odd_prompts(pipeline):
    with pytest.raises(UserError, match="empty"):
        pipeline.sample("  ")
    with pytest.raises(UserError, match="no prompt"):
        pipeline.sample([])
    with pytest.warns(UserWarning):
        assert pipeline.sample("word " * 5000, steps=1).images.shape == (1, 64, 64, 3)
    assert pipeline.sample("\ud800\x00 مرحبا", steps=1).images.shape == (1, 64, 64, 3)


class TestGenerate:
    def test_one_picture(self, run, tmp_path, capsys):
        assert main(["generate", "a red circle", "--model", str(run), "--out", str(tmp_path / "a.png"), "--steps", "2", "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["files"] == [str(tmp_path / "a.png")] and result["evaluations"] == 4 and result["seconds"] > 0
        picture = Image.open(tmp_path / "a.png")
        assert picture.size == (64, 64) and json.loads(picture.text["flowt2i"])["prompt"] == "a red circle"

    def test_several_pictures_and_their_grid(self, run, tmp_path, capsys):
        (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\n")
        words = [
            "generate",
            "--prompts",
            str(tmp_path / "prompts.txt"),
            "--num",
            "2",
            "--model",
            str(run),
            "--out",
            str(tmp_path / "g.png"),
            "--steps",
            "2",
            "--json",
        ]
        assert main(words) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(result["files"]) == 4 and Image.open(result["grid"]).width > 128
        assert json.loads(Image.open(result["grid"]).text["flowt2i"])["seeds"] == [0, 1, 2, 3]
        seeds = [json.loads(Image.open(f).text["flowt2i"])["seed"] for f in result["files"]]
        assert seeds == [0, 1, 2, 3]

    def test_what_is_drawn_is_there_whatever_happens_to_the_rest(self, run, tmp_path, monkeypatch):
        from flowt2i.drawing import Drawing

        batch, count = Drawing.batch, []

        def stopped(self, *rest):
            count.append(1)
            if len(count) == 3:
                raise KeyboardInterrupt
            return batch(self, *rest)

        words = ["generate", "a red circle", "a blue star", "--num", "3", "--model", str(run), "--steps", "2", "--batch-size", "2"]
        monkeypatch.setattr(Drawing, "batch", stopped)
        assert main([*words, "--out", str(tmp_path / "a" / "g.png")]) == 130
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"g-00{k}.png" for k in range(4)]
        monkeypatch.setattr(Drawing, "batch", batch)
        assert main([*words, "--out", str(tmp_path / "b" / "g.png")]) == 0
        for k in range(4):
            one, other = (Image.open(tmp_path / name / f"g-00{k}.png") for name in "ab")
            assert one.text == other.text and list(one.getdata()) == list(other.getdata())

    def test_a_picture_that_cannot_be_replaced_is_told_before_the_work(self, run, tmp_path, one_line):
        (tmp_path / "g-001.png").mkdir()
        assert main(["generate", "a", "b", "--model", str(run), "--out", str(tmp_path / "g.png")]) == 2
        assert f"cannot write {tmp_path / 'g-001.png'}" in one_line()

    @pytest.mark.parametrize(
        "words, told",
        [
            (["generate"], "no prompt"),
            (["generate", ""], "empty prompt"),
            (["generate", "x", "--steps", "0"], "steps 0"),
            (["generate", "x", "--steps", "many"], "invalid int"),
            (["generate", "x", "--guidance", "inf"], "guidance"),
            (["generate", "x", "--model", "/nowhere"], "no model at /nowhere"),
            (["generate", "x", "--out", "a.jpg"], ".png"),
            (["generate", "x", "--stepz", "3"], "--stepz"),
            (["evaluate", "runs/mine"], "unknown argument 'runs/mine' (--model runs/mine?)"),
            (["evaluate", "--nun=3"], "unknown option --nun;"),
            (["generate", "x", "--device", "nonsense"], "nonsense"),
            (["train", "--config", "quickstrt"], "'quickstart'"),
            (["train", "--train.stepz", "3"], "train.steps"),
            (["train", "--data", "/nowhere"], "no dataset at /nowhere"),
            (["prepare", "/nowhere", "--out", "/nowhere/data"], "/nowhere"),
            (["inspect", "/nowhere"], "no dataset at /nowhere"),
            (["generat", "x"], "'generate'"),
        ],
    )
    def test_mistakes_are_one_line_and_exit_2(self, words, told, run, one_line):
        if words[0] == "generate" and "--model" not in words:
            words = [*words, "--model", str(run)]
        try:
            status = main(words)
        except SystemExit as stop:  # argparse's own
            status = stop.code
        assert status == 2 and told in one_line()

    def test_a_damaged_checkpoint_is_refused(self, run, tmp_path, capsys):
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(checkpoint.newest_good(run), copy)
        weights = bytearray((copy / "ema.safetensors").read_bytes())
        weights[-1] ^= 1
        (copy / "ema.safetensors").write_bytes(weights)
        assert main(["generate", "x", "--model", str(copy), "--out", str(tmp_path / "a.png")]) == 2
        assert "damaged" in capsys.readouterr().err


def test_evaluate_scores_the_scenes(run, capsys):
    assert main(["evaluate", "--model", str(run), "--num", "12", "--steps", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = "scenes-prompts-12@64/all"
    interval = result["intervals"][name]
    assert interval["n"] == 12 and 0 <= interval["low"] <= result[name] <= interval["high"] <= 1
    counts = {key.rpartition("/")[2]: value["n"] for key, value in result["intervals"].items()}
    assert counts["one_object"] + counts.get("several_alike", 0) + counts.get("two_objects", 0) == 12
    assert counts.get("relation", 0) == counts.get("two_objects", 0) and counts["colour"] == 12
    assert "euler 2 steps" in result["protocol"] and "EMA weights" in result["protocol"]
    assert main(["evaluate", "--model", str(run), "--metrics", "fidd"]) == 2


def test_wilson_interval():
    from flowt2i.evaluation.scenes import wilson

    low, high = wilson(90, 100)
    assert abs(low - 0.8256) < 1e-3 and abs(high - 0.9448) < 1e-3  # Agresti & Coull's worked value
    assert wilson(0, 50)[0] == 0.0 and wilson(50, 50)[1] == 1.0


def test_training_losses_are_recorded_in_full_precision(run):
    line = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert torch.tensor(line["loss"], dtype=torch.float32).item() == line["loss"]


def test_running_out_of_memory_while_drawing_is_one_line(run, monkeypatch, capsys):
    def full(*rest, **more):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 805306368 bytes\nat")

    monkeypatch.setattr(Pipeline, "sample", full)
    assert main(["generate", "a red circle", "--model", str(run), "--out", "never.png"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert "out of memory ([enforce fail" in told[-1] and "ask for less at a time" in told[-1] and sum("error" in line for line in told) == 1
