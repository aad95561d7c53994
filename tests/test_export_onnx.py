"""`flowt2i export --format onnx`: graphs that onnxruntime was seen to agree on with torch, for any batch and caption length."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from export_models import drawn, enliven, same

from flowt2i import Pipeline
from flowt2i.cli import main
from flowt2i.config import ModelConfig
from flowt2i.guidance import by_rule
from flowt2i.model import FlowTransformer
from flowt2i.settings import RULES

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="the optional extra onnx is not installed"
)
PROMPTS = ["a red circle", "<end> three small blue stars left of a heart"]


@pytest.fixture(scope="module")
def run(trained, scenes_data):
    return enliven(trained(scenes_data, "--train.steps", "3", "--optim.lr", "1e-2", "--sample.shift", "1.5"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    to = tmp_path_factory.mktemp("onnx") / "tiny"
    from flowt2i.export.export import export

    result = export(run, to, format="onnx", samples=0, device="cpu")
    assert set(result["errors"]) == {"velocity", "text_encoder"} and max(result["errors"].values()) < 1e-4
    return to


def test_any_batch_and_caption_length(run, exported):
    import onnxruntime

    pipeline = Pipeline.from_pretrained(run, device="cpu")
    session = onnxruntime.InferenceSession(str(exported / "velocity.onnx"), providers=["CPUExecutionProvider"])
    assert next(iter(session.get_inputs())).shape[1:] == [3, 64, 64]
    for batch, tokens in ((1, 1), (1, 128), (5, 9)):
        z, text, mask = torch.randn(batch, 3, 64, 64), torch.randn(batch, tokens, 32), torch.ones(batch, tokens, dtype=torch.bool)
        mask[0, tokens // 2 + 1 :] = False
        t = torch.tensor(0.4)
        (found,) = session.run(None, {"z": z.numpy(), "t": t.expand(batch).numpy(), "text": text.numpy(), "mask": mask.numpy()})
        wanted = pipeline.field(z, t, text, mask).detach().numpy()
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_its_script_draws_our_pictures_without_torch(run, exported, tmp_path):
    np.save(tmp_path / "noise.npy", Pipeline.from_pretrained(run, device="cpu").initial_noise([3, 4]).numpy())
    lines = "import sys; sys.modules['torch'] = sys.modules['flowt2i'] = None; sys.path.insert(0, sys.argv[1]); import numpy as np, sample; "
    lines += "np.save('found.npy', sample.draw(eval(sys.argv[2]), np.load('noise.npy'), steps=4, guidance=2.0))"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", lines, str(exported), repr(PROMPTS)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = drawn(Pipeline.from_pretrained(run, device="cpu"), PROMPTS, steps=4, guidance=2.0)
    assert same(np.load(tmp_path / "found.npy"), wanted)
    done = subprocess.run([sys.executable, str(exported / "sample.py"), PROMPTS[0], "a.png"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "a.png").exists(), done.stderr


def test_the_seed_block_reading_a_frozen_encoder(tmp_path):
    from flowt2i.export.onnx_format import VelocityNet, _error, _export

    config = ModelConfig(block="seed", width=32, depth=2, heads=2, time_width=32, mlp_ratio=2.0, positions="learned").resolve("vae", (4, 8, 8))
    torch.manual_seed(0)
    net = VelocityNet(FlowTransformer(config, (4, 8, 8), text_dim=16)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # nothing stays at zero
    dims = {"batch": torch.export.Dim("batch", min=1, max=64), "tokens": torch.export.Dim("tokens", min=1, max=77)}

    def inputs(b, t):
        return {"z": torch.randn(b, 4, 8, 8), "t": torch.rand(b), "text": torch.randn(b, t, 16), "mask": torch.ones(b, t, dtype=torch.bool)}

    both = {0: dims["batch"], 1: dims["tokens"]}
    _export(net, inputs(2, 5), {"z": {0: dims["batch"]}, "t": {0: dims["batch"]}, "text": both, "mask": both}, tmp_path / "seed.onnx")
    assert max(_error(net, tmp_path / "seed.onnx", inputs(b, t)) for b, t in ((1, 1), (3, 77))) < 1e-4


def test_a_graph_that_differs_is_not_exported(run, tmp_path, monkeypatch, one_line):
    from flowt2i.export import onnx_format

    monkeypatch.setattr(onnx_format, "_export", lambda net, inputs, dynamic, path: path.write_bytes(b""))
    monkeypatch.setattr(onnx_format, "_error", lambda net, path, inputs: 0.01)
    assert main(["export", str(run), "--to", str(tmp_path / "to"), "--format", "onnx", "--samples", "0"]) == 2
    assert "velocity.onnx differs from torch" in one_line() and not list(tmp_path.iterdir())


def test_a_missing_extra_is_one_line(run, tmp_path, monkeypatch, one_line):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(run), "--to", str(tmp_path / "to"), "--format", "onnx"]) == 2
    assert "needs onnxruntime: pip install" in one_line() and not list(tmp_path.iterdir())


def test_the_card_tells_of_the_tokens_that_the_graph_takes(run, tmp_path, monkeypatch):
    """Fewer than the model's own where image and caption tokens together would reach the size at which attention takes another path."""
    from flowt2i.export import onnx_format
    from flowt2i.export.export import export

    monkeypatch.setattr(onnx_format, "_export", lambda net, inputs, dynamic, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx_format, "_error", lambda net, path, inputs: 3e-7)
    for switch, longest in ((onnx_format.SWITCH, 128), (64 + 40, 40)):  # 64 image tokens
        monkeypatch.setattr(onnx_format, "SWITCH", switch)
        export(run, tmp_path / "to", format="onnx", samples=0, force=True, device="cpu")
        card = (tmp_path / "to" / "README.md").read_text()
        assert f"T up to {longest}." in card and f"up to {longest} tokens" in card and "config.json" not in card
        assert json.loads((tmp_path / "to" / "sampling.json").read_text())["max_tokens"] == longest


def test_the_command_prints_the_error(exported, run, tmp_path, capsys, monkeypatch):
    from flowt2i.export import onnx_format

    monkeypatch.setattr(onnx_format, "_export", lambda net, inputs, dynamic, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx_format, "_error", lambda net, path, inputs: 3e-7)
    assert main(["export", str(run), "--to", str(tmp_path / "to"), "--format", "onnx", "--samples", "0"]) == 0
    assert "velocity.onnx: differs from torch by at most 3.0e-07" in capsys.readouterr().out
    assert json.loads((tmp_path / "to" / "export.json").read_text())["format"] == "onnx"


def test_sample_py_guides_by_every_rule_as_flowt2i_does():
    from flowt2i.export.onnx_sample import combined

    good, bad = torch.randn(2, 2, 3, 8, 8)
    for rule in RULES:
        found = combined(rule, good.numpy(), bad.numpy(), 3.0)
        assert np.allclose(found, by_rule(rule, good, bad, 3.0).numpy(), atol=1e-4), rule
