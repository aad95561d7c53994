"""The recipes that `learning.py` compares, by name: a preset, and what is changed of it. One change at a time against the recipe above it.

(`seed-kind` is the exception: all that is kind at once.)

All are of one size, the quickstart's; settings after the options of `learning.py` (`--model.width 768 …`) change it for all of them alike.
"""

from dataclasses import dataclass

from flowt2i.config import PRESETS, Config, resolve
from flowt2i.errors import UserError, nearest


@dataclass(frozen=True)
class Recipe:
    preset: str
    changes: tuple[str, ...]  # as on the command line: "--section.field", "value", …
    about: str

    def config(self, more: list[str]) -> Config:
        """Its settings, with `more` applied last."""
        return resolve(self.preset, [*self.changes, *more])


_QUICK = PRESETS["quickstart"]
_SIZE = {name: _QUICK["model"][name] for name in ("width", "depth", "time_width", "text_width", "text_depth")}
_SIZE["heads"] = _SIZE["width"] // 64  # the seed's heads are 64 wide
# The seed's recipe is for 12 x 768 and 576 images a step: here the quickstart's width, depth, text encoder and batch, and nothing else of it.
_SEED = (*(word for name, value in _SIZE.items() for word in (f"--model.{name}", str(value))), "--data.batch_size", str(_QUICK["data"]["batch_size"]),
         "--train.micro_batch", "0")  # fmt: skip

RECIPES = {
    "seed": Recipe("seed", _SEED, "the baseline: the seed's recipe to the letter, at the quickstart's width, depth and batch"),
    "seed-lr-3x": Recipe("seed", (*_SEED, "--optim.lr", "1.5e-3"), "a kinder baseline: three times the seed's rate, as the quickstart's AdamW has it"),
    "seed-lr-6x": Recipe("seed", (*_SEED, "--optim.lr", "3e-3"), "a kinder baseline: six times the seed's rate"),
    "seed-ema": Recipe("seed", (*_SEED, "--train.ema", "0.99"), "a kinder baseline: averaged weights"),
    "seed-text-window": Recipe("seed", (*_SEED, "--model.text_window", "7"), "a kinder baseline: the caption encoder of the default recipe"),
    "seed-kind": Recipe(
        "seed",
        (*_SEED, "--optim.lr", "1.5e-3", "--train.ema", "0.99", "--model.text_window", "7"),
        "the kindest baseline: a rate for its size, averaged weights, the caption encoder",
    ),
    "quickstart": Recipe("quickstart", (), "the default recipe"),
    # The default recipe with one of its parts as the seed has it.
    "quickstart-seed-block": Recipe("quickstart", ("--model.block", "seed", "--model.mlp_ratio", "2", "--model.heads", "3"), "the seed's block"),
    "quickstart-adamw": Recipe("quickstart", ("--optim.name", "adamw"), "AdamW on all weights, at its rate of the preset"),
    "quickstart-uniform-times": Recipe("quickstart", ("--flow.times", "uniform"), "training times uniform"),
    "quickstart-v": Recipe("quickstart", ("--model.prediction", "v"), "the network puts out the velocity"),
    "quickstart-floor-0.05": Recipe("quickstart", ("--flow.floor", "0.05"), "the general floor of the x-loss"),
    "quickstart-no-edges": Recipe("quickstart", ("--flow.edges", "0"), "the squares of the error alone"),
    "quickstart-learned-positions": Recipe("quickstart", ("--model.positions", "learned"), "learned positions"),
    "quickstart-sincos-positions": Recipe("quickstart", ("--model.positions", "sincos"), "no rotary positions"),
    "quickstart-no-bottleneck": Recipe("quickstart", ("--model.bottleneck", "0"), "no bottleneck in the patch embedding"),
    "quickstart-no-masks": Recipe("quickstart", ("--model.masks", "0", "--model.pixel_masks", "0"), "patches of a linear layer alone"),
    "quickstart-no-pixel-masks": Recipe("quickstart", ("--model.pixel_masks", "0"), "no masks that look at their pixel"),
    "quickstart-no-negatives": Recipe(
        "quickstart", ("--model.negatives", "false", "--sample.guidance_rule", "cfg"), "dark pictures as they are, guidance of all"
    ),
    "quickstart-no-text-window": Recipe("quickstart", ("--model.text_window", "0"), "a plain transformer as caption encoder"),
    "quickstart-no-pooled-text": Recipe("quickstart", ("--model.pooled_text", "false"), "no mean caption feature in the modulation"),
    "quickstart-cosine": Recipe("quickstart", ("--optim.schedule", "cosine", "--optim.final", "0.1"), "the seed's schedule"),
    "quickstart-no-ema": Recipe("quickstart", ("--train.ema", "0"), "no averaged weights"),
}
BASELINE = "seed"


def find(name: str) -> Recipe:
    """UserError, with the nearest, for a name that is not in the table."""
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]


def parse(words: str) -> list[tuple[str, float]]:
    """`seed,quickstart@0.25` -> [("seed", 1.0), ("quickstart", 0.25)]: recipes, and the share of the budget that each gets, with a schedule of its own."""
    found: list[tuple[str, float]] = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        name, at, text = word.partition("@")
        find(name)
        try:
            share = float(text) if at else 1.0
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UserError(f"recipe {word!r}: after the @ stands a share of the budget over 0 and up to 1, such as {name}@0.25")
        if (name, share) not in found:
            found.append((name, share))
    if not found:
        raise UserError("no recipe is named: give --recipes seed,quickstart")
    return found


def label(name: str, share: float) -> str:
    return name if share == 1 else f"{name}@{share:g}"
