"""One dial for the size of a model: `--size M`, or a number of parameters, scales width, depth, heads, caption encoder, learning rates and batch.

    flowt2i train --config quickstart --size M --data data/scenes --print-config
    flowt2i train --config quickstart --size 25M --data data/scenes

The preset is scaled: each setting is its own, `value * (width / its width) ^ exponent`, some with a least value. So `quickstart` at S and `stability` at L are
themselves, and how high a rate or how large a batch is stays a matter of the preset, which knows how long it trains. The exponents lie in `sizes.json`, and
beside each where it comes from: `benchmarks/size_fit.py --write LAWS` puts there what it measured; the others run through the presets `quickstart` and
`stability`. Scale a preset rather than a run that was scaled down: a batch that was held at its least value would grow from there.
What is given by name (`--model.depth 10`) wins over the dial.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from flowt2i.config import Config, ModelConfig
from flowt2i.errors import UserError

CONSTANTS = Path(__file__).with_name("sizes.json")
WIDTHS = range(64, 4_097, 32)  # what a number of parameters may choose from
SET = ("model.width", "model.depth", "model.heads", "model.time_width", "model.text_width", "model.text_depth", "data.batch_size", "optim.lr", "optim.muon_lr")
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}


@functools.cache
def constants() -> dict[str, Any]:
    """`sizes.json`: `widths` by name, and of each law its `exponent`, with `error` where it was fitted, `least` if any, and `from`."""
    found: dict[str, Any] = json.loads(CONSTANTS.read_text())
    return found


def words(size: str, preset: Config, model: ModelConfig) -> list[str]:
    """The settings of a size as `--section.field value`, to stand before those that are given by name. UserError for a size that cannot be.

    preset: what is scaled. model: the same with what is given by name, of which a number of parameters heeds block and MLP ratio.
    """
    return [word for name, value in settings(width_of(size, preset, model), preset).items() for word in (f"--{name}", str(value))]


def width_of(size: str, preset: Config, model: ModelConfig) -> int:
    """The width that a size means: by its name, or the one whose model comes nearest to so many parameters (block and MLP ratio as in `model`)."""
    widths: dict[str, int] = constants()["widths"]
    if size.upper() in widths:
        return widths[size.upper()]
    number = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", size.strip().replace(",", "").replace("_", ""), re.IGNORECASE)
    if not number:
        raise UserError(f"--size {size!r}: give {', '.join(widths)}, or a number of parameters such as 25M")
    wanted = float(number[1]) * UNITS[number[2].upper()]
    count = lambda width: parameters(at_width(width, preset, model))
    if not count(WIDTHS[0]) / 1.2 <= wanted <= count(WIDTHS[-1]) * 1.2:
        raise UserError(f"--size {size}: the dial goes from {count(WIDTHS[0]) / 1e6:.1f}M to {count(WIDTHS[-1]) / 1e9:.0f}B parameters")
    return min(WIDTHS, key=lambda width: abs(math.log(count(width) / wanted)))


def at_width(width: int, preset: Config, model: ModelConfig) -> ModelConfig:
    """`model` with what the scaled preset has at a width."""
    return model.model_copy(update={name.removeprefix("model."): value for name, value in settings(width, preset).items() if name.startswith("model.")})


def settings(width: int, preset: Config, factors: dict[str, float] | None = None) -> dict[str, int | float]:
    """A preset scaled to a width, by `section.field`. factors: what some laws are multiplied with, for measuring whether they are right."""
    if width == preset.model.width and not factors:  # itself, with nothing rounded
        own = preset.model_dump()
        return {name: own[name.partition(".")[0]][name.partition(".")[2]] for name in SET}
    law = {name: scaled(name, value, width / preset.model.width) * (factors or {}).get(name, 1.0) for name, value in values(preset).items()}
    return {
        "model.width": width,
        "model.depth": max(1, round(law["depth"])),
        "model.heads": width // head_width(width, law["head"]),
        "model.time_width": to_multiple(law["time_width"], 64),
        "model.text_width": to_multiple(law["text_width"], 64),
        "model.text_depth": max(min(1, preset.model.text_depth), round(law["text_depth"])),  # none stays none
        "data.batch_size": to_multiple(law["batch_size"], 32 if law["batch_size"] > 64 else 8 if law["batch_size"] > 8 else 1),
        "optim.lr": to_digits(law["lr"]),
        "optim.muon_lr": to_digits(law["muon_lr"]),
    }


def values(preset: Config) -> dict[str, float]:
    """What a preset has of each law, at its own width."""
    model, optim = preset.model, preset.optim
    return {
        "depth": model.depth, "head": model.width / model.heads, "time_width": model.time_width, "text_width": model.text_width,
        "text_depth": model.text_depth, "batch_size": preset.data.batch_size, "lr": optim.lr, "muon_lr": optim.muon_lr,
    }  # fmt: skip


def scaled(name: str, value: float, ratio: float) -> float:
    """What a law makes of a preset's value when its width is multiplied by `ratio`; no less than the law's `least`, where the preset itself is not."""
    law = constants()["laws"][name]
    return float(max(value * ratio ** law["exponent"], min(value, law.get("least", 0.0))))


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
