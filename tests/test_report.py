"""The report, two models against each other, and how a run stands: on a tiny trained model, through the command line."""

import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import charts, on_track, page
from flowt2i.evaluation.assemble import measure_for
from flowt2i.evaluation.charts import Series, line_chart
from flowt2i.evaluation.report import Pictures, Point, Report, html, write
from flowt2i.score import Score
from flowt2i.training import checkpoint
from flowt2i.training.distributed import World
from flowt2i.training.loop import train


@pytest.fixture(scope="module")
def scenes_data(prepared) -> Path:
    """As everywhere, but with held-out pictures enough for near copies."""
    return prepared(240, 0.5)


@pytest.fixture(scope="module")
def runs(trained, scenes_data) -> list[Path]:
    """Two tiny models of one preset and data, evaluated twice on their way."""
    words = ["--train.steps", "4", "--train.eval_every", "2", "--train.dry_run", "false", "--train.seed"]
    return [trained(scenes_data, *words, seed) for seed in ("0", "1")]


def evaluate(*words) -> int:
    return main(["evaluate", "--steps", "2", "--device", "cpu", *map(str, words)])


class Checked(HTMLParser):
    """Every element closed, nothing loaded from elsewhere."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        for name, value in attributes:
            assert name not in ("src", "href") or value.startswith("data:image/png;base64,"), value
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(text: str) -> list[str]:
    parser = Checked()
    parser.feed(text)
    assert not parser.open and "http" not in text and "@import" not in text and "url(" not in text and "<script" not in text
    return parser.seen


def test_a_report_of_a_run(runs, scenes_data, tmp_path, capsys):
    words = ["--model", runs[0], "--data", scenes_data, "--metrics", "scenes,scenes-heldout,memorisation", "--num", "12", "--curve-num", "3"]
    assert evaluate(*words, "--out", tmp_path, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["report"] == [str(tmp_path / name) for name in ("report.json", "report.html")]
    assert 0 <= result["scenes-prompts-12@64/all"] <= 1 and result["scenes-heldout-pairs-12@64/all"] >= 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {s["name"] for s in report["scores"]} >= {"scenes-prompts-12@64/all", "scenes-heldout-pairs-12@64/all"}
    assert all(s["protocol"] and "euler 2 steps, guidance 3" in s["protocol"] and "EMA weights" in s["protocol"] for s in report["scores"])
    assert [p["x"] for p in report["curves"]["evaluations"]] == [1, 2, 4, 8, 16, 50] and report["curves"]["n"] == 3
    assert [p["evaluations"] for p in report["curves"]["evaluations"]] == [2, 4, 7, 13, 25, 79]  # guided, two passes a step, until t = 0.3
    assert [p["evaluations"] for p in report["curves"]["guidance"]][:2] == [2, 4]  # guidance 1 needs one pass
    assert [x for x, _ in report["training"]["validation"]] == [16, 32] and len(report["training"]["loss"]) == 4
    kinds = {name.partition(",")[0] for name in report["memorisation"]}
    assert "pixels" in kinds and all(len(m["pairs"]) == 8 and m["verdict"] and 0 <= m["near_copies"]["accuracy"] <= 1 for m in report["memorisation"].values())
    assert len(report["samples"]) == 12 and report["samples"][3]["seed"] == 1_000_003
    text = (tmp_path / "report.html").read_text()
    seen = checked(text)
    assert seen.count("svg") == 5 and seen.count("img") == 12 + 2 * 8 * len(report["memorisation"])
    assert "prefers-color-scheme" in text and "width=device-width" in text and report["samples"][0]["prompt"] in text


@pytest.mark.parametrize("words, passes, told", [
    (["--solver", "dopri5", "--tolerance", "0.5"], None, "dopri5 chooses its own"),
    (["--negative", "a red star"], [2, 4, 4, 4, 4, 4], ""),  # no guidance at 1: nothing to lead away from
    (["--solver", "heun", "--shift", "1", "--guidance-interval", "0.4", "1"], [3, 5, 5, 5, 5, 5], ""),  # guided in the last evaluations only, as counted
])  # fmt: skip
def test_every_sampler_has_its_report(runs, tmp_path, words, passes, told):
    assert evaluate("--model", runs[0], "--metrics", "scenes", "--num", "2", "--curve-num", "2", "--out", tmp_path, *words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    counted = [point["evaluations"] for point in report["curves"]["guidance"]]
    assert counted == passes if passes else counted[0] >= 6
    assert ("evaluations" in report["curves"]) == (not told) and told in " ".join(report["notes"])


def test_a_curve_that_cannot_be_drawn_costs_only_itself(runs, tmp_path, monkeypatch):
    from flowt2i.evaluation import assemble

    def sweep(*words):
        raise UserError("the disk is full")

    monkeypatch.setattr(assemble, "sweep", sweep)
    assert evaluate("--model", runs[0], "--metrics", "scenes", "--num", "2", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scores"] and [note for note in report["notes"] if "disk is full" in note]
    assert "disk is full" in (tmp_path / "report.html").read_text()


def test_a_curve_of_kernel_distances():
    """Of other data than scenes, without a CLIP; two pictures are too few, which is said and costs the curve alone."""

    def net(images):
        return torch.from_numpy(images.reshape(len(images), -1)[:, :8].copy()).float()

    net.dim, net.name = 8, "first pixels"
    pipeline = SimpleNamespace(description=SimpleNamespace(is_scenes=False))
    real = SimpleNamespace(features=torch.rand(40, 8) * 255)
    context = SimpleNamespace(
        need_pipeline=lambda what: pipeline, clip_name="", net=lambda: net, reference_of=lambda: real, world=World(0, 1, torch.device("cpu"))
    )
    measure = measure_for(context, kernel=True)
    value, low, high = measure.of(np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8), [""] * 100)
    assert low < value < high and measure.name == "kernel distance (first pixels)"
    with pytest.raises(UserError, match="three pictures"):
        measure.of(np.zeros((2, 8, 8, 3), np.uint8), ["", ""])


def test_two_models_side_by_side(runs, tmp_path, capsys):
    assert evaluate("--compare", *runs, "--num", "12", "--out", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    row = found["scores"]["all"]
    assert row["difference"]["low"] <= row["b"] - row["a"] <= row["difference"]["high"] and row["difference"]["n"] == 12
    assert found["scores"]["relation"]["difference"]["n"] < 12
    assert checked((tmp_path / "report.html").read_text()).count("img") == 24
    assert evaluate("--compare", runs[0], runs[0], "--num", "6", "--json") == 0  # a model against itself: no difference anywhere
    same = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert all(row["difference"]["difference"] == 0 and row["difference"]["p"] == 1 for row in same.values())
    assert evaluate("--compare", *runs, "--num", "6") == 0
    assert re.search(r"all .* \[.*\] +n=6 +p=", capsys.readouterr().out)


@pytest.mark.parametrize("words, told", [
    (["--curve-num", "4"], "draws no curves: leave out --curve-num"), (["--net", "inception"], "leave out --net"),
    (["--net-weights", "weights.pth"], "leave out --net-weights"), (["--reference", "heldout"], "looks at no real pictures: leave out --reference"),
    (["--metrics", "scenes"], "leave out --metrics"), (["--model", "/nowhere"], "names both models: leave out --model"),
    (["--images", "/nowhere"], "leave out --images"), (["--clip", "openai/clip-vit-base-patch32"], "exact checker: leave out --clip"),
    (["--data", "/nowhere"], "no dataset at /nowhere"), (["--steps", "0"], "steps 0"),
])  # fmt: skip
def test_what_a_comparison_does_not_look_at_is_refused(runs, words, told, one_line):
    assert evaluate("--compare", *runs, "--num", "2", *words) == 2 and told in one_line()


def test_the_clip_score_of_a_model(runs, scenes_data, tmp_path, capsys, tiny_clip):
    words = ["--model", runs[0], "--data", scenes_data, "--metrics", "clip", "--num", "6", "--clip", tiny_clip]
    assert evaluate(*words, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"clip-tiny-clip-6@64", "clip-tiny-clip-6@64/real pictures"} <= set(result) and any("retrieval-among-" in name for name in result)
    assert evaluate(*words[:-2]) == 2 and "--clip" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    (["--model", "/nowhere"], "no model at /nowhere"), (["--data", "/nowhere"], "no dataset at /nowhere"), (["--metrics", "scens"], "'scenes'"),
    (["--curve-num", "-1"], "--curve-num"), (["--images", "/nowhere"], "leave out"),
    (["--metrics", "clip"], "--clip"), (["--num", "0"], "--num"), (["--steps", "0"], "steps 0"),
    (["--compare", "/nowhere", "/nowhere"], "no model at /nowhere"), (["--clip", "openai/clip-vit-base-patch32", "--metrics", "clip"], "HF_HUB_OFFLINE"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(runs, words, told, one_line):
    if "--model" not in words and "--compare" not in words:
        words = ["--model", runs[0], *words]
    assert evaluate(*words) == 2 and told in one_line()


def test_a_model_of_other_data_and_one_that_diverged(runs, scenes_data, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    source = checkpoint.newest_good(runs[0])
    other = tmp_path / "other"
    shutil.copytree(source, other)
    description = json.loads((other / "dataset.json").read_text()) | {"source": "emoji", "fingerprint": "other"}
    (other / "dataset.json").write_text(json.dumps(description))
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    tensors = {name: torch.full_like(value, float("nan")) for name, value in load_file(broken / "ema.safetensors").items()}
    save_file(tensors, broken / "ema.safetensors")
    for folder in (other, broken):
        checkpoint.write_manifest(folder)
    for words, told in (
        (["--model", other, "--metrics", "scenes"], "trained on other data"),
        (["--model", other, "--data", scenes_data, "--metrics", "memorisation"], "is other data"),
        (["--model", other], "--data"),
        (["--compare", runs[0], other], "no prompts are fair"),
        (["--model", broken, "--metrics", "scenes", "--num", "2"], "not finite"),
    ):
        assert evaluate(*words) == 2, words
        said = capsys.readouterr().err
        assert told in said and said.strip().count("\n") == 0, said


# ---- charts and page


def test_a_chart_places_its_points():
    line = Series("run", [0, 10], [0.0, 1.0], style="a")
    text = line_chart([line], x_label="x", y_label="y", from_zero=True, name="growth")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in re.search(r'polyline class="line a" points="([^"]*)"', text)[1].split())
    assert x0 < x1 and y0 > y1 and y0 == charts.HEIGHT - charts.BOTTOM and y1 == charts.TOP
    assert ">growth" not in text and 'aria-label="growth"' in text and "<title>run: 1 at 10</title>" in text
    holes = line_chart([Series("run", [1, 2, 3], [1.0, float("nan"), 2.0])], x_label="x", y_label="y")
    assert "nan" not in holes.lower() and holes.count("<circle") == 2
    with pytest.raises(ValueError):
        line_chart([Series("run", [1], [float("nan")])], x_label="x", y_label="y")


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.42), (-3, 1200), (5, 5), (0, 0), (1e-4, 2e-4)])
def test_ticks_are_few_round_and_cover(low, high):
    found = charts.ticks(low, high, 5)
    assert 2 <= len(found) <= 8 and found[0] <= low and found[-1] >= high
    assert len({round(b - a, 12) for a, b in zip(found, found[1:])}) == 1


def test_what_people_wrote_is_text_not_html():
    nasty = "<script>alert('x')</script> & \"quotes\""
    report = Report(nasty, {}, nasty, [Score(nasty, 0.5, nasty, 0.4, 0.6, 10, True)], [{"prompt": nasty, "seed": 0}], notes=[nasty])
    text = html(report, Pictures(samples=[np.zeros((8, 8, 3), np.uint8)]))
    checked(text)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert page.data_uri(np.zeros((8, 8, 3), np.uint8)).startswith("data:image/png;base64,iVBOR")


def test_what_is_not_finite_and_no_character_is_reported_all_the_same(tmp_path):
    nan = float("nan")
    report = Report("run", {}, "protocol", [Score("kid-10@64", nan, "protocol", nan, nan, 10)], [{"prompt": "half a \ud83d smile", "seed": 0}])
    report.training = {"batch_size": 8, "preset": "quickstart", "score_prompts": 4, "score": [[8, nan], [16, nan]]}
    report.training |= {"loss": [[8, nan]], "validation": [[8, 1.0], [16, nan]]}
    report.curves = {"measure": "kernel distance", "share": False, "n": 2, "guidance": [Point(1.0, nan, nan, nan, 2)]}
    write(report, Pictures(samples=[np.zeros((8, 8, 3), np.uint8)]), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert checked(text).count("svg") == 1 and text.count("No value is finite") == 3 and "half a ? smile" in text
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN, which JSON does not know
    assert found["training"]["loss"] == [[8, None]] and found["scores"][0]["value"] is None


# ---- on track


@pytest.fixture
def quickstart(scenes_data):
    return resolve("quickstart"), DatasetDescription.load(scenes_data)


def test_our_own_curve_is_on_track(quickstart):
    reference, same = on_track.comparable(*quickstart)
    assert reference and same == {"score", "validation"} and len(reference["runs"]) >= 3
    for run in reference["runs"]:
        for (images, loss), (_, score) in zip(run["validation"], run["score"]):
            standing = on_track.standing({"images_seen": images, "validation_ema": {"loss": loss}, "score": score}, *quickstart)
            assert standing and standing.verdict == "on track" and "\n" not in standing.line and "ours" in standing.line, standing


def test_between_points_that_lie_far_apart():
    """A loss falls as a power of the images; beyond the ends, and for a run of one point, there is little to hold against."""
    reference = {"runs": [{"validation": [[10_000, 0.1], [40_000, 0.05]], "score": [[10_000, 0.0], [40_000, 0.3]]}, {"validation": [[100_000, 0.04]]}]}
    at = lambda what, images: on_track.expected(reference, what, images)
    assert at("validation", 20_000).mean == pytest.approx(0.1 / 2**0.5) and at("score", 20_000).mean == pytest.approx(0.1)
    assert at("validation", 41_000).mean == pytest.approx(0.05) and at("validation", 96_000) == on_track.Expected(*[pytest.approx(0.04)] * 3, 1)
    assert at("validation", 60_000) is at("score", 100_000) is at("loss", 20_000) is None


def test_the_curves_are_written_by_one_command(tmp_path, scenes_data, tiny):
    """`benchmarks/reference_curve.py` trains a run a seed and writes what they drew."""
    root = Path(__file__).parents[1]
    script = [sys.executable, str(root / "benchmarks" / "reference_curve.py"), "--out", str(tmp_path / "curves.json")]
    words = ["--train", tmp_path / "runs", "--data", scenes_data, "--seeds", "1", "--steps", "4", "--evaluations", "2", "--prompts", "2"]
    alike = ["--alike", "steps=8", "shift=5", "--because", "measured"]
    command = [*script, *map(str, words), *alike, "--settings", shlex.join(tiny)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote" in done.stdout, done.stderr
    found = json.loads((tmp_path / "curves.json").read_text())
    (run,) = found["runs"]
    assert run["seed"] == 1 and [images for images, _ in run["validation"]] == [images for images, _ in run["score"]] == [16, 32] and len(run["loss"]) == 4
    assert [(way["steps"], way["shift"]) for way in found["samples"]] == [(2, 3.0), (8, 5.0)] and found["samples_alike"] == "measured"
    assert found.keys() - {"samples_alike"} == on_track.load("quickstart").keys() - {"samples_alike"}


def test_a_run_that_stays_behind_and_one_that_leads(quickstart):
    reference, _ = on_track.comparable(*quickstart)
    images = max(int(run["validation"][-1][0]) for run in reference["runs"])
    ours, usual = on_track.expected(reference, "validation", images), on_track.expected(reference, "score", images).mean
    of = lambda loss, score: on_track.standing({"images_seen": images, "validation": {"loss": loss}, "score": score}, *quickstart).verdict
    assert of(ours.mean, 0.05) == "behind" and of(ours.mean * 1.5, usual) == "behind"
    assert of(ours.mean, 1.0) == "ahead" and of(ours.mean * 0.6, usual) == "ahead"


def test_nothing_is_said_where_nothing_compares(quickstart, scenes_data):
    config, description = quickstart
    line = {"images_seen": 113_000, "validation": {"loss": 0.05}, "score": 0.4}
    assert on_track.standing(line, resolve("stability"), description) is None
    assert on_track.standing(line, resolve("quickstart", ["--model.width", "128"]), description) is None
    assert on_track.standing(line, config, description.model_copy(update={"source": "emoji"})) is None
    assert on_track.standing(line | {"images_seen": 10**9}, config, description) is None
    other_sampler = resolve("quickstart", ["--sample.guidance", "1"])  # a score of other pictures; the loss means the same
    assert on_track.comparable(other_sampler, description)[1] == {"validation"}
    assert "score" not in on_track.standing(line, other_sampler, description).line
    assert on_track.comparable(resolve("quickstart", ["--sample.images", "4"]), description)[1] == {"score", "validation"}
    without_edges = resolve("quickstart", ["--flow.edges", "0"])  # as the runs behind the curves: what was trained is comparable too
    assert on_track.comparable(without_edges, description)[1] == {"score", "loss", "validation"}
    other_flow = resolve("quickstart", ["--flow.floor", "0.1"])
    assert on_track.comparable(other_flow, description)[1] == {"score"}
    assert "validation" not in on_track.standing(line, other_flow, description).line


def test_a_run_that_diverged_is_behind(quickstart):
    line = {"images_seen": 113_216, "validation": {"loss": float("nan")}, "score": float("nan")}
    assert on_track.standing(line, *quickstart).verdict == "behind"


def test_curves_survive_a_log_that_a_kill_cut_short(tmp_path):
    lines = [json.dumps({"step": k, "images_seen": 32 * k, "loss": 1 / k}) for k in range(1, 201)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 201, "imag')
    curve = on_track.curve_of(tmp_path)
    assert len(curve["loss"]) == 60 and curve["validation"] == curve["score"] == []
    assert curve["loss"] == sorted(curve["loss"]) and curve["loss"][0][1] > curve["loss"][-1][1]


def test_training_says_how_it_stands(scenes_data, tiny, tmp_path, capsys, monkeypatch):
    reference, config = on_track.load("quickstart"), resolve("quickstart", [*tiny, "--train.steps", "2", "--train.dry_run", "false"])
    network = {"width": config.model.width, "depth": config.model.depth}
    monkeypatch.setattr(
        on_track, "load", lambda preset: reference | {"network": network, "runs": [{"seed": 0, "validation": [[8, 9.0], [64, 9.0]], "score": []}]}
    )
    train(config, scenes_data, tmp_path / "run", progress=True)
    assert re.search(r"(ahead|behind|on track) at 16 images: validation loss [\d.]+, ours 9.0000 \(quickstart on scenes\)", capsys.readouterr().err)
