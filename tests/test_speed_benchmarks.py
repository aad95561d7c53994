"""The scripts behind docs/speed.md: points of the scaling, what fits on a card, tables made from results."""

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
POINT = {"width": 64, "depth": 1, "tokens": 16, "batch": 2}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def scale(script, monkeypatch):
    module = script("scale")
    monkeypatch.setattr(module, "MODELS", {"small": (64, 1), "larger": (64, 2)})
    monkeypatch.setattr(module.BareStep, "step_seconds", lambda self, images, accumulate, seconds: self.step(images, accumulate) or 1.0)
    monkeypatch.setattr(module, "apart", lambda: ThreadPoolExecutor(1))  # what is patched here is not patched in a fresh process
    monkeypatch.setattr(module, "matrix_ceilings", lambda name, *rest: {f"{name} 8x8x8": 2.0})
    return module


def test_a_point(scale):
    row = scale.measure(POINT)
    assert row["seconds"] == 1.0 and row["tflop"] > 0 and row["computed_gib"] > 0 and row["measured_gib"] >= 0 and row["parameters"] > 0
    assert scale.measure(POINT | {"batch": 4})["tflop"] == pytest.approx(2 * row["tflop"])


def test_a_point_that_does_not_fit(scale, monkeypatch):
    monkeypatch.setattr(scale.BareStep, "step_seconds", lambda *rest, **more: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    assert "seconds" not in scale.measure(POINT)


def test_what_fits(scale):
    rows = scale.fits([16, 64])
    by = {(row["model"], row["tokens"]): row for row in rows}
    assert by["small", 16]["mib_an_image"] < by["small", 64]["mib_an_image"] < by["larger", 64]["mib_an_image"]
    assert by["small", 16]["80 GB"] > by["small", 16]["8 GB"] > 0


def test_fused_attention_keeps_no_scores(scale):
    config, description = scale.prepare({"width": 64, "depth": 1, "tokens": 256, "batch": 1})
    slope = lambda: scale.footprint(scale.BareStep(config, description, scale.EMOJI_T5, torch.device("cpu"))).slope
    before, plain = scale.model_module.attend, slope()
    with scale.fused_attention():
        assert slope() < plain
    assert scale.model_module.attend is before


def test_the_whole_script_and_the_tables(scale, script, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scale, "in_its_own_process", scale.measure)
    axes = {"width": [64, 128], "batch": [2, 4]}
    words = ["--base", json.dumps(POINT), "--axes", json.dumps(axes), "--out", tmp_path / "scale-here.json", "--plot", tmp_path / "scale.png"]
    monkeypatch.setattr(scale, "peak", lambda device: 1 << 30)  # what two small steps take is too little to see
    monkeypatch.setattr(scale, "reset_peak", lambda device: 1 << 20)
    monkeypatch.setattr(sys, "argv", ["scale", *map(str, words)])
    scale.main()
    result = json.loads((tmp_path / "scale-here.json").read_text())
    assert [row["width"] for row in result["axes"]["width"]] == [64, 128] and (tmp_path / "scale.png").stat().st_size > 1000
    table = script("speed_table")
    page = table.fill((ROOT / "docs" / "speed.md").read_text(), tmp_path)
    assert "| width 128 |" in page and "80 GB (computed)" in page and "| larger | 1024 |" in page
    assert table.fill(page, tmp_path) == page, "made twice, the same"
    with pytest.raises(SystemExit, match="no place"):
        table.fill("nothing", tmp_path)


BENCH = {
    "preset": "quickstart", "device": "2 threads of a CPU", "machine": {"date": "2026-01-01", "torch": "2.13"}, "precision": "bf16", "compiled": True,
    "parameters": 4e6, "micro_batch": 32, "fastest_micro_batch": 16, "largest_micro_batch": 32, "largest_how": "computed", "train_images_per_s": 200.0,
    "model_tflops": 0.5, "share_of_ceiling": 0.25, "ceiling_tflops": 2.0, "loop": None, "peak_memory_gib": 1.0, "milliseconds": {"data": 1.0, "forward": 3.0},
    "sampling": {"steps": 8, "solver": "euler", "guidance": 3.0, "one_picture_s": 0.02, "images_per_s": 50.0, "batch": 64, "euler50_one_picture_s": 0.1,
                 "euler50_images_per_s": 8.0, "times_fewer_seconds": 6.25, "times_fewer_seconds_one": 5.0},
    "peer_runs": [{"name": name, "mode": "eager", "images_per_s": rate, "parameters": 1e8, "text_tokens": tokens, "batch": 32}
                  for name, rate, tokens in (("ours", 20.0, 25), ("prx", 8.0, 128))],
}  # fmt: skip


def test_tables_of_a_bench(script, tmp_path, monkeypatch, capsys):
    table = script("speed_table")
    (tmp_path / "bench-one.json").write_text(json.dumps(BENCH))
    page = tmp_path / "speed.md"
    page.write_text((ROOT / "docs" / "speed.md").read_text())
    run = lambda *words: monkeypatch.setattr(sys, "argv", ["t", "--results", str(tmp_path), "--page", str(page), *words]) or table.main()
    assert run("--check") == 1
    assert run() == 0 and run("--check") == 0
    text = page.read_text()
    for said in ("25% of 2", "25.0% | 75.0%", "5.00×, 6.25×", "| prx | 100M | 32 | 128 | 8.00 | 2.50× |"):
        assert said in text


def test_the_page_is_up_to_date(script):
    table = script("speed_table")
    page = (ROOT / "docs" / "speed.md").read_text()
    assert table.fill(page, ROOT / "benchmarks" / "results") == page, "run python benchmarks/speed_table.py"


def test_projection_grows_with_images_and_shrinks_with_the_machine(script, capsys):
    projection = script("projection")
    few, many = (projection.project(preset, 128, [0.2, 0.4]) for preset in ("stability", "full_scale"))
    assert many["images"] == 10 * few["images"] and many["flop_per_image"] > few["flop_per_image"]  # full_scale has the wider MLP
    slow, fast = few["seconds"]["1 × H100"]
    assert slow == 2 * fast and few["seconds"]["8 × H100"][0] == slow / 8
    assert slow == few["images"] * few["flop_per_image"] / (989.4e12 * 0.2)
    assert projection.main(["--shares", "0.4"]) == 0 and "| `full_scale` | 172.8M |" in capsys.readouterr().out
    assert projection.main(["--shares", "2"]) == 2


def test_projection_from_a_measured_machine(script, tmp_path, capsys):
    projection = script("projection")
    bench = {"preset": "stability", "device": "a card", "machine": {"date": "2026-01-01"}, "model_tflops": 1.0, "share_of_ceiling": 0.5}
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(bench))
    assert projection.main(["--measured", str(file), "--shares", "0.5"]) == 0
    said = capsys.readouterr().out
    found = projection.project("stability", 128, [0.5])
    assert f"| – | {projection.duration(found['images'] * found['flop_per_image'] / 1e12)} |" in said  # at what it did
    once = projection.duration(found["seconds"]["1 × H100"][0])
    assert "a card: 1 TFLOP/s measured on 2026-01-01" in said and f"| 1 × H100 | {once} | {once} |" in said  # at the share that it reached
    file.write_text(json.dumps(bench | {"preset": "quickstart"}))
    assert projection.main(["--measured", str(file)]) == 2 and "measured the preset quickstart" in capsys.readouterr().err
    file.write_text("[]")
    assert projection.main(["--measured", str(file)]) == 2 and "no result of" in capsys.readouterr().err


def test_preparation_beside_the_decoder(script, tmp_path, capsys):
    prepare = script("prepare")
    assert prepare.main(["--count", "60", "--side", "96", "--image-size", "32", "--rounds", "1", "--out", str(tmp_path / "new" / "prepare.json")]) == 0
    found = json.loads((tmp_path / "new" / "prepare.json").read_text())
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["decoder_images_per_s"] > 0 and found["of_decoder"] == pytest.approx(found["prepare_images_per_s"] / found["decoder_images_per_s"], abs=1e-3)
    assert prepare.main(["--count", "0"]) == 2
