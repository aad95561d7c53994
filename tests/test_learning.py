"""The benchmark of learning and the fit of sizes: real small trainings, and the arithmetic on made-up ones."""

import importlib
import json
import math
import shutil
import signal
from pathlib import Path

import pytest

from flowt2i.config import load_config, resolve
from flowt2i.errors import UserError
from flowt2i.training import checkpoint

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--model.width", "32", "--model.depth", "1", "--model.heads", "2", "--model.time_width", "16", "--model.text_width", "32", "--model.text_depth", "0",
         "--data.batch_size", "4", "--train.precision", "fp32", "--train.compile", "off", "--train.dry_run", "false", "--sample.steps", "1",
         "--sample.images", "1"]  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    """A script of benchmarks/ by its name; trainings run in this process, which spares each the start of another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runs = importlib.import_module("learning_runs")

    def in_process(config, data, run):
        from flowt2i.training.loop import train

        trained.append(run)
        train(load_config(config), data, run, "latest", progress=False)

    trained: list[Path] = []
    monkeypatch.setattr(runs, "run_train", in_process)

    def module(name):
        found = importlib.import_module(name)
        found.RUNS = trained
        return found

    return module


@pytest.fixture
def learning(benchmark, scenes_data, tmp_path):
    """Run learning.py on the small data: status."""
    script = benchmark("learning")

    def run(*words, data=scenes_data):
        fixed = [
            "--data",
            data,
            "--points",
            2,
            "--num",
            3,
            "--final-num",
            4,
            "--loss-images",
            16,
            "--out",
            tmp_path / "runs",
            "--results",
            tmp_path / "results",
        ]
        return script.main([str(word) for word in [*fixed, *words, *SMALL]])

    run.trained = script.RUNS
    return run


# ---- the baseline -----------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_seeds_recipe_to_the_letter(benchmark):
    baseline, quick = benchmark("recipes").find("seed").config([]), resolve("quickstart")
    model, optim = baseline.model.resolve("pixels", (3, 64, 64)), baseline.optim
    assert (model.width, model.depth, baseline.data.batch_size) == (quick.model.width, quick.model.depth, quick.data.batch_size), "equal size"
    assert (model.block, model.positions, model.prediction, model.bottleneck, model.mlp_ratio) == ("seed", "learned", "v", 0, 2.0)
    assert model.width // model.heads == 64 and model.text_window == 0
    assert (optim.name, optim.lr, optim.beta1, optim.beta2, optim.schedule) == ("adamw", 5e-4, 0.9, 0.999, "cosine")
    assert (optim.warmup, optim.warmup_from, optim.final) == (0.05, 0.1, 0.1)
    assert (baseline.flow.times, baseline.train.ema) == ("uniform", 0.0)
    assert (baseline.sample.solver, baseline.sample.steps, baseline.sample.shift, baseline.sample.schedule) == ("euler", 50, 1.0, "uniform")


def test_the_baselines_network_has_what_the_seed_had(benchmark):
    from flowt2i.model import FlowTransformer

    model = benchmark("recipes").find("seed").config([]).model.resolve("pixels", (3, 64, 64))
    names = dict(FlowTransformer(model, (3, 64, 64), 0, 100).named_parameters())
    image = [name for name in names if not name.startswith("caption_encoder")]
    assert not [name for name in image if "q_norm" in name or "k_norm" in name], "no QK-norm"
    assert {f"blocks.{i}.adaln.weight" for i in range(model.depth)} <= set(image) and "shared_adaln.weight" not in image, "AdaLN of each block's own"
    assert "positions" in image and "embed.weight" in image, "learned positions, one linear patch embedding"


def test_every_recipe_is_a_configuration_of_its_own(benchmark):
    recipes = benchmark("recipes")
    found = {name: recipe.config([]) for name, recipe in recipes.RECIPES.items()}
    for config in found.values():
        config.model.resolve("pixels", (3, 64, 64))
    assert len({config.model_dump_json() for config in found.values()}) == len(found)


# ---- trainings --------------------------------------------------------------------------------------------------------


def test_recipes_are_trained_scored_and_compared_and_never_twice(learning, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["--equal", "data", "--budget", "32", "--recipes", "seed,quickstart,quickstart@0.5", "--name", "few", "--json"]
    assert learning(*words) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = json.loads((tmp_path / "results" / "few.json").read_text())
    assert {"date", "machine", "versions", "budget", "data", "summary"} <= set(results) and results["versions"]["torch"]
    assert [run["label"] for run in results["runs"]] == ["seed", "quickstart", "quickstart@0.5"]
    assert [run["points"][-1]["images"] for run in results["runs"]] == [32, 32, 16], "equal data, and half of it"
    for run in results["runs"]:
        first, last = run["points"]
        assert first["flops"] < last["flops"] == last["images"] * run["flops_per_image"] and 0 < first["seconds"] < last["seconds"]
        assert last["scenes"]["all"]["n"] == 4 and first["scenes"]["all"]["n"] == 3 and set(last["scenes"]["all"]) == {"accuracy", "low", "high", "n"}
        assert {"one_object", "two_objects"} & set(last["scenes"]) and math.isfinite(last["loss"]["mean"]) and "t0.2-0.4" in last["loss"]
    assert "reaches_baseline" in out["summary"]["quickstart"] and "reaches_baseline" not in out["summary"]["seed"]
    written = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert written == ["few-parts.png", "few.json", "few.md", "few.png"] and "| `seed` | 0 |" in (tmp_path / "results" / "few.md").read_text()
    assert len(learning.trained) == 3
    # Once more, with one run cut back to its middle and a score lost: only these are made again.
    folder = tmp_path / "runs" / "quickstart-seed0"
    shutil.rmtree(checkpoint.folder(folder / "run", 8))
    lines = (folder / "points.jsonl").read_text().splitlines()
    (folder / "points.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    assert learning(*words) == 0
    assert [path.parent.name for path in learning.trained[3:]] == ["quickstart-seed0"]
    again = json.loads((tmp_path / "results" / "few.json").read_text())
    assert json.loads((folder / "starts.json").read_text()) == [0, 4]
    for before, after in zip(results["runs"], again["runs"]):
        for a, b in zip(before["points"], after["points"]):
            assert a["scenes"] == b["scenes"] and a["loss"] == b["loss"], "the resumed run is the same run"


def test_equal_flops_and_equal_time(learning, benchmark, scenes_data, tmp_path, monkeypatch, capsys):
    runs = benchmark("learning_runs")
    configs = {name: benchmark("recipes").find(name).config(SMALL) for name in ("seed", "quickstart")}
    plans = {}
    for name, config in configs.items():
        budget = runs.Budget("flops", 64 * 4 * runs.training_flops(config, scenes_data))
        plans[name] = runs.open_plan(tmp_path / "f" / name, name, 0, budget, 4, config, scenes_data)
        assert plans[name].steps == 64 and plans[name].every == 16 and plans[name].config["train"]["log_every"] == 8
    with pytest.raises(UserError, match="perceptual loss, whose network the formula does not count"):
        config = resolve("quickstart", [*SMALL, "--flow.perceptual", "0.1"])
        runs.open_plan(tmp_path / "p", "p", 0, runs.Budget("flops", 1e12), 4, config, scenes_data)
    monkeypatch.setattr(runs, "PROBE", 15)
    plan = runs.open_plan(tmp_path / "t", "quickstart", 0, runs.Budget("time", 30.0), 4, configs["quickstart"], scenes_data)
    assert plan.steps > 4 and plan.steps % 4 == 0 and not (tmp_path / "t" / "probe").exists()
    assert runs.open_plan(tmp_path / "t", "quickstart", 0, runs.Budget("time", 30.0), 4, configs["quickstart"], scenes_data) == plan, "measured once"
    with pytest.raises(UserError, match="another --out"):
        runs.open_plan(tmp_path / "t", "quickstart", 0, runs.Budget("time", 30.0), 4, configs["seed"], scenes_data)


@pytest.mark.parametrize("words, said", [
    (["--budget", "32", "--recipes", "seed,quikstart"], "did you mean 'quickstart'?"),
    (["--budget", "32", "--recipes", "seed@2"], "share of the budget"),
    (["--budget", "many"], "--budget"),
    (["--budget", "10m", "--equal", "flops"], "--budget"),
    (["--budget", "32", "--seeds", "a"], "--seeds"),
    (["--budget", "32", "--baseline", "quickstart-v"], "not among"),
    (["--budget", "32", "--model.wdth", "3"], "did you mean 'model.width'?"),
    ([], "--budget"),
])  # fmt: skip
def test_a_mistake_is_one_line_before_any_work(learning, words, said, tmp_path, capsys):
    assert learning(*words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and not learning.trained and not (tmp_path / "runs").exists()


def test_data_too_small_for_the_heldout_split_is_one_line(learning, scenes_data, tmp_path, capsys):
    small = tmp_path / "small"
    shutil.copytree(scenes_data, small)
    described = json.loads((small / "dataset.json").read_text()) | {"heldout_count": 3}
    (small / "dataset.json").write_text(json.dumps(described))
    assert learning("--budget", "32", data=small) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "holds out 3 of" in err and "--heldout" in err and not learning.trained


@pytest.mark.slow
def test_a_signal_stops_the_training_with_all_saved_and_the_same_command_goes_on(scenes_data, tmp_path):
    import os
    import subprocess
    import sys
    import time

    words = [sys.executable, str(BENCHMARKS / "learning.py"), "--data", str(scenes_data), "--equal", "data", "--budget", "4000", "--recipes", "quickstart",
             "--points", "2", "--num", "2", "--final-num", "2", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *SMALL]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "runs" / "quickstart-seed0" / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3 and "the same command goes on" in process.stderr.read()
    assert 0 < checkpoint.list_steps(log.parent)[-1] < 1000
    assert subprocess.run(words, env=env, capture_output=True).returncode == 0
    assert checkpoint.list_steps(log.parent)[-1] == 1000 and (tmp_path / "results" / "learning-scenes-data-4k.json").exists()


# ---- arithmetic -------------------------------------------------------------------------------------------------------


def a_run(label, seed, accuracies, cost=1.0):
    point = lambda k, share: {
        "images": 100 * k, "flops": 100 * k * cost, "seconds": 2.0 * k,
        "scenes": {"all": {"accuracy": share, "low": share - 0.1, "high": share + 0.1, "n": 100}}, "loss": {"mean": 1 - share},
    }  # fmt: skip
    return {"label": label, "seed": seed, "parameters": 10, "points": [point(k + 1, share) for k, share in enumerate(accuracies)]}


def test_where_a_course_comes_up_to_a_target(benchmark):
    reached = benchmark("learning_report").reached
    assert reached([1, 2, 3], [0.0, 0.2, 0.4], 0.3).at == pytest.approx(2.5)
    assert reached([1, 2, 3, 4], [0.0, 0.5, 0.1, 0.5], 0.3).at == pytest.approx(3.5), "a lucky point does not count"
    assert reached([1, 2], [0.0, 0.2], 0.3) is None
    assert reached([1, 2], [0.4, 0.5], 0.3) == (1, True)
    assert reached([1, 2], [0.9, 0.5], 0.6, higher=False).at == pytest.approx(1.75)


def test_the_share_of_the_compute_over_seeds(benchmark):
    report = benchmark("learning_report")
    runs = [a_run("seed", 0, [0.1, 0.2]), a_run("seed", 1, [0.1, 0.2]), a_run("quick", 0, [0.15, 0.25], cost=0.5), a_run("quick", 1, [0.17, 0.27], cost=0.5)]
    found = report.summary(runs, "seed")
    share = found["quick"]["reaches_baseline"]["scenes/all"]
    assert share["target"] == pytest.approx(0.2)
    assert share["images"]["share"] == pytest.approx(0.7) and share["flops"]["share"] == pytest.approx(0.35) and share["seconds"]["share"] == pytest.approx(0.7)
    assert share["flops"]["seeds"] == pytest.approx([0.375, 0.325])
    assert found["quick"]["scenes/all"]["n"] == 200 and found["quick"]["scenes/all"]["accuracy"] == pytest.approx(0.26)
    said = report.verdicts(found, "seed")
    assert said[0] == (
        "quick reaches seed's final score (all right, 20.0%) at 0.35 (0.33 to 0.38) of its FLOPs, 0.70 (0.65 to 0.75) of its images, "
        "0.70 (0.65 to 0.75) of its seconds"
    )
    assert report.table(found, "seed").count("\n") == 3
    assert "does not reach" in report.verdicts(report.summary([runs[2], a_run("seed", 0, [0.1, 0.6])], "seed"), "seed")[0]


def test_seconds_leave_out_what_a_start_takes(benchmark):
    line = lambda step, each: {"step": step, "images_seen": 4 * step, "images_per_s": 4 / each}
    lines = [line(10, 9.0), line(20, 1.0), line(30, 1.0), line(40, 7.0), line(50, 1.0)]
    spent = benchmark("learning_runs").seconds_at(lines, [0, 33])
    assert [spent(step) for step in (10, 20, 35, 40, 50)] == [10, 20, 35, 40, 50]


def test_budgets(benchmark):
    budget = benchmark("learning_runs").Budget
    assert budget.parse("data", "120k").amount == 120_000 and str(budget.parse("data", "120k")) == "120k"
    assert budget.parse("flops", "2.5P").amount == 2.5e15 == budget.parse("flops", "2.5e15").amount and budget.parse("time", "1h30m").amount == 5400
    for equal, text in (("data", "0"), ("data", ""), ("flops", "-1P"), ("time", "5"), ("data", "1e999")):
        with pytest.raises(UserError, match="--budget"):
            budget.parse(equal, text)


# ---- the fit of sizes -------------------------------------------------------------------------------------------------


def test_the_fits_find_what_the_points_were_made_from(benchmark):
    laws = benchmark("size_laws")
    parabola = lambda n: 0.5 + 0.1 * (math.log(n) - math.log(3e6)) ** 2
    sizes = [1e6, 2e6, 5e6, 1e7]
    vertex = laws.lowest(sizes, [parabola(n) for n in sizes])
    assert vertex.inside and vertex.at == pytest.approx(3e6) and vertex.value == pytest.approx(0.5)
    edge = laws.lowest(sizes, [4.0, 3.0, 2.0, 1.0])
    assert not edge.inside and (edge.at, edge.value) == (1e7, 1.0), "no lowest point between the sizes is said, not made up"
    budgets = [1e14, 2e14, 4e14, 8e14, 1.6e15]
    law = laws.power_law(budgets, [0.1 + 500 * c**-0.2 for c in budgets], with_floor=True)
    assert law.exponent == pytest.approx(-0.2, abs=0.01) and law.floor == pytest.approx(0.1, abs=0.02)
    assert laws.power_law([1, 4], [2, 1]).exponent == pytest.approx(-0.5)
    # Depth makes a network larger: the best depth at equal size is not the best at equal width.
    grid = [(n * f, f) for n in (1e6, 2e6, 4e6) for f in (0.5, 1.0, 2.0)]
    surface = lambda n, f: math.exp(0.1 * math.log(n / 1e6) ** 2 + 0.2 * math.log(f / 0.8) ** 2)
    (found,) = laws.lowest_across([n for n, _ in grid], [f for _, f in grid], [surface(n, f) for n, f in grid], [2e6])
    assert found.inside and found.at == pytest.approx(0.8) and found.value == pytest.approx(surface(2e6, 0.8))
    with pytest.raises(ValueError):
        laws.lowest([1, 2], [1, 2])
    with pytest.raises(ValueError):
        laws.lowest_across([1, 2], [1, 2], [1, 2], [1])


def test_sizes_are_fitted_and_the_constants_written(benchmark, scenes_data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    fit, runs = benchmark("size_fit"), benchmark("learning_runs")
    made = []

    preset = benchmark("recipes").find("quickstart").config([])

    def pretended(folder, label, seed, budget, config, args):  # what a training would have found: best at width 128; a better law of the rates
        made.append((label, config.model.width, config.optim.lr))
        rule = fit.sizes.settings(config.model.width, preset)["optim.lr"]
        flops = budget.amount if budget.equal == "flops" else 1e12
        best = 0.8 * rule * (config.model.width / 192) ** 0.3
        loss = flops**-0.1 * 100 + math.log(config.model.width / 128) ** 2 + 0.1 * math.log(config.optim.lr / best) ** 2
        loss += 0.1 * math.log(config.data.batch_size / 36) ** 2
        return {"parameters": config.model.width**2, "loss": loss, "flops": budget.amount, "images": 1.0, "seconds": 1.0}

    real = fit.trained
    monkeypatch.setattr(fit, "trained", pretended)
    constants, before = tmp_path / "sizes.json", fit.sizes.constants()
    monkeypatch.setattr(fit.sizes, "CONSTANTS", constants)
    words = ["--data", scenes_data, "--sizes", "64,96,128,192", "--budgets", "1T,2T", "--results", tmp_path, "--out", tmp_path / "runs"]
    sweeps = ["--sweep", "lr=0.25,0.5,2@20k", "--sweep", "batch_size=0.5,2@20k", "--write", "lr,batch_size"]
    assert fit.main([str(w) for w in [*words, *sweeps, "--name", "fit", "--json"]]) == 0
    found = json.loads((tmp_path / "fit.json").read_text())
    assert len(made) == 4 * 2 + 4 * (4 + 2) and len(found["points"]) == len(made)
    assert all(one["inside"] and one["parameters"] == pytest.approx(128**2, rel=0.1) for one in found["fit"]["best"])
    assert found["fit"]["size_law"]["exponent"] == pytest.approx(0, abs=0.01) and found["fit"]["loss_law"]["exponent"] < 0
    written = json.loads(constants.read_text())
    lr, law = before["laws"]["lr"], found["swept"]["lr"]["laws"]["lr"]
    assert (law["at"], law["exponent"]) == (pytest.approx(0.8 * preset.optim.lr, rel=0.02), pytest.approx(lr["exponent"] + 0.3, abs=0.01))
    assert written["laws"]["lr"]["exponent"] == law["exponent"] and "at" not in written["laws"]["lr"], "a sweep sets no level, which hangs on its length"
    assert "size_fit.py" in written["laws"]["lr"]["from"]
    assert written["laws"]["batch_size"]["least"] == 32 and "size_fit.py" in written["laws"]["batch_size"]["from"]
    assert written["laws"]["batch_size"]["from"].endswith(before["laws"]["batch_size"]["from"].partition("; ")[2])
    assert written["laws"]["depth"] == before["laws"]["depth"] and written["widths"] == before["widths"]
    assert (tmp_path / "fit.png").exists()
    # A best factor at the edge says nothing of where the best one is: all is kept but the constants.
    constants.unlink()
    assert fit.main([str(w) for w in [*words, "--sweep", "lr=1,2,4@20k", "--write", "lr", "--name", "edge"]]) == 2
    assert "sweep more factors" in capsys.readouterr().err and (tmp_path / "edge.json").exists() and not constants.exists()
    # One of its trainings for real.
    config = benchmark("recipes").find("quickstart").config(SMALL)
    args = fit.arguments().parse_args([str(w) for w in [*words, "--loss-images", 16]])
    budget = runs.Budget("flops", 8 * 4 * runs.training_flops(config, scenes_data))
    point = real(tmp_path / "runs" / "one", "one", 0, budget, config, args)
    assert point["images"] == 32 and point["flops"] == pytest.approx(budget.amount) and math.isfinite(point["loss"])
    capsys.readouterr()
    sweeps = (["--sweep", sweep] for sweep in ("rate=1,2,3@20k", "lr=2@20k", "lr=0.5,2", "depth=0.5,2@x", "depth=0.5,inf@1T", "lr=0.5,nan@20k"))
    for wrong in (["--sizes", "64,96,128"], ["--budgets", "x"], ["--recipe", "quik"], ["--write", "lr"], ["--sweep", "lr=0.5,2@20k"] * 2, *sweeps):
        assert fit.main([str(w) for w in [*words, *wrong]]) == 2
        assert capsys.readouterr().err.count("\n") == 1
