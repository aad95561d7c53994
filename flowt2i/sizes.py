"""One dial for the size of a model: `--size M`, or a number of parameters, sets width, depth, heads, caption encoder, learning rates and batch.

    flowt2i train --config quickstart --size M --data data/scenes --print-config
    flowt2i train --config quickstart --size 25M --data data/scenes

The rule is a power law of the width for each setting, `at * (width / reference_width) ^ exponent`, some with a least value. Its constants lie in `sizes.json`,
and beside each where it comes from: `benchmarks/size_fit.py --write` puts there what it measured; until then they run through the presets `quickstart` (S) and
`stability` (L).
What is given by name (`--model.depth 10`) wins over the dial.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from flowt2i.config import ModelConfig
from flowt2i.errors import UserError

CONSTANTS = Path(__file__).with_name("sizes.json")
WIDTHS = range(64, 4_097, 32)  # what a number of parameters may choose from
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}


@functools.cache
def constants() -> dict[str, Any]:
    """`sizes.json`: `reference_width`, `widths` by name, and of each law `at` (its value at the reference width), `exponent`, `least` if any, and `from`."""
    found: dict[str, Any] = json.loads(CONSTANTS.read_text())
    return found


def words(size: str, model: ModelConfig) -> list[str]:
    """The settings of a size as `--section.field value`, to stand before those that are given by name. UserError for a size that cannot be."""
    return [word for name, value in settings(width_of(size, model)).items() for word in (f"--{name}", f"{value:g}")]


def width_of(size: str, model: ModelConfig) -> int:
    """The width that a size means: by its name, or the one whose model comes nearest to so many parameters (block and MLP ratio as in `model`)."""
    widths: dict[str, int] = constants()["widths"]
    if size.upper() in widths:
        return widths[size.upper()]
    number = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", size.strip().replace(",", "").replace("_", ""), re.IGNORECASE)
    if not number:
        raise UserError(f"--size {size!r}: give {', '.join(widths)}, or a number of parameters such as 25M")
    wanted = float(number[1]) * UNITS[number[2].upper()]
    count = lambda width: parameters(at_width(width, model))
    if not count(WIDTHS[0]) / 1.2 <= wanted <= count(WIDTHS[-1]) * 1.2:
        raise UserError(f"--size {size}: the dial goes from {count(WIDTHS[0]) / 1e6:.1f}M to {count(WIDTHS[-1]) / 1e9:.0f}B parameters")
    return min(WIDTHS, key=lambda width: abs(math.log(count(width) / wanted)))


def at_width(width: int, model: ModelConfig) -> ModelConfig:
    """`model` with what the rule gives for a width."""
    return model.model_copy(update={name.removeprefix("model."): value for name, value in settings(width).items() if name.startswith("model.")})


def settings(width: int, factors: dict[str, float] | None = None) -> dict[str, int | float]:
    """What the rule sets at a width, by `section.field`. factors: what some laws are multiplied with, for measuring whether they are right."""
    law = lambda name: power_law(name, width) * (factors or {}).get(name, 1.0)
    return {
        "model.width": width,
        "model.depth": max(1, round(law("depth"))),
        "model.heads": width // head_width(width, law("head")),
        "model.time_width": to_multiple(law("time_width"), 64),
        "model.text_width": to_multiple(law("text_width"), 64),
        "model.text_depth": max(1, round(law("text_depth"))),
        "data.batch_size": to_multiple(law("batch_size"), 32 if law("batch_size") > 64 else 8),
        "optim.lr": to_digits(law("lr")),
        "optim.muon_lr": to_digits(law("muon_lr")),
    }


def power_law(name: str, width: int) -> float:
    """`at * (width / reference_width) ^ exponent`, and no less than `least` where the law has one."""
    law = constants()["laws"][name]
    return float(max(law["at"] * (width / constants()["reference_width"]) ** law["exponent"], law.get("least", 0.0)))


def head_width(width: int, wanted: float) -> int:
    """The divisor of a width nearest to `wanted` that rotary positions can turn (a multiple of 8); 8 always is one for a width in `WIDTHS`."""
    fitting = [head for head in range(8, width + 1, 8) if width % head == 0]
    return min(fitting, key=lambda head: abs(math.log(head / wanted)))


def to_multiple(value: float, of: int) -> int:
    return max(1, round(value / of)) * of


def to_digits(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


def parameters(model: ModelConfig) -> int:
    """Trainable parameters of a model with the built-in caption encoder, but for what the data decides: patches in and out, positions, vocabulary.

    With a frozen text encoder those of the caption encoder fall away. Biases and norms are left out: `count_parameters` has the exact number.
    """
    d, text, time = model.width, model.text_width, model.time_width
    swiglu = lambda width, ratio: 2 * width * width * ratio  # three matrices, each two thirds as wide as a plain MLP's
    if model.block == "seed":
        block = 4 * d * d + (2 * d * d + 2 * text * d) + 2 * d * d * model.mlp_ratio + 2 * text * text * model.mlp_ratio + 6 * d * time
        rest = -2 * text * text * model.mlp_ratio  # the last block does not update the caption
    else:
        block = 6 * d * d + swiglu(d, model.mlp_ratio)
        rest = text * d + 6 * d * time + (text * time if model.pooled_text else 0)
    captions = model.text_depth * (4 * text * text + swiglu(text, 4))
    return round(model.depth * block + rest + captions + (256 + time) * time + 2 * d * time)
