"""What a run says of its own training: for the model card, and kept in `export.json` so that an export can be exported again."""

import json
import shlex
from pathlib import Path
from typing import Any

from flowt2i import exported
from flowt2i.config import NOT_SECTIONS, PRESETS, Config, resolve
from flowt2i.description import DatasetDescription
from flowt2i.pipeline import Pipeline
from flowt2i.pretrained import looks_like_path
from flowt2i.training import checkpoint
from flowt2i.training.tracking import read_log

NO_SCORES = ("step", "images_seen", "eval_s")  # numbers of a line of eval.jsonl that say nothing of the model


def training_facts(model: Path, pipeline: Pipeline) -> dict[str, Any]:
    """Steps, images, seconds, device and scores of a checkpoint (its run's logs up to its step), or what an export says of them.

    `seconds` sums images over images a second of every logged step: evaluations and saves are not in it. None where there is no log.
    """
    parameters = sum(p.numel() for p in pipeline.model.parameters())
    mark = exported.read_mark(model)
    if mark:
        return mark.training.model_dump() | {"parameters": parameters}
    state = checkpoint.read_state(model)
    run = model.parent.parent
    resolved = _resolved(run / "config.json")
    return {
        "step": state["step"],
        "images_seen": state["images_seen"],
        "seconds": _seconds(read_log(run / "log.jsonl", state["step"])),
        "parameters": parameters,
        "device": resolved.get("device_name") or resolved.get("device"),
        "ranks": resolved.get("ranks"),
        "precision": resolved.get("precision"),
        "scores": _scores(read_log(run / "eval.jsonl", state["step"])),
        "averaged": [],
    }


def public_source(description: DatasetDescription) -> str:
    """Where the data came from: scenes and datasets on the hub by name, all else as "local files": what it is called is nobody's business."""
    if description.is_scenes:
        return description.source
    told = [*description.hub_sources, *(["scenes"] if "scenes" in description.source.split(", ") else [])]
    return ", ".join(told if set(description.source.split(", ")) <= set(told) else [*told, "local files"])


def public_config(config: Config) -> Config:
    """The configuration, in which a model it was grown from bears its name alone: where it lies on this machine is nobody's business."""
    if config.origin is None or not looks_like_path(config.origin.model):
        return config
    return config.model_copy(update={"origin": config.origin.model_copy(update={"model": Path(config.origin.model).resolve().name})})


def training_command(config: Config) -> str:
    """The command that trains like this: the preset, and every setting in which the run differs from it. The data stand as DATA.

    A configuration of no preset is named as the config.json that travels with the model.
    """
    words = ["flowt2i", "train"]
    if config.origin:
        words += ["--init", public_config(config).origin.model]  # type: ignore[union-attr]
    if config.preset not in PRESETS:
        return shlex.join([*words, "--config", "config.json", "--data", "DATA"])
    base = resolve(config.preset)
    words += ["--config", config.preset, "--data", "DATA"]
    taken_over = ("model", "sample") if config.origin else ()  # from the model it began from; what flow it took over is named, for it may have been changed
    for section in (name for name in type(config).model_fields if name not in (*NOT_SECTIONS, *taken_over, "track")):
        ours, theirs = getattr(config, section), getattr(base, section)
        for field in type(ours).model_fields:
            value = getattr(ours, field)
            usual = getattr(theirs, field)
            if (section, field) == ("train", "minutes") and config.train.steps != base.train.steps:
                usual = 0.0  # a number of steps turns the time off
            if value != usual:
                words += [f"--{section}.{field}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def euler_steps(settings: dict[str, Any]) -> int:
    """Steps for programs that know Euler's method on even (or shifted) times only: the model's own where it draws so, else 50, for the others need fewer."""
    return settings["steps"] if settings["solver"] == "euler" and settings["schedule"] == "uniform" else 50


def _resolved(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()).get("resolved", {})
    except (OSError, ValueError, AttributeError):
        return {}


def _seconds(lines: list[dict[str, Any]]) -> float | None:
    seconds, before = 0.0, 0
    for line in lines:
        if line.get("images_per_s"):
            seconds += (line["images_seen"] - before) / line["images_per_s"]
            before = line["images_seen"]
    return round(seconds, 1) if seconds else None


def _scores(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest evaluation: its step, and every number under its name, nested ones as `a/b`."""
    if not lines:
        return {}
    step = max(line["step"] for line in lines)
    scores: dict[str, Any] = {"step": step}
    for line in (line for line in lines if line["step"] == step):
        for name, value in line.items():
            inner = {f"{name}/{key}": number for key, number in value.items()} if isinstance(value, dict) else {name: value}
            scores |= {key: number for key, number in inner.items() if isinstance(number, int | float) and key not in NO_SCORES}
    return scores
