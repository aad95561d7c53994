"""Pictures and how they came about: what `Pipeline.sample` gives, and the PNG text that tells it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowt2i import __version__
from flowt2i.editing import Picture
from flowt2i.errors import UserError
from flowt2i.files import whole


@dataclass
class Samples:
    """Pictures and how they came about."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    prompts: list[str]  # [N]
    seeds: list[int]  # [N]
    settings: dict[str, Any]  # all of `SampleConfig` that decides about a picture, and what it was led away from or started at
    evaluations: int  # network evaluations a picture took, counted as they were made, guidance's included (a mean, where pictures differ)
    seconds: float
    between: list[dict[str, Any]] = field(default_factory=list)  # [N] or empty: "to", "to_seed" and "mix" of pictures between two prompts or seeds
    model: dict[str, Any] = field(default_factory=dict)  # its name, and which weights

    def pictures(self) -> list[Image.Image]:
        """PIL images whose `info["flowt2i"]` says how to make them again (`Pipeline.redraw`)."""
        pictures = []
        for i, image in enumerate(self.images):
            picture = Image.fromarray(image)
            own = {"prompt": self.prompts[i], "seed": self.seeds[i], **(self.between[i] if self.between else {})}
            picture.info["flowt2i"] = json.dumps({**own, **self.settings, **self.model, "version": __version__})
            pictures.append(picture)
        return pictures


_TEXTS = ("prompt", "to", "solver", "schedule", "guidance_rule", "negative", "guide", "init", "mask", "init_pixels", "mask_pixels",
          "model", "weights", "version")  # fmt: skip
_INTEGERS = ("seed", "to_seed", "steps", "step", "width", "height")
_NUMBERS = ("mix", "shift", "tolerance", "guidance", "guidance_rescale", "guidance_from", "guidance_until", "analogy", "analogy_until",
            "style_contrast", "style_contrast_until", "zero_init", "strength")  # fmt: skip


def checked(told: dict[str, Any]) -> dict[str, Any]:
    """What a picture tells of itself, each value of its type. UserError where it tells anything else: a PNG may come from anyone."""
    if "prompt" not in told:
        raise UserError("these are the settings of a sheet, not of a picture: give one of the pictures on it")
    kinds: dict[str, tuple[type, ...]] = dict.fromkeys(_TEXTS, (str,)) | dict.fromkeys(_INTEGERS, (int,)) | dict.fromkeys(_NUMBERS, (int, float))
    for name, value in told.items():
        if name not in kinds:
            raise UserError(f"the picture tells a setting {str(name)[:50]!r}, which this version does not know: it was not written by this flowt2i")
        too_large = isinstance(value, int) and name in _NUMBERS and abs(value) > 1e300  # for a float
        if isinstance(value, bool) or not isinstance(value, kinds[name]) or too_large:
            raise UserError(f"the picture's setting {name} is {str(value)[:50]!r}, which it cannot be: it was not written by flowt2i")
    return {name: float(value) if name in _NUMBERS else value for name, value in told.items()}


def save_png(picture: Image.Image, path: Path | IO[bytes]) -> None:
    """Save a picture with the settings in its `info` as PNG text, to a path or an open file."""
    text = PngInfo()
    text.add_text("flowt2i", str(picture.info.get("flowt2i", "")))
    if not isinstance(path, Path):
        picture.save(path, "PNG", pnginfo=text)
        return
    with whole(path) as aside:
        picture.save(aside, "PNG", pnginfo=text)


def read_settings(picture: Picture) -> dict[str, Any]:
    """The settings that a PNG of ours tells. UserError where it is none."""
    try:
        if isinstance(picture, Image.Image):
            text = picture.info.get("flowt2i", "")
        else:
            with Image.open(picture, formats=["PNG"]) as image:
                text = image.info.get("flowt2i", "")
        told = json.loads(text)
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError, Image.DecompressionBombError) as error:
        told = error
    if not isinstance(told, dict):
        raise UserError(f"{str(picture)[:200]} is not a PNG that tells its settings: give one that `flowt2i generate` wrote")
    return told


def name_of(thing: Any) -> str:
    """A file's path, or what a picture or pipeline in memory is called; "" where there is none."""
    if isinstance(thing, str | Path):
        return str(thing)
    return str(getattr(thing, "filename", "") or getattr(thing, "name", "") or "")
