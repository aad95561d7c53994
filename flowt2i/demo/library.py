"""The models a demo offers: named for visitors, described without loading them, loaded when first asked for."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flowt2i import hub
from flowt2i.config import Config, load_config
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.pipeline import Pipeline
from flowt2i.shapes import name as shape_name
from flowt2i.training import checkpoint

ROOTS = (Path("runs"), Path("models"))  # where trainings and exported models are looked for
KEPT = 3  # models in memory at once: two that are compared and one more


@dataclass(frozen=True)
class Card:
    """What the page says of a model before it is loaded."""

    path: Path
    config: Config
    description: DatasetDescription
    parameters: int

    @property
    def prompts(self) -> list[str]:
        """Prompts that fit what the model was trained on."""
        if self.description.is_scenes:
            from flowt2i.data.scenes import curated_prompts

            return curated_prompts()
        return list(self.description.prompts) or ["a picture"]

    @property
    def shapes(self) -> list[str]:
        """The shapes that it was trained at, the one that it draws of its own first."""
        return [shape_name(size) for size in sorted(self.description.sizes, key=lambda size: size != self.description.home)]

    @property
    def facts(self) -> str:
        millions = self.parameters / 1e6
        others = f" and {len(self.shapes) - 1} other shapes" if len(self.shapes) > 1 else ""
        return f"{millions:.{0 if millions >= 9.95 else 1}f}M parameters, {self.shapes[0].replace('x', '×')} pixels{others}"


def weights_folder(path: Path) -> Path | None:
    """The folder of weights a path stands for, by a look at names only: itself, or the newest checkpoint of a run. None where it is no model."""
    if (path / "config.json").is_file() and weights_files(path):
        return path
    steps = checkpoint.list_steps(path)
    return checkpoint.folder(path, steps[-1]) if steps else None


def weights_files(folder: Path) -> list[Path]:
    """The files of the weights that are drawn with: EMA where there is one; several where a large model was exported in pieces."""
    return sorted(folder.glob("ema*.safetensors")) or sorted(folder.glob("model*.safetensors"))


def found(roots: Iterable[Path] = ROOTS) -> list[Path]:
    """Runs with a checkpoint and exported models under some folders, the newest first."""
    dated = [(folder.stat().st_mtime, path) for root in roots if root.is_dir() for path in root.iterdir() if (folder := weights_folder(path))]
    return [path for _, path in sorted(dated, reverse=True)]


def describe(path: Path) -> Card:
    """The card of a model; UserError where the folder is not one of ours."""
    folder = weights_folder(path)
    if folder is None:
        folder = checkpoint.find(path)  # says what is the matter with it
    count = 0
    for file in weights_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
    return Card(path, load_config(folder / "config.json"), DatasetDescription.load(folder), count)


class Library:
    """Models by name. The names are all a visitor can send: no path ever comes over the net."""

    def __init__(self, chosen: Sequence[Path] = (), others: Sequence[Path] = (), **options: Any):
        """chosen: must be models (UserError otherwise), the first is served at first, hub ids too; others: passed over where they are not.

        options: as `Pipeline.from_pretrained`.
        """
        self.options = options
        self.cards: dict[str, Card] = {}
        self._loaded: OrderedDict[str, tuple[Path | None, Pipeline]] = OrderedDict()
        known = set()
        for path in chosen:
            folder = hub.local(path)  # itself, of a packaged model, or in the cache
            known.add(folder.resolve())
            self._add(path, describe(folder))
        for path in others:
            if path.resolve() in known:
                continue
            try:
                self._add(path, describe(path))
            except UserError:  # not one of ours, or of another version
                continue
        if not self.cards:
            raise UserError("no model to serve: train one with `make quickstart`, or give --model PATH (a run folder, a checkpoint or an exported model)")

    def _add(self, path: Path, card: Card) -> None:
        name = base = path.resolve().name
        number = 2
        while name in self.cards:
            name, number = f"{base} ({number})", number + 1
        self.cards[name] = card

    @property
    def names(self) -> list[str]:
        return list(self.cards)

    @property
    def first(self) -> str:
        return next(iter(self.cards))

    def card(self, name: Any) -> Card:
        """The card of a name that came over the net; UserError where there is none."""
        if not isinstance(name, str) or name not in self.cards:
            raise UserError("This model is not offered here: choose one of the list.")
        return self.cards[name]

    def load(self, name: str) -> Pipeline:
        """The pipeline of a model, the newest checkpoint of a run that is still training. One caller at a time."""
        card = self.card(name)
        folder = weights_folder(card.path)
        if name in self._loaded and self._loaded[name][0] == folder:
            self._loaded.move_to_end(name)
            return self._loaded[name][1]
        self._loaded.pop(name, None)
        while len(self._loaded) >= KEPT:
            self._loaded.popitem(last=False)
        pipeline = Pipeline.from_pretrained(card.path, **self.options)
        self._loaded[name] = folder, pipeline
        return pipeline
