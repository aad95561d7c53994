"""Am I on track? A run held against the curves that our own trainings of its preset drew: loss and score against images seen.

The curves are package data, `reference_curves/PRESET.json`, written by `python benchmarks/reference_curve.py` from the log.jsonl and eval.jsonl of runs.
They hold for one size of network on the built-in scenes; a loss is compared only where it means the same (flow settings, prediction, image size),
a score only where the pictures were drawn alike: by the settings that the curves were drawn with, first of `samples`, or by others there that were measured
to score the same.
The learning rate falls over the second half of a run, so a run that is laid out for far fewer or more images than ours is ahead or behind in between.
"""

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from flowt2i.config import PRESETS, Config, FlowConfig, SampleConfig
from flowt2i.description import DatasetDescription
from flowt2i.evaluation.intervals import wilson
from flowt2i.settings import NAMES
from flowt2i.training.tracking import read_log

TOLERANCE = 0.1  # of a loss. A choice: the spread of seeds at one length is not measured (our runs, 113,000 to 134,000 images long, end within 7%)
REACH = 1.05  # a curve is still read this far past its ends
BESIDE = {"edges", "perceptual", "perceptual_size", "perceptual_from"}  # of the flow settings: terms of the trained loss that validation leaves out
NETWORK = ("width", "depth")  # the size of a network, as the curves tell that of theirs
Points = list[list[float]]  # [images seen, value], in order


@dataclass(frozen=True)
class Expected:
    """What our runs had after so many images."""

    mean: float
    low: float  # least and most over the runs
    high: float
    runs: int


@dataclass(frozen=True)
class Standing:
    """How a run stands: `verdict` is "ahead", "on track" or "behind"; `line` says it with the numbers."""

    verdict: str
    line: str


def load(preset: str) -> dict[str, Any] | None:
    """The reference curves of a preset, or None where we have none."""
    file = resources.files("flowt2i.evaluation") / "reference_curves" / f"{preset}.json"
    return json.loads(file.read_text()) if preset in PRESETS and file.is_file() else None


def comparable(config: Config, description: DatasetDescription) -> tuple[dict[str, Any] | None, set[str]]:
    """The reference curves for this run (None: there are none), and which of `loss`, `validation`, `score` mean the same in it."""
    reference = load(config.preset)
    if reference is None or not description.is_scenes or config.data.subset or config.origin:
        return None, set()
    if description.codec.kind != reference["codec"] or description.codec.image_size != reference["image_size"]:
        return None, set()
    if {name: getattr(config.model, name) for name in NETWORK} != reference["network"]:
        return None, set()  # another size of network learns at another pace
    theirs = FlowConfig(**reference["flow"])
    same_prediction = config.model.prediction == reference["prediction"]
    same_loss = same_prediction and config.flow == theirs
    same_validation = same_prediction and config.flow.model_dump(exclude=BESIDE) == theirs.model_dump(exclude=BESIDE)
    same_pictures = drawn_with(config.sample) in [drawn_with(SampleConfig(**settings)) for settings in reference["samples"]]
    return reference, {name for name, same in (("score", same_pictures), ("loss", same_loss), ("validation", same_validation)) if same}


def drawn_with(sample: SampleConfig) -> dict[str, Any]:
    """What decides about a picture; how many previews are drawn, and of what, does not."""
    return {name: getattr(sample, name) for name in NAMES}


def expected(reference: dict[str, Any], what: str, images: float) -> Expected | None:
    """`what` ("loss", "validation", "score") of our runs after so many images; None where no run reached there.

    Between points that may lie far apart: a score by straight lines, a loss, which falls about as a power of the images seen, by straight lines in the
    logarithms of both. (Half way between 0.1 at 10,000 images and 0.05 at 40,000, at 20,000, that is 0.071 and not 0.083.)
    """
    values = []
    for run in reference["runs"]:
        points = np.asarray(run.get(what) or np.zeros((0, 2)), np.float64)
        if len(points) and points[0, 0] / REACH <= images <= points[-1, 0] * REACH:
            x, y = points.T
            values.append(float(np.interp(images, x, y) if what == "score" else np.exp(np.interp(np.log(images), np.log(x), np.log(y)))))
    return Expected(float(np.mean(values)), min(values), max(values), len(values)) if values else None


def standing(evaluation: dict[str, Any], config: Config, description: DatasetDescription) -> Standing | None:
    """How a line of eval.jsonl stands against our curves; None where there is nothing to hold it against."""
    reference, means_the_same = comparable(config, description)
    if reference is None:
        return None
    images = evaluation["images_seen"]
    verdicts, said = [], []
    score, ours = evaluation.get("score"), expected(reference, "score", images)
    if score is not None and math.isfinite(score) and ours and config.train.score_prompts and "score" in means_the_same:
        low, high = wilson(round(score * config.train.score_prompts), config.train.score_prompts)
        verdicts.append(-1 if high < ours.low else 1 if low > ours.high else 0)
        said.append(f"score {score:.0%} [{low:.0%}, {high:.0%}], ours {ours.mean:.0%}")
    loss, ours = validation_of(evaluation), expected(reference, "validation", images)
    if loss is not None and ours and "validation" in means_the_same:
        verdicts.append(-1 if not loss <= ours.high * (1 + TOLERANCE) else 1 if loss < ours.low * (1 - TOLERANCE) else 0)
        said.append(f"validation loss {loss:.4f}, ours {ours.mean:.4f}")
    if not verdicts:
        return None
    verdict = "behind" if min(verdicts) < 0 else "ahead" if max(verdicts) > 0 else "on track"
    return Standing(verdict, f"{verdict} at {images:,} images: {'; '.join(said)} ({config.preset} on scenes)")


def validation_of(evaluation: dict[str, Any]) -> float | None:
    """The validation loss of a line of eval.jsonl: of the averaged weights where there are some."""
    found = evaluation.get("validation_ema") or evaluation.get("validation") or {}
    return found.get("loss")


def curve_of(run: Path, bins: int = 60) -> dict[str, Points]:
    """`loss` (means of `bins` equal stretches of log.jsonl), `validation`, `score` and `kid` of a run against images seen; empty where not logged."""
    log = [(line["images_seen"], line["loss"]) for line in read_log(run / "log.jsonl") if "loss" in line]
    stretches = [part for part in np.array_split(np.asarray(log, np.float64).reshape(-1, 2), min(bins, max(1, len(log)))) if len(part)]
    evaluations = read_log(run / "eval.jsonl")
    return {
        "loss": [[float(x), round(float(y), 6)] for x, y in (part.mean(0) for part in stretches)],
        "validation": [[line["images_seen"], round(value, 6)] for line in evaluations if (value := validation_of(line)) is not None],
        **{name: [[line["images_seen"], round(line[name], 6)] for line in evaluations if name in line] for name in ("score", "kid")},
    }
