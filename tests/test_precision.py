"""bf16 where there are units for it, fp32 elsewhere: in training, in the optimizer and in drawing."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flowt2i import Pipeline, precision
from flowt2i.config import load_config, resolve
from flowt2i.training import checkpoint
from flowt2i.training.loop import Trainer, train
from flowt2i.training.muon import Muon

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["units", "none"])
def units(request, monkeypatch) -> bool:
    """A processor with, or without, units for bf16."""
    for module in ("flowt2i.precision", "flowt2i.doctor", "flowt2i.bench.ceiling"):
        monkeypatch.setattr(f"{module}.has_bf16", lambda device: request.param)
    return request.param


def test_this_processor_is_tried():
    seconds = {name: min(precision._seconds(dtype) for _ in range(3)) for name, dtype in precision.DTYPES.items()}
    ratio = seconds["bf16"] / seconds["fp32"]
    if 1 / 3 < ratio < 3:
        pytest.skip(f"bf16 takes {ratio:.1f} times as long as fp32 here: either may win")
    assert precision.has_bf16("cpu") == (ratio < 1)


def test_what_is_asked_for_is_what_trains_and_auto_looks_at_the_units(units):
    assert [precision.resolved(asked, CPU) for asked in ("fp32", "bf16", "auto")] == ["fp32", "bf16", "bf16" if units else "fp32"]


def test_a_model_trained_in_bf16_elsewhere_draws_in_fp32_where_bf16_is_slow(units):
    assert [precision.to_draw(trained, CPU) for trained in ("fp32", "bf16", "auto")] == ["fp32", *["bf16" if units else "fp32"] * 2]


def test_training_and_drawing_compute_in_it(units, tiny, scenes_data, tmp_path):
    config = resolve("quickstart", [*tiny, "--train.precision", "auto", "--train.steps", "1", "--train.dry_run", "false"])
    trainer = Trainer(config, scenes_data, tmp_path, progress=False)
    seen = []
    hook = trainer.model.blocks[0].mlp.up.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    trainer.close()
    hook.remove()
    expected = torch.bfloat16 if units else torch.float32
    assert set(seen) == {expected} and trainer.optimizer.parts[1].dtype == expected, "the network, training and shown, and Muon"
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["train"]["precision"] == "auto" and written["resolved"]["precision"] == ("bf16" if units else "fp32")
    pipeline = Pipeline.from_pretrained(tmp_path, device="cpu")
    pipeline.model.blocks[0].mlp.up.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    seen.clear()
    pipeline(["a red circle"], steps=1)
    assert set(seen) == {expected}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_makes_matrices_orthogonal_in_its_type(dtype):
    torch.manual_seed(0)
    start, gradient, seen = torch.randn(8, 16), torch.randn(8, 16), []
    weight = torch.nn.Parameter(start.clone())
    weight.grad = gradient

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            if function._schema.name == "aten::baddbmm":
                seen.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Watch():
        Muon([weight], dtype=dtype, lr=0.1, weight_decay=0.0).step()
    assert set(seen) == {dtype}
    values = torch.linalg.svdvals((start - weight.detach()) / 0.1) / (0.2 * 16**0.5)
    assert values.min() > 0.6 and values.max() < 1.3


def test_bf16_of_a_configuration_from_before_was_the_default_and_not_asked_for(tmp_path):
    values = resolve("quickstart", ["--train.precision", "bf16"]).model_dump()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert load_config(path).train.precision == "bf16", "today it was asked for"
    del values["match"]
    path.write_text(json.dumps(values | {"optim": values["optim"] | {"muon_piece": 32}}))
    assert load_config(path).train.precision == "bf16", "a setting that there was for a while, and auto with it"
    path.write_text(json.dumps(values))
    assert load_config(path).train.precision == "auto"
    path.write_text(json.dumps({"optim": {"lr": 1e-3}, "train": {"precision": "bf16"}}))
    assert load_config(path).train.precision == "bf16", "written by hand: asked for"
    path.write_text(json.dumps({"optim": {"lr": 1e-3}}))
    assert load_config(path).optim.lr == 1e-3, "a part of a configuration is one"
    values["train"]["precision"] = "fp32"
    path.write_text(json.dumps(values))
    assert load_config(path).train.precision == "fp32"


def test_a_card_tells_what_the_run_computed_in(trained, scenes_data, tmp_path):
    from flowt2i.export.export import export

    run = trained(scenes_data, "--train.precision", "auto", "--train.steps", "1")
    export(run, tmp_path / "own", samples=0, device="cpu")
    export(tmp_path / "own", tmp_path / "again", samples=0, device="cpu")
    for folder in ("own", "again"):
        assert f"| compute | {precision.resolved('auto', CPU)} |" in (tmp_path / folder / "README.md").read_text()


def test_doctor_says_it(units):
    from flowt2i.doctor import bf16

    assert bf16(CPU).mark == ("good" if units else "note") and ("fp32" in bf16(CPU).found) != units
    assert not bf16(CPU, "fp32").advice and ("--train.precision auto" in bf16(CPU, "bf16").advice) != units


def test_the_bench_measures_no_emulated_products(units, monkeypatch):
    from flowt2i.bench import ceiling

    monkeypatch.setattr(ceiling, "matrix_rate", lambda *rest: 1.0)
    model = resolve("quickstart").model.resolve("pixels", (3, 64, 64))
    measured = lambda name: {key.split()[0] for key in ceiling.matrix_ceilings(name, model, 64, CPU)}
    assert measured("bf16") == {"bf16", "fp32"} and measured("fp32") == ({"fp32", "bf16"} if units else {"fp32"})


def test_make_asks_what_this_machine_computes_in():
    told = subprocess.run([sys.executable, "-m", "flowt2i.precision"], capture_output=True, text=True, check=True).stdout
    assert told.strip() in precision.DTYPES


def test_going_on_in_another_precision_is_told(tiny, scenes_data, tmp_path):
    begun = resolve("quickstart", [*tiny, "--train.precision", "fp32", "--train.steps", "2"])
    train(begun, scenes_data, tmp_path, progress=False)
    assert not _told_of_precision(begun, "fp32", scenes_data, tmp_path)
    told = _told_of_precision(begun, "bf16", scenes_data, tmp_path)
    assert "so far it was trained in fp32, here it goes on in bf16 (--train.precision fp32 keeps it)" in told


def test_a_checkpoint_from_before_auto_says_what_it_was_trained_in_by_its_configuration(units, tiny, scenes_data, tmp_path, monkeypatch):
    begun = resolve("quickstart", [*tiny, "--train.precision", "bf16", "--train.steps", "2"])
    train(begun, scenes_data, tmp_path, progress=False)
    monkeypatch.setattr(checkpoint, "read_state", lambda path: {n: v for n, v in json.loads((path / "state.json").read_text()).items() if n != "precision"})
    assert not _told_of_precision(begun, "bf16", scenes_data, tmp_path)
    told = _told_of_precision(begun, "fp32", scenes_data, tmp_path)
    assert "in bf16, here it goes on in fp32" in told and ("--train.precision bf16 keeps it" in told) == units, "no advice that would be slow"


def _told_of_precision(begun, asked: str, data: Path, run: Path) -> str:
    further = begun.model_copy(deep=True)
    further.train.steps, further.train.precision = 4, asked
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(further, data, run, resume="latest", progress=False).close()
    return "".join(str(w.message) for w in caught if "so far it was trained" in str(w.message))


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize(("width", "narrow", "today"), [(128, True, True), (192, False, False), (1280, False, True)])
def test_make_goes_on_with_the_network_that_it_began_with(width, narrow, today, tmp_path):
    """Whatever this machine would begin with today."""
    settings = {"model": {"width": width, "depth": 6}, "flow": {}}
    settings["model"] |= {"pixel_masks": 4, "negatives": True} if today else {}
    settings["flow"] |= {"edges": 4.0} if today else {}
    (tmp_path / "config.json").write_text(json.dumps(settings, indent=2))
    (tmp_path / "asking.mk").write_text("include Makefile\nasked: ; @echo told: $(SETTINGS)\n")
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "SETTINGS", "OUT")}
    words = ["make", "-s", "-f", str(tmp_path / "asking.mk"), "asked", f"OUT={tmp_path}"]
    told = subprocess.run(words, cwd=Path(__file__).parents[1], env=clean, capture_output=True, text=True, check=True).stdout
    assert ("--model.width 128" in told) == narrow and "told:" in told
    assert ("--flow.edges 0" in told) == ("--model.pixel_masks 0" in told) == ("--model.negatives false --sample.guidance_rule cfg" in told) == (not today), (
        "what the recipe has taken on since, a run from before goes on without"
    )


def test_float64_where_the_device_has_none():
    """Apple's GPUs: the result is on the CPU."""
    on_mps = SimpleNamespace(device=SimpleNamespace(type="mps"), cpu=lambda: torch.ones(2))
    assert precision.double(on_mps).dtype == precision.double(torch.ones(2)).dtype == torch.float64
