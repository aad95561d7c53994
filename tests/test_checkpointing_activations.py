"""`train.checkpoint_activations`: the same gradients with less kept for the backward pass, eager and compiled, alone and on ranks."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch

from flowt2i.bench.footprint import footprint, kept_bytes
from flowt2i.bench.step import BareStep, describe
from flowt2i.config import resolve
from flowt2i.training.compiling import compile_training, has_compiler
from flowt2i.training.loop import train
from flowt2i.verify_resume import losses

MODEL = ["--model.width", "64", "--model.depth", "4", "--model.heads", "2", "--model.text_width", "32", "--model.text_depth", "1"]


def bare(block: str, *words: str) -> BareStep:
    preset = "seed" if block == "seed" else "quickstart"
    config = resolve(preset, [*MODEL, "--train.precision", "fp32", "--train.ema", "0", *words])
    step = BareStep(config, describe(latents=block == "seed", longest=8), {8: 1}, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # nothing at zero, so that every gradient is one
        for parameter in step.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return step


def gradients(step: BareStep, again: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = step.model
    model.checkpoint_activations = again
    model.zero_grad()
    torch.manual_seed(3)
    loss = step.loss(step.inputs(6))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("block", ["modern", "seed"])
def test_loss_and_gradients_are_the_same(block):
    step = bare(block)
    (loss, without), (loss_again, with_it) = gradients(step, False), gradients(step, True)
    assert loss == loss_again and without.keys() == with_it.keys()
    assert all(torch.equal(without[name], with_it[name]) for name in without)


def test_the_flag_reaches_the_model_and_nothing_is_computed_again_while_drawing():
    step = bare("modern", "--train.checkpoint_activations", "true")
    assert step.model.checkpoint_activations
    calls = []
    step.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    step.loss(step.inputs(2)).backward()
    assert len(calls) == 2, "once forward, once again for the backward pass"
    with torch.no_grad():
        step.loss(step.inputs(2))
    assert len(calls) == 3


def test_less_is_kept_for_the_backward_pass():
    """What autograd keeps, counted: of four blocks only what passes between them stays, about a fifth here."""
    step = bare("modern")
    weights = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    kept = {}
    for again in (False, True):
        step.model.checkpoint_activations = again
        kept[again] = kept_bytes(step.objective, step.inputs(16), weights)
    assert kept[True] < 0.35 * kept[False], kept


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.slow
def test_compiled_gradients_are_the_same():
    step = bare("modern")
    _, eager = gradients(step, False)
    compiled = copy.copy(step)
    compile_training(compiled.objective)
    _, plain = gradients(compiled, False)
    _, again = gradients(compiled, True)
    other = copy.deepcopy(compiled.objective)
    assert "patches" not in other.model.__dict__ and "errors" not in other.__dict__, "they would compute with the weights of the original"
    for name in eager:
        assert torch.allclose(plain[name], again[name], rtol=1e-4, atol=1e-6), name
        assert torch.allclose(eager[name], again[name], rtol=1e-3, atol=1e-5), name


def test_a_training_takes_the_same_course(scenes_data, tiny, tmp_path):
    """With accumulation: losses of four steps."""
    words = [*tiny, "--train.steps", "4", "--train.micro_batch", "4", "--train.eval_every", "0", "--train.score_prompts", "0"]
    for name, flag in (("with", "true"), ("without", "false")):
        train(resolve("quickstart", [*words, "--train.checkpoint_activations", flag]), scenes_data, tmp_path / name, progress=False)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.slow
def test_the_table_of_costs(tmp_path, monkeypatch, capsys):
    """Computed at two depths, it is what a model of the asked depth takes; checkpointing lets more fit."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    cost_table = importlib.import_module("cost_table")
    assert cost_table.main(["--out", str(tmp_path / "cost.md"), "--models", '{"a": [64, 5]}', "--tokens", "16", "64"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["path"], row["tokens"], row["side"]) for row in rows] == [("pixels", 16, 32), ("pixels", 64, 64), ("latents", 16, 32), ("latents", 64, 64)]
    assert all(row["mib_again"] < row["mib"] and row["24_again"] > row["24"] > 0 and row["80"] > row["24"] for row in rows)
    assert rows[1]["gflop"] > rows[0]["gflop"] and rows[1]["attention"] > rows[0]["attention"]
    words = ["--model.width", "64", "--model.depth", "5", "--model.heads", "1", "--train.precision", "bf16"]
    with importlib.import_module("scale").fused_attention():
        step = BareStep(resolve("stability", words), describe(True, max(cost_table.EMOJI_T5)), cost_table.EMOJI_T5, torch.device("cpu"))
        whole = footprint(step)
    assert rows[3]["mib"] == pytest.approx(whole.slope / 2**20, rel=1e-6) and rows[3]["state_gib"] == pytest.approx(whole.state / 2**30, rel=1e-6)
    told = (tmp_path / "cost.md").read_text()
    assert told.startswith("# What sizes cost") and "Computed, not measured" in told and "| 5 × 64 " in told and told.count("\n|") == 12
