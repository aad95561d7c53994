"""From a run to a folder that travels: weights in one of three formats, a model card, samples; complete or absent."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowt2i import exported, hub
from flowt2i.config import parse_overrides, set_field
from flowt2i.errors import UserError, nearest
from flowt2i.export import card, folder, native
from flowt2i.export.average import average_into
from flowt2i.export.card import Told
from flowt2i.export.facts import training_facts
from flowt2i.pipeline import Pipeline
from flowt2i.styles import BY_STYLES
from flowt2i.training import checkpoint

FORMATS = ("flowt2i", "diffusers", "onnx")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check(to: Path, format: str, dtype: str, told: Told, samples: int, nets: bool, push: str, private: bool, force: bool,
          sample: Sequence[str]) -> None:  # fmt: skip
    """UserError for whatever cannot work, before anything is loaded."""
    stray = next((field for field, _ in parse_overrides(sample) if not field.startswith("sample.")), None)
    if stray:
        raise UserError(f"unknown option --{stray} (of settings an export takes --sample.* alone); see `flowt2i export --help`")
    if format not in FORMATS:
        raise UserError(f"no format {format!r}{nearest(format, FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}{nearest(dtype, DTYPES)}")
    if format == "onnx" and dtype != "fp32":
        raise UserError("--format onnx is fp32: leave out --dtype")
    if nets and format != "flowt2i":
        raise UserError(f"--format {format} {'always takes its nets along' if format == 'diffusers' else 'takes no such nets along'}: leave out --take-nets")
    if private and not push:
        raise UserError("--private is about the hub: add --push OWNER/NAME, or leave it out")
    if not 0 <= samples <= 64:
        raise UserError(f"--samples {samples} is out of range: choose 0 to 64")
    card.check_licence(told.licence)
    folder.check_target(to, force)
    if format == "onnx":
        from flowt2i.export.onnx_format import require_onnx

        require_onnx()
    if told.source == "scenes":
        raise UserError("--source scenes is what models of the built-in data are known by: give another name")
    if push:
        hub.check_id(push)
        hub.check_login(push)


def export(
    model: str | Path, to: Path, *, format: str = "flowt2i", weights: str = "auto", dtype: str = "fp32", told: Told | None = None, samples: int = 16,
    nets: bool = False, force: bool = False, average: Sequence[str | Path] = (), push: str = "", private: bool = False, codec: str | None = None,
    text: str | None = None, device: str | None = None, progress: bool = False, sample: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write `to` from a run, a checkpoint, an export of ours, a packaged model or a hub id, and send it to the hub as `push`. Returns what was done.

    average: other models, of whose weights and its own the mean is written. told: licence, names and scores for the card. nets: take VAE and text encoder
    along where the hub has them too. sample: `--sample.field value` words, how the exported model is to draw of its own, where otherwise than before.
    codec, text: where they are, if they moved. UserError in one line for what the user can mend; `to` is then as it was (a push that fails leaves it
    complete).
    """
    told = told or Told()
    check(to, format, dtype, told, samples, nets, push, private, force, sample)
    from tqdm import tqdm

    source = checkpoint.find(hub.local(model))
    codec, text = codec or exported.taken_along(source, exported.VAE), text or exported.taken_along(source, exported.ENCODER)
    pipeline = Pipeline.from_pretrained(source, weights=weights, device=device, codec=codec, text=text)
    if told.source and pipeline.description.is_scenes:
        raise UserError("--source: this model was trained on the built-in scenes, which its card names: leave it out")
    facts = training_facts(source, pipeline)
    for field, value in parse_overrides(sample):
        set_field(pipeline.config, field, value)
    own = pipeline.settings()  # its UserError where they do not go together
    if sample:
        facts["scores"] = {}  # those that the run recorded are of its own way of drawing
    if format != "flowt2i":
        for name in BY_STYLES:
            if own[name] and f"sample.{name}" in dict(parse_overrides(sample)):
                raise UserError(f"--format {format} does not compare styles: leave out --sample.{name}")
            setattr(pipeline.config.sample, name, 0.0)  # samples and card are of what it does
    if average:
        facts["averaged"] = [*facts["averaged"], *average_into(pipeline, average, weights)]
        facts["scores"] = {}  # those that the run recorded are of its own weights
    for parameter in pipeline.model.parameters():
        parameter.data.copy_(parameter.to(DTYPES[dtype]))  # the samples show what travels
    prompts = card.sample_prompts(pipeline.config, pipeline.description.prompts, samples)
    result: dict[str, Any] = {"to": str(to), "format": format, "weights": "ema" if pipeline.weights == "EMA" else "raw", "dtype": dtype}
    longest = pipeline.description.text.max_tokens
    with folder.aside(to, force) as aside:
        drawn = None
        if prompts:
            with tqdm(total=len(prompts), desc="drawing samples", unit="image", leave=False, disable=None if progress else True) as bar:
                drawn = card.draw_samples(pipeline, prompts, aside / "samples.png", bar.update)
        if format == "onnx":
            from flowt2i.export import onnx_format

            with tqdm(total=onnx_format.STAGES, leave=False, disable=None if progress else True) as bar:

                def stage(what: str) -> None:
                    bar.set_description(what)
                    bar.update()

                result["errors"], longest = onnx_format.write(pipeline, aside, stage)
        elif format == "diffusers":
            from flowt2i.export import diffusers_format

            diffusers_format.write(pipeline, aside, DTYPES[dtype])
        else:
            native.write(pipeline, aside, DTYPES[dtype], samples, nets, codec, text, told.source)
        if told.measured:
            (aside / exported.SCORES).write_text(told.measured.model_dump_json(indent=1) + "\n")
        folder.write_mark(aside, format, weights=result["weights"], dtype=dtype, licence=told.licence, training=facts)
        card.write_card(aside, format, push or to.resolve().name, pipeline, facts, told, dtype, prompts, drawn, longest)
        checkpoint.write_manifest(aside, leave_out=("README.md", "samples.png"))  # people may edit these
    result |= {"bytes": checkpoint.total_bytes(to), "step": facts["step"], "pushed": hub.push(to, push, private) if push else None}
    return result
