"""Whether `torch.compile` pays for a run, and what of a model it compiles."""

import shutil

import torch

from flowt2i.config import TrainConfig
from flowt2i.model import FlowTransformer


def will_compile(config: TrainConfig, device: torch.device) -> bool:
    """`train.compile`, with "auto" decided: a compiler is there, and the run is long enough to win back the compilation."""
    long_enough = config.minutes >= 2 if config.minutes else config.steps == 0 or config.steps >= 500
    compiler = device.type == "cuda" or (device.type == "cpu" and shutil.which("g++") is not None)
    return config.compile == "on" or (config.compile == "auto" and compiler and long_enough)


def compile_blocks(model: FlowTransformer) -> None:
    """Compile each repeated block in place: one compilation serves all, and the plain modules stay for saving and sampling."""
    for block in [*model.blocks, *(model.caption_encoder.blocks if model.caption_encoder is not None else [])]:
        block.compile()
