"""What an exported folder says of itself, as far as loading it goes (`flowt2i/export/` writes them)."""

import json
from pathlib import Path

from flowt2i.errors import UserError

MARK = "export.json"  # format, kind of weights, facts of the training
VAE, ENCODER = "vae", "text_encoder"  # folders in which a model takes its nets along


def format_of(folder: Path) -> str:
    """ "flowt2i", "diffusers" or "onnx" of an exported folder; "" for any other. UserError where its mark cannot be read."""
    return _entry(folder, "format") if (folder / MARK).exists() else ""


def weights_file(folder: Path, wanted: str) -> tuple[str, str]:
    """Stem and kind ("ema" or "raw") of the weights to load: a checkpoint holds both, an exported model one of them.

    wanted: "ema", "raw", or "auto" (EMA where there is one). UserError where they are not there.
    """
    stems = {_entry(folder, "weights"): "model"} if (folder / MARK).exists() else {"ema": "ema", "raw": "model"}
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
    try:
        if (folder / MARK).exists():
            step = json.loads((folder / MARK).read_text())["training"]["step"]
        else:
            step = json.loads((folder / "state.json").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # that a picture can be told from others is no reason to refuse the model
        return None
    return step if type(step) is int else None


def _entry(folder: Path, name: str) -> str:
    try:
        return str(json.loads((folder / MARK).read_text())[name])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / MARK} cannot be read: copy or fetch the exported folder again") from error
