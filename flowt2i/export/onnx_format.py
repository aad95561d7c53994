"""The velocity net, and the built-in caption encoder where the model has one, as ONNX graphs that onnxruntime was seen to agree on with torch.

DIR/velocity.onnx        z [B, C, H, W], t [B], text [B, T, D], mask [B, T] -> dz/dt [B, C, H, W]; B and T are free, H and W the model's own
    text_encoder.onnx    ids [B, T], mask [B, T] -> [B, T, D]; built-in text encoder only
    sampling.json  tokenizer/    latent statistics, defaults, tokenizer
    sample.py            draws with onnxruntime, numpy and tokenizers alone; pixels and built-in text encoder only
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowt2i import flow
from flowt2i.errors import UserError
from flowt2i.export import onnx_sample
from flowt2i.export.carry import self_contained
from flowt2i.export.facts import euler_steps
from flowt2i.model import FlowTransformer
from flowt2i.pipeline import Pipeline

TOLERANCE = 1e-4  # of the largest value; fp32 sums in another order stay far below it
STAGES = 4  # `progress` calls of `write`, at most
SWITCH = 512  # keys from which on `model.attend` takes another path on a CPU: a graph has to stay on one side of it


class VelocityNet(nn.Module):
    """What a solver asks for: the velocity, whatever the network predicts."""

    def __init__(self, model: FlowTransformer):
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """z [B, C, H, W], t [B] in [0, 1), text [B, T, D], mask [B, T] -> dz/dt [B, C, H, W]."""
        return flow.to_velocity(self.model(z, t, text, mask), z, t, self.model.config.target)


def require_onnx() -> None:
    """UserError where a package is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(f"--format onnx needs {name}: pip install -c constraints.txt -e '.[onnx]'") from error


def write(pipeline: Pipeline, folder: Path, progress: Callable[[str], Any]) -> tuple[dict[str, float], int]:
    """Write the graphs of a pipeline and compare each with torch. Returns the largest error of each, relative to the largest value, and T's maximum.

    UserError where one is above TOLERANCE. progress(what) is called before each stage.
    """
    require_onnx()
    model, text = pipeline.model.cpu().float(), pipeline.description.text
    shape = own_shape(pipeline)
    patches = shape[1] * shape[2] // model.patch**2
    longest = min(text.max_tokens, SWITCH - patches) if patches < SWITCH else text.max_tokens
    length = max(2, min(7, longest - 1))
    generator = torch.Generator().manual_seed(0)
    batch, width = torch.export.Dim("batch", min=1, max=1 << 16), torch.export.Dim("tokens", min=1, max=longest)
    errors = {}

    def velocity_inputs(b: int, t: int) -> dict[str, Tensor]:
        features = text.dim if text.kind == "hf" else pipeline.config.model.text_width
        times = torch.linspace(0, 0.9, b) if b > 1 else torch.tensor([0.5])
        return {
            "z": torch.randn(b, *shape, generator=generator), "t": times,
            "text": torch.randn(b, t, features, generator=generator), "mask": _mask(b, t),
        }  # fmt: skip

    def caption_inputs(b: int, t: int) -> dict[str, Tensor]:
        return {"ids": torch.randint(text.vocab_size, (b, t), generator=generator), "mask": _mask(b, t)}

    graphs: list[tuple[str, nn.Module, Callable[[int, int], dict[str, Tensor]], dict[str, Any]]] = [
        ("velocity", VelocityNet(model), velocity_inputs, {"z": {0: batch}, "t": {0: batch}, "text": {0: batch, 1: width}, "mask": {0: batch, 1: width}})
    ]
    if model.caption_encoder is not None:
        graphs.append(("text_encoder", model.caption_encoder, caption_inputs, {"ids": {0: batch, 1: width}, "mask": {0: batch, 1: width}}))
    for name, net, inputs, dynamic in graphs:
        progress(f"{name}.onnx")
        _export(net.eval(), inputs(2, length), dynamic, folder / f"{name}.onnx")
        progress(f"comparing {name}.onnx")
        errors[name] = max(_error(net, folder / f"{name}.onnx", inputs(b, t)) for b, t in ((1, longest), (3, length + 1), (2, 1)))
        if not errors[name] <= TOLERANCE:
            raise UserError(f"{name}.onnx differs from torch by {errors[name]:.1e} of the largest value, more than {TOLERANCE:g}: nothing was exported")
    _write_sampling(pipeline, folder, longest)
    return errors, longest


def own_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    """(C, H, W) of the latents of the pictures that the model draws of its own."""
    return pipeline.description.codec.latent_shape(pipeline.description.home)


def _mask(batch: int, tokens: int) -> Tensor:
    """Each row one token shorter than the one before, none empty."""
    return torch.arange(tokens) < torch.tensor([max(1, tokens - i) for i in range(batch)])[:, None]


def _export(net: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, Any], path: Path) -> None:
    with _silent():
        program = torch.onnx.export(net, (), kwargs=inputs, dynamic_shapes=dynamic, dynamo=True, output_names=["output"], verbose=False)
    assert program is not None
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    program.save(path, external_data=weights > 1 << 30)  # one file of protobuf holds at most 2 GiB


def _error(net: nn.Module, path: Path, inputs: dict[str, Tensor]) -> float:
    """Largest difference between onnxruntime and torch, relative to the largest value of torch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        wanted = net(**inputs).numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _write_sampling(pipeline: Pipeline, folder: Path, longest: int) -> None:
    description, own = pipeline.description, pipeline.settings()
    text = description.text
    sampling = {
        "shape": list(own_shape(pipeline)),
        "latent_mean": list(description.latent_mean),
        "latent_std": list(description.latent_std),
        "text": text.kind,
        "codec": description.codec.kind,
        "max_tokens": longest,
        "caption_tokens": min(max(description.longest_caption, 1), longest),
        "pad_id": text.pad_id,
        "steps": euler_steps(own),  # sample.py steps as Euler does
        "guidance": own["guidance"],
        "guidance_rule": own["guidance_rule"],
        "guidance_interval": [own["guidance_from"], own["guidance_until"]],
        "shift": own["shift"],
    }
    (folder / "sampling.json").write_text(json.dumps(sampling, indent=2) + "\n")
    pipeline.tokenizer.save(folder)
    if text.kind == "builtin" and description.codec.kind == "pixels":
        (folder / "sample.py").write_text(self_contained(Path(onnx_sample.__file__)))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter tells of its stages on stdout, in the log and in warnings; its errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
