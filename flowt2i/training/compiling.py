"""Whether `torch.compile` pays for a run, and what of a model it compiles."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from flowt2i.config import TrainConfig
from flowt2i.model import FlowTransformer
from flowt2i.training.objective import Objective


def has_compiler() -> bool:
    """Whether what torch.compile generates can be built here: a C++ compiler, and Python's own headers."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def will_compile(config: TrainConfig, device: torch.device) -> bool:
    """`train.compile`, with "auto" decided: a compiler is there, and the run is long enough to win back the compilation."""
    long_enough = config.minutes >= 1 if config.minutes else config.steps == 0 or config.steps >= 500
    return config.compile == "on" or (config.compile == "auto" and device.type in ("cpu", "cuda") and has_compiler() and long_enough)


def compile_blocks(model: FlowTransformer, shapes: int = 1) -> None:
    """Compile each repeated block in place: one compilation serves all. The parameters keep their names; EMA weights stay uncompiled.

    For pictures of several shapes it is compiled once for each of them: a graph for all shapes would round by which one it met first, and a resumed run
    meets another one first.
    """
    if shapes > 1:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * shapes)  # beside widths of captions
    for block in [*model.blocks, *(model.caption_encoder.blocks if model.caption_encoder is not None else [])]:
        block.compile(dynamic=_dynamic(shapes))


def compile_training(objective: Objective, shapes: int = 1, sharded: bool = False) -> None:
    """The model's blocks, how its output is put together and the errors of the loss, whose many elementwise passes become few (benchmarks/compiled.py).

    Sharded, the output stays as it is: its weights are gathered for each step, and compiling that was not tried.
    """
    compile_blocks(objective.model, shapes)
    objective.errors = torch.compile(objective.errors, dynamic=_dynamic(shapes))  # type: ignore[method-assign]
    if not sharded:
        objective.model.patches = torch.compile(objective.model.patches, dynamic=_dynamic(shapes))  # type: ignore[method-assign]


def _dynamic(shapes: int) -> bool | None:
    return False if shapes > 1 else None


def text_padding(longest: int, compiled: bool) -> int:
    """Captions are padded to a multiple of so many tokens: the longest of all where that is short (one width, no recompilation), else 8, or 32 compiled."""
    return max(1, longest) if longest <= 32 else 32 if compiled else 8
