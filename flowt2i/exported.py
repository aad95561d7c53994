"""What an exported folder says of itself, as far as loading it goes (`flowt2i/export/` writes them)."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler, field_validator

from flowt2i.errors import UserError
from flowt2i.score import Score

MARK = "export.json"  # format, kind of weights, licence, facts of the training
SCORES = "scores.json"  # what was measured of the model once it was trained, where something was
VAE, ENCODER = "vae", "text_encoder"  # folders in which a model takes its nets along


class Training(BaseModel):
    """What is known of the training; None where nothing is."""

    step: int | None = None
    images_seen: int | None = None
    seconds: float | None = None
    parameters: int | None = None
    device: str | None = None
    ranks: int | None = None
    precision: str | None = None  # that the products had
    scores: dict[str, int | float] = {}
    averaged: list[str] = []  # other models that the weights are the mean of, besides this one


class Mark(BaseModel):
    """The contents of MARK. Facts of the training that are not such are as good as none: nothing but the card needs them."""

    format: Literal["flowt2i", "diffusers", "onnx"]
    weights: Literal["ema", "raw"]
    licence: str = ""  # of the weights, as the hub writes it
    training: Training = Training()

    @field_validator("training", mode="wrap")
    @classmethod
    def _or_none(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            return Training()


class Measured(BaseModel):
    """Scores with the day on which they were taken, as `flowt2i evaluate --out` reports them; of such a report the rest is passed over."""

    made: str = ""
    version: str = ""
    scores: list[Score]


def read_scores(file: Path) -> Measured:
    """The scores in a file. UserError where it is none of `flowt2i evaluate`."""
    try:
        return Measured.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} holds no scores: give the report.json that `flowt2i evaluate --out DIR` writes") from error


def read_mark(folder: Path) -> Mark | None:
    """The mark of an exported folder; None for any other folder. UserError where there is one that cannot be read."""
    if not (folder / MARK).exists():
        return None
    try:
        return Mark.model_validate_json((folder / MARK).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MARK} cannot be read: copy or fetch the exported folder again") from error


def format_of(folder: Path) -> str:
    """ "flowt2i", "diffusers" or "onnx" of an exported folder; "" for any other. UserError where its mark cannot be read."""
    mark = read_mark(folder)
    return mark.format if mark else ""


def weights_file(folder: Path, wanted: str) -> tuple[str, str]:
    """Stem and kind ("ema" or "raw") of the weights to load: a checkpoint holds both, an exported model one of them.

    wanted: "ema", "raw", or "auto" (EMA where there is one). UserError where they are not there.
    """
    mark = read_mark(folder)
    stems: dict[str, str] = {mark.weights: "model"} if mark else {"ema": "ema", "raw": "model"}
    if wanted not in ("auto", "ema", "raw"):
        raise UserError(f"no weights {wanted!r}: choose ema, raw or auto")
    there = [kind for kind, stem in stems.items() if (folder / f"{stem}.safetensors").exists()]
    if not there or wanted not in ("auto", *there):
        raise UserError(f"{folder} has no {wanted} weights: choose {' or '.join(there) or 'another model'}")
    kind = there[0] if wanted == "auto" else wanted
    return stems[kind], kind


def taken_along(folder: Path, name: str) -> str | None:
    """Folder of the net (VAE or ENCODER) that an exported model took along, or None."""
    return str(folder / name) if (folder / name / "config.json").exists() else None


def step_of(folder: Path) -> int | None:
    """The training step of a checkpoint or an exported model; None where it does not say."""
    mark = read_mark(folder)
    if mark:
        return mark.training.step
    try:
        return int(json.loads((folder / "state.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # telling pictures apart by it is no reason to refuse the model
        return None
