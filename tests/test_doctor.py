"""`flowt2i doctor`: what it finds, what it advises, and its exit status."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from flowt2i import doctor
from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.description import DatasetDescription


def found(capsys) -> dict[str, dict]:
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {finding["what"]: finding for finding in result["findings"]}


def test_the_floors_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["demo"], *project["optional-dependencies"]["track"]]
    floors = dict(re.match(r"([a-z0-9-]+)>=([0-9.]+)", line).groups() for line in asked)
    ours = doctor.FLOORS | {name: floor for name, (floor, _) in doctor.OPTIONAL.items()}
    assert ours == {name: floors[name] for name in ours}
    assert floors["torch"] == "2.10" and floors["gradio"] == "6.20" and floors["pillow"] == "12.3"


@pytest.mark.parametrize(
    ("have", "floor", "is_older"),
    [("2.13.0+cpu", "2.10", False), ("2.9.1", "2.10", True), ("2.10.0", "2.10", False), ("12.3rc1", "12.3", False), ("20", "20.1", True)],
)
def test_versions_are_compared_by_number(have, floor, is_older):
    assert doctor.older(have, floor) is is_older


def test_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = found(capsys)
    assert {"python", "torch", "pillow", "bf16", "cores", "memory", "compiler", "disk", "network"} <= set(findings)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "✓ torch" in text and text.strip().endswith("nothing here would stop a run")


def test_old_versions_are_named_with_advice(monkeypatch, capsys):
    old = {"torch": "2.9.1", "pillow": "12.2.0", "gradio": "6.10.0", "wandb": None}
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: old.get(name, real(name)) if name in old else real(name))
    assert main(["doctor"]) == 2
    text = capsys.readouterr().out
    assert "✗ torch" in text and "→ pip install -U 'torch>=2.10'" in text and "✗ pillow" in text and "! gradio" in text and "! wandb" in text
    assert "2 thing(s) would stop a run" in text


def test_a_run_is_tried(scenes_data, tiny, tmp_path, capsys):
    out = tmp_path / "runs" / "mine"
    words = ["doctor", "--config", "quickstart", "--data", str(scenes_data), "--out", str(out), *tiny, "--train.steps", "30000", "--train.eval_every", "1000"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [f["mark"] for f in result["findings"] if f["what"] in ("training", "checkpoint", "sample", "time", "needs memory", "needs disk")] == ["good"] * 6
    expected = result["expected"]
    assert expected["steps"] == 30_000 and expected["seconds"] == pytest.approx(30_000 * expected["seconds_per_step"])
    assert (expected["checkpoints_at_once"], expected["checkpoints_for_good"]) == (4, 3)
    assert expected["evaluations"] == 30 and expected["seconds_per_evaluation"] > 0
    assert expected["disk_bytes"] == 7 * expected["checkpoint_bytes"] > 0
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_time_of_an_accumulated_step_counts_its_parts(scenes_data):
    config = resolve("stability", ["--train.steps", "1000"])
    data = DatasetDescription.load(scenes_data)
    assert doctor.expectation(config, data, 2.0, 1 << 30, 3.0)["seconds"] == 2000
    assert doctor.expectation(resolve("quickstart", ["--train.minutes", "2"]), data, 0.5, 1, 1)["steps"] == 240
    assert doctor.expectation(resolve("debug", []), data, 0.5, 1, 1)["seconds"] is None
    assert doctor.few_steps(config, 96).data.batch_size == 96


class TestFaults:
    def examine(self, words, capsys):
        assert main([*words, "--json"]) == 2
        return {what: f for what, f in found(capsys).items() if f["mark"] == "fault"}

    def test_no_data(self, tmp_path, capsys):
        faults = self.examine(["doctor", "--config", "quickstart", "--data", str(tmp_path / "nowhere")], capsys)
        assert "no dataset" in faults["data"]["found"]

    def test_text_encoder_that_is_gone(self, scenes_data, tmp_path, capsys):
        shutil.copytree(scenes_data, tmp_path / "data")
        description = json.loads((tmp_path / "data" / "dataset.json").read_text())
        description["text"] |= {"kind": "hf", "id": "/nowhere/t5-small", "dim": 512}
        for name in ("dataset.json", "units/description.json"):
            (tmp_path / "data" / name).write_text(json.dumps(description))
        faults = self.examine(["doctor", "--data", str(tmp_path / "data")], capsys)
        assert set(faults) == {"text encoder"} and "--text FOLDER" in faults["text encoder"]["advice"]

    def test_full_disk(self, scenes_data, tiny, tmp_path, monkeypatch, capsys):
        from flowt2i.training import dryrun

        monkeypatch.setattr(dryrun.Space, "now", lambda self, there: 1 << 60)
        words = ["doctor", "--config", "quickstart", "--data", str(scenes_data), "--out", str(tmp_path / "run"), *tiny, "--train.dry_run", "false"]
        faults = self.examine(words, capsys)
        assert set(faults) == {"needs disk"} and "--train.keep_recent" in faults["needs disk"]["advice"]

    def test_out_of_memory(self, scenes_data, tiny, tmp_path, monkeypatch, capsys):
        from flowt2i.training import loop

        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(loop, "train", full)
        faults = self.examine(["doctor", "--config", "quickstart", "--data", str(scenes_data), "--out", str(tmp_path / "run"), *tiny], capsys)
        assert faults["training"]["advice"].startswith("--train.micro_batch 4")

    def test_a_training_that_cannot_be(self, scenes_data, tiny, tmp_path, capsys):
        words = ["doctor", "--config", "quickstart", "--data", str(scenes_data), "--out", str(tmp_path / "run"), *tiny, "--model.heads", "3"]
        assert "model.heads" in self.examine(words, capsys)["training"]["found"]

    def test_settings_without_a_configuration(self, capsys):
        assert main(["doctor", "--train.steps", "3"]) == 2
        assert "--config" in capsys.readouterr().err
