"""The mean of the weights of several trainings that went on from one model (model soups: Wortsman et al. 2022, 2203.05482)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from flowt2i import hub
from flowt2i.errors import UserError
from flowt2i.pipeline import Pipeline
from flowt2i.precision import double
from flowt2i.pretrained import looks_like_path
from flowt2i.training import checkpoint


def average_into(pipeline: Pipeline, others: Sequence[str | Path], weights: str) -> list[str]:
    """Put the mean of its weights and those of the others into the pipeline's model; returns what the others are called.

    weights: "ema", "raw" or "auto", of each of them. UserError where one of them is another kind of model, whose weights mean something else.
    """
    means = {name: double(tensor) for name, tensor in pipeline.model.state_dict().items()}
    for name in others:
        other = Pipeline.from_pretrained(checkpoint.find(hub.local(name)), weights=weights, device=pipeline.device)
        if what := _difference(pipeline, other):
            raise UserError(f"--average {name}: {what}: average models that were trained on from one model")
        for key, tensor in other.model.state_dict().items():
            means[key] += double(tensor)
    with torch.no_grad():
        for key, tensor in pipeline.model.state_dict().items():
            tensor.copy_(means[key] / (1 + len(others)))
    return [Path(name).resolve().name if looks_like_path(str(name)) else str(name) for name in others]


def _difference(one: Pipeline, other: Pipeline) -> str:
    """What keeps two models from having weights of one meaning; "" where nothing is known to."""
    a, b = one.description, other.description
    if one.model.config != other.model.config or one.model.shape != other.model.shape:
        return "its architecture is another"
    if a.text.fingerprint != b.text.fingerprint:
        return "its text encoder or tokenizer is another"
    same_latents = a.codec.fingerprint == b.codec.fingerprint and (a.latent_mean, a.latent_std) == (b.latent_mean, b.latent_std)
    return "" if same_latents else "its latents are others"
