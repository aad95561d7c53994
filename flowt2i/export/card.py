"""The model card: README.md with the hub's YAML in front, written from what the run recorded and from pictures it draws now."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowt2i.config import Config
from flowt2i.errors import UserError
from flowt2i.export.facts import public_config, public_source, training_command
from flowt2i.exported import Measured
from flowt2i.grid import grid
from flowt2i.human import duration
from flowt2i.pipeline import Pipeline, save_png
from flowt2i.score import Score
from flowt2i.settings import describe

FEW = 12  # scores that a card shows all of


@dataclass(frozen=True)
class Told:
    """What only people know of a model, and what was measured of it."""

    licence: str = ""  # of the weights
    source: str = ""  # what the training pictures are called, where they are neither scenes nor of the hub
    notes: str = ""  # Markdown: whose pictures, under which terms, on which machine
    measured: Measured | None = None


USE = {
    "flowt2i": """```python
from flowt2i import Pipeline

pictures = Pipeline.from_pretrained("{name}")([{literal}], seed=0)
pictures[0].save("picture.png")
```

or `flowt2i generate {quoted} --model {name} --out picture.png`. A folder works in place of the name.""",
    "diffusers": """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{name}", trust_remote_code=True)
pipeline([{literal}], generator=torch.Generator().manual_seed(0)).images[0].save("picture.png")
```

A folder works in place of the name. The code that runs is `pipeline.py` and `transformer/flowt2i_transformer.py` in this folder: read them
before you trust them.
Its `FlowMatchEulerDiscreteScheduler` runs from sigma = 1 (noise) to 0; flowt2i's time is t = 1 - sigma, and the shift is the same number.""",
    "onnx": """`velocity.onnx` is the velocity net: `z` [B, C, H, W], `t` [B] from 0 (noise) to 1, `text` [B, T, D], `mask` [B, T] (True: a real token) to
`dz/dt` [B, C, H, W]; B is free, T up to {longest}. `sampling.json` holds latent statistics and defaults. {encoder}""",
}


def check_licence(licence: str) -> None:
    """UserError where this cannot be a licence identifier of the hub's."""
    if licence and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UserError(f"--license {licence!r} is no identifier: give one as the hub writes them, such as apache-2.0, mit, cc-by-4.0 or other")


def sample_prompts(config: Config, captions: tuple[str, ...], count: int) -> list[str]:
    """The prompts of the run's own previews, or captions of held-out pictures: none is chosen for how it comes out."""
    return [p for p in (config.sample.prompts or captions) if p.strip()][:count]


def draw_samples(pipeline: Pipeline, prompts: list[str], path: Path, progress: Any) -> dict[str, Any]:
    """A captioned grid of seeds 0, 1, … at the model's own settings; returns these settings."""
    samples = pipeline.sample(prompts, progress=progress)
    save_png(grid(samples.images, samples.prompts, columns=min(8, math.ceil(math.sqrt(len(prompts))))), path)
    return pipeline.settings()


def write_card(
    folder: Path, format: str, name: str, pipeline: Pipeline, facts: dict[str, Any], told: Told, dtype: str, prompts: list[str],
    drawn: dict[str, Any] | None, longest: int,
) -> None:  # fmt: skip
    """README.md. facts: of `training_facts`; drawn: settings of samples.png, None where there is none; longest: tokens of a caption that are read."""
    from huggingface_hub import ModelCardData

    description, config = pipeline.description, pipeline.config
    source = told.source or public_source(description)
    pixels = ", ".join(f"{width}×{height}" for width, height in description.sizes)
    data = ModelCardData(
        license=told.licence or "unknown",
        library_name=format,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "flow-matching", "flowt2i"],
        datasets=list(description.hub_sources) or None,
        language="en" if description.is_scenes else None,
    )
    example = min(prompts, key=len) if prompts else "a small red circle"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        f"Draws {pixels} pictures from captions: {facts['parameters'] / 1e6:.1f}M parameters, "
        f"trained {'on from another model' if config.origin else 'from scratch'} with flow matching by flowt2i.",
    ]
    if drawn:
        parts.append(
            f"![{len(prompts)} pictures under their captions](samples.png)\n\n*{_which(config, description.is_scenes)}, seeds 0 to {len(prompts) - 1}, "
            f"not picked. Drawn by {describe(drawn)}.*"
        )
    shown = {"name": name, "literal": json.dumps(example, ensure_ascii=False), "quoted": shlex.quote(example), "longest": longest, "encoder": ""}
    if format == "onnx":
        shown["encoder"] = _onnx_use(description.text.kind, description.codec.kind)
    parts += ["## Use", USE[format].format(**shown), "## Data", _data(pipeline, source, longest), "## Training", _training(pipeline, facts, dtype)]
    parts.append(f"```bash\n{training_command(config)}\n```")
    if format == "flowt2i":
        parts.append("Every setting is in `config.json`, which travels with the weights.")
    if scores := [*(_measured(told.measured) if told.measured else []), *filter(None, [_scores(facts["scores"])])]:
        parts += ["## Scores", *scores]
    parts += ["## Limits", _limits(pixels, description.is_scenes), "## Licence", _licence(pipeline, told.licence, source)]
    if told.notes.strip():
        parts.append(told.notes.strip())
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def _which(config: Config, scenes: bool) -> str:
    return "The prompts of the run's previews" if config.sample.prompts else "Captions of held-out pictures" + (" (of the built-in scenes)" if scenes else "")


def _data(pipeline: Pipeline, source: str, longest: int) -> str:
    description = pipeline.description
    what = "the scenes that flowt2i draws by itself: coloured shapes, their number, size and place" if description.is_scenes else source
    codec = "pixels, no image codec" if description.codec.kind == "pixels" else f"latents {description.codec.shape} of the VAE `{_net(description.codec.id)}`"
    text = "a text encoder trained along with the model" if description.text.kind == "builtin" else f"the frozen text encoder `{_net(description.text.id)}`"
    return (
        f"{description.train_count:,} captioned pictures for training and {description.heldout_count:,} held out, from {what}. "
        f"The flow runs on {codec}; captions are read by {text}, up to {longest} tokens."
    )


def _training(pipeline: Pipeline, facts: dict[str, Any], dtype: str) -> str:
    config = public_config(pipeline.config)
    model = config.model
    kind = re.sub(r"^cuda(:[0-9]+)?$", "CUDA GPU", facts["device"] or "").replace("cpu", "CPU")
    device = f"{facts['ranks'] or 1} × {kind}" if kind else ""
    rows = [
        ("began from", config.origin.told if config.origin else ""),
        ("trained", f"low-rank adapters of rank {config.train.lora}, merged here" if config.train.lora else ""),
        ("steps", _count(facts["step"])),
        ("images seen", _count(facts["images_seen"])),
        ("time in steps", (duration(facts["seconds"]) if facts["seconds"] else "") + (f" on {device}" if device else "")),
        ("batch", f"{config.data.batch_size}"),
        ("network", f"{model.block}, width {model.width}, depth {model.depth}, {model.heads} heads"),
        ("predicts", "velocity" if pipeline.model.config.target == "v" else "the clean picture"),
        ("optimizer", f"{config.optim.name}, learning rate {config.optim.lr:g}, {config.optim.schedule}"),
        ("compute", facts.get("precision") or ("fp32" if config.train.precision == "fp32" else "bf16")),
        ("seed", f"{config.train.seed}"),
        ("weights here", f"{pipeline.weights}, {dtype}{_averaged(facts['averaged'])}"),
        ("sampling", describe(pipeline.settings())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value.strip())
    return f"| | |\n|---|---|\n{table}"


def _averaged(others: list[str]) -> str:
    named = [f"`{other}`" + (f" ({count} times)" if count > 1 else "") for other, count in Counter(others).items()]
    return f"; the mean of this training's and those of {', '.join(named)}" if named else ""


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _measured(measured: Measured) -> list[str]:
    """A table of scores, intervals and numbers of pictures, the protocols, and where scores have many parts all of these, folded up."""
    protocols = dict.fromkeys(score.protocol for score in measured.scores)
    taken = f"Taken {measured.made} by `flowt2i evaluate` (flowt2i {measured.version}), with these protocols:" if measured.made else "Protocols:"
    said = taken + "\n\n" + "\n".join(f"- {protocol}" for protocol in protocols)
    if len(measured.scores) <= FEW:
        return [_table(measured.scores), said]
    firsts = list({score.group: score for score in reversed(measured.scores)}.values())[::-1]
    return [_table(firsts), said, f"<details><summary>All parts</summary>\n\n{_table(measured.scores)}\n\n</details>"]


def _table(scores: Sequence[Score]) -> str:
    rows = [f"| {s.name} | {s.shown()} | {s.interval()} | {'' if s.n is None else f'{s.n:,}'} |" for s in scores]
    return "\n".join(["| score | value | 95% interval | pictures |", "|---|---|---|---|", *rows])


def _scores(scores: dict[str, Any]) -> str:
    """A table of what the run's last evaluation says, under the names it uses, without the losses by time."""
    meaning = {
        "score": "share of pictures that show all their prompt says (training's own small check)",
        "validation/loss": "loss on held-out pictures, raw weights",
        "validation_ema/loss": "loss on held-out pictures, averaged weights",
    }
    names = sorted((name for name in scores if name != "step" and "/t0." not in name), key=lambda name: name.startswith("validation"))
    if not names or "step" not in scores:
        return ""
    rows = [f"| {name} | {scores[name]:.4g} | {meaning.get(name, '')} |" for name in names]
    return f"At step {scores['step']:,}, as the run recorded them:\n\n| score | value | |\n|---|---|---|\n" + "\n".join(rows)


def _limits(pixels: str, scenes: bool) -> str:
    nothing_else = (
        "It knows coloured shapes and nothing else." if scenes else "It knows what its training pictures show, and reads captions as theirs are written."
    )
    return f"{nothing_else} Pictures are {pixels} pixels. What it draws may resemble its training pictures, and carries over what is one-sided in them."


def _licence(pipeline: Pipeline, licence: str, source: str) -> str:
    description = pipeline.description
    stated = f"The weights are under `{licence}`." if licence else "No licence was stated for these weights: ask whoever trained them before you use them."
    data = (
        "The training pictures were drawn by flowt2i itself; nobody else has rights in them."
        if description.is_scenes
        else f"The training pictures ({source}) have terms of their own, which may bind models that learned from them."
    )
    nets = [_net(spec.id) for spec in (description.codec, description.text) if spec.kind in ("vae", "hf")]
    others = f" {' and '.join(f'`{net}`' for net in nets)} {'has its' if len(nets) == 1 else 'have their'} own licence." if nets else ""
    return f"{stated} {data}{others}"


def _onnx_use(text: str, codec: str) -> str:
    if text == "builtin" and codec == "pixels":
        return '`sample.py` draws pictures with onnxruntime, numpy and tokenizers alone:\n`python sample.py "a small red circle" picture.png`.'
    missing = ["`text` are the last hidden states of the text encoder named below, zero where padded"] if text == "hf" else []
    missing += ["latents times `latent_std` plus `latent_mean` go to the VAE's decoder"] if codec == "vae" else []
    return "Its text encoder is `text_encoder.onnx`. " * (text == "builtin") + "; ".join(missing).capitalize() + "."


def _net(id: str) -> str:
    """A hub id as it is, of a folder its name alone."""
    return Path(id).name if id.startswith(("/", ".", "~")) else id
