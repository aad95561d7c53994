"""bf16 where there are units for it, fp32 elsewhere: in training, in the optimizer and in drawing."""

import json

import pytest
import torch

from flowt2i import Pipeline, precision
from flowt2i.training.muon import Muon

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["units", "none"])
def units(request, monkeypatch) -> bool:
    """A processor with, or without, units for bf16."""
    for module in ("flowt2i.precision", "flowt2i.training.muon", "flowt2i.doctor"):
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


def test_training_and_drawing_compute_in_it(units, trained, scenes_data):
    run = trained(scenes_data, "--train.precision", "auto", "--train.steps", "1")
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["precision"] == "auto" and config["resolved"]["precision"] == ("bf16" if units else "fp32")
    pipeline, seen = Pipeline.from_pretrained(run, device="cpu"), set()
    pipeline.model.blocks[0].mlp.up.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    pipeline(["a red circle"], steps=1)
    assert seen == {torch.bfloat16 if units else torch.float32}


def test_muon_makes_matrices_orthogonal_in_it(units):
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
        Muon([weight], lr=0.1, weight_decay=0.0).step()
    assert set(seen) == {torch.bfloat16 if units else torch.float32}
    values = torch.linalg.svdvals((start - weight.detach()) / 0.1)
    assert values.max() < 1.35 * values.min() + 1.0


def test_doctor_says_it(units):
    from flowt2i.doctor import bf16

    assert bf16(CPU).mark == ("good" if units else "note") and ("fp32" in bf16(CPU).found) != units
