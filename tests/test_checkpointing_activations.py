"""`train.checkpoint_activations`: the same gradients with less kept for the backward pass, eager and compiled, alone and on ranks."""

import copy

import pytest
import torch

from flowt2i.bench.footprint import kept_bytes
from flowt2i.bench.step import BareStep, describe
from flowt2i.config import resolve
from flowt2i.training.compiling import compile_blocks, has_compiler
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
    compile_blocks(compiled.model)
    _, plain = gradients(compiled, False)
    _, again = gradients(compiled, True)
    for name in eager:
        assert torch.allclose(plain[name], again[name], rtol=1e-4, atol=1e-6), name
        assert torch.allclose(eager[name], again[name], rtol=1e-3, atol=1e-5), name


def test_a_training_takes_the_same_course(scenes_data, tiny, tmp_path):
    """With accumulation: losses of four steps."""
    words = [*tiny, "--train.steps", "4", "--train.micro_batch", "4", "--train.eval_every", "0", "--train.score_prompts", "0"]
    for name, flag in (("with", "true"), ("without", "false")):
        train(resolve("quickstart", [*words, "--train.checkpoint_activations", flag]), scenes_data, tmp_path / name, progress=False)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
