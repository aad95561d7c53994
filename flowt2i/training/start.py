"""Where a run begins: from nothing, or from the weights of a model (`train --init MODEL`), at the same picture size or another.

What belongs to the model goes with it: architecture, what it predicts, the normalisation of its latents, its way of drawing. How to train is the
new run's own. A run remembers its origin in its configuration and its checkpoints, so that it is resumed without the model it began from.
"""

from pathlib import Path
from typing import NamedTuple

from flowt2i import exported, hub
from flowt2i.config import Config, MatchConfig, ModelConfig, Origin, load_config, parse_overrides, resolve
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.model import FlowTransformer
from flowt2i.schedules import shift_times
from flowt2i.training import checkpoint, grow
from flowt2i.training.lora import merged

SHIFTS = 0.01, 100.0  # what `sample.shift` may be


class Start(NamedTuple):
    """A model to begin from."""

    folder: Path  # checkpoint or exported model
    config: Config
    description: DatasetDescription
    model: ModelConfig  # resolved
    stem: str  # of the file of weights
    weights: str  # "ema" or "raw"


def find(model: str | Path) -> Start:
    """The model at a path (run folder, checkpoint, exported model) or of the hub. UserError where there is none, or it is damaged."""
    folder = checkpoint.find(hub.local(model))
    config, description = load_config(folder / "config.json"), DatasetDescription.load(folder)
    stem, weights = exported.weights_file(folder, "auto")
    return Start(folder, config, description, config.model.resolve(description.codec.kind, description.codec.shape), stem, weights)


def configuration(name: str | Path, start: Start, data: DatasetDescription, words: list[str], base: Config | None = None) -> Config:
    """The configuration of a run that begins from a model.

    `name`: the model, as it was named; `words`: `--section.field value` overrides; `base`: where data, optim, train and track come from, if not
    from the model's own training too. Where the picture grows, the times of training and of drawing are shifted (`grow.time_shift`), unless
    `words` say otherwise. UserError, in one line, for what does not fit.
    """
    require_fit(name, start.description, data)
    config = (base or start.config).model_copy(deep=True)
    config.model = start.model.model_copy(deep=True)
    config.flow, config.sample = start.config.flow.model_copy(deep=True), start.config.sample.model_copy(deep=True)
    if base is None:
        config.train.lora = 0  # the model's own adapters are merged: whether to adapt again is the new run's to say
        config.match = MatchConfig()  # likewise for post-training
        config.optim.schedule_steps, config.data.subset, config.train.stop_after = 0, 0, ""  # the length of that run, and what it was cut to
    if data.fingerprint != start.description.fingerprint:
        config.sample.prompts = []  # previews show captions of the new data
        config.sample.analogy, config.sample.style_contrast, config.sample.styles = 0.0, 0.0, []  # likewise for its styles
    ratio = grow.time_shift(start.description.codec.shape, data.codec.shape)
    config.flow.time_shift *= ratio
    config.flow.perceptual_from = shift_times(config.flow.perceptual_from, ratio)
    config.sample.shift = min(max(config.sample.shift * ratio, SHIFTS[0]), SHIFTS[1])
    sample = config.sample  # the interval moves as the solver's times do: guided are the same steps
    sample.guidance_from, sample.guidance_until = shift_times(sample.guidance_from, ratio), shift_times(sample.guidance_until, ratio)
    sample.analogy_until, sample.style_contrast_until = shift_times(sample.analogy_until, ratio), shift_times(sample.style_contrast_until, ratio)
    asked = dict(parse_overrides(words))
    if asked.get("train.lora", "0") != "0":
        config.optim.name = "adamw"  # adapters are thin: there is nothing for Muon to make orthogonal
    config = resolve(None, words, base=config)
    for field, (before, now) in _differences(start.model, config.model).items():
        if field != "patch":
            raise UserError(f"{name} has model.{field} {before}, not {now}: leave out --model.{field}, or train a new model without --init")
    config.model = config.model.resolve(data.codec.kind, data.codec.shape)
    config.origin = Origin(
        model=str(name), weights="ema" if start.weights == "ema" else "raw", step=exported.step_of(start.folder),
        image_size=start.description.codec.image_size, patch=start.model.patch,
        latent_mean=start.description.latent_mean, latent_std=start.description.latent_std,
    )  # fmt: skip
    return config


def require_fit(name: str | Path, model: DatasetDescription, data: DatasetDescription) -> None:
    """UserError where the data cannot be what this model goes on with: other codec, channels, tokenizer or text encoder."""
    again = f"prepare the data again with --like {name}"
    ours, theirs = model.codec, data.codec
    if (ours.kind, ours.fingerprint, ours.shape[0]) != (theirs.kind, theirs.fingerprint, theirs.shape[0]):
        which = "another version of it" if ours.id == theirs.id else repr(theirs.id)
        raise UserError(f"{name} draws with codec {ours.id!r}, the data were prepared with {which}: {again}")
    for field in type(model.text).model_fields:
        if field != "id" and getattr(model.text, field) != getattr(data.text, field):
            raise UserError(
                f"{name} reads captions with another {_text_part(field)} than the data were prepared with ({model.text.id!r}, {data.text.id!r}): {again}"
            )


def _text_part(field: str) -> str:
    return {"fingerprint": "tokenizer or text encoder", "max_tokens": "limit of tokens", "kind": "text encoder"}.get(field, f"text encoder ({field})")


def _differences(before: ModelConfig, now: ModelConfig) -> dict[str, tuple[object, object]]:
    pairs = {field: (getattr(before, field), getattr(now, field)) for field in type(before).model_fields}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def continued(run: Path, words: list[str]) -> Config | None:
    """The configuration of a run's newest good checkpoint, with the same overrides: the same command goes on, whatever became of the model it began from.

    None where the run has no checkpoint yet. UserError where that run did not begin from a model.
    """
    source = checkpoint.newest_good(run)
    if source is None:
        return None
    config = resolve(None, words, base=load_config(source / "config.json"))
    if config.origin is None:
        raise UserError(f"{run} holds a run that did not begin from a model: leave out --init to continue it, or choose another --out")
    return config


def remembered(config: Config, source: Path | None, init: Path | None) -> Config:
    """The configuration with the origin that holds: a resumed run's own, of a new one what it is given, else none."""
    origin = load_config(source / "config.json").origin if source else config.origin if init else None
    if config.train.lora and origin is None:
        raise UserError("train.lora adapts a model that is there: add --init MODEL, or leave --train.lora out")
    return config.model_copy(update={"origin": origin})


def described(data: DatasetDescription, origin: Origin | None) -> DatasetDescription:
    """The data as the run sees them. A model keeps the normalisation it learned with: another would change how strong the noise is at every time,
    which no change of its weights makes good.
    """
    return data if origin is None else data.model_copy(update={"latent_mean": origin.latent_mean, "latent_std": origin.latent_std})


def load(model: FlowTransformer, folder: Path) -> None:
    """The weights of the model in `folder` (EMA where it has them) into a new one, adapters merged, resized where size or patch differ."""
    start = find(folder)
    file = start.folder / f"{start.stem}.safetensors"
    patch, (_, height, width) = start.model.patch, start.description.codec.shape
    checkpoint.load_named(model, grow.fitted(merged(checkpoint.load_tensors(file)), patch, (height // patch, width // patch), model), file)
