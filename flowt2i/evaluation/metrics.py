"""The table of scores, and what a score is made from. A new one is a function `score(context) -> Scores` in a file of its own, and a line in `METRICS`.

What such a file can refuse without any work it refuses in `check(context, name)`: all checks come before the first score.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError, nearest
from flowt2i.evaluation import pictures, reference
from flowt2i.evaluation.nets import FeatureNet, load_net
from flowt2i.pipeline import Pipeline
from flowt2i.settings import describe
from flowt2i.shapes import Shape
from flowt2i.training.distributed import World

METRICS = {  # name: module and function
    "scenes": "flowt2i.evaluation.scenes:metric",
    "scenes-heldout": "flowt2i.evaluation.scenes:heldout_metric",
    "scenes-counts": "flowt2i.evaluation.scenes:counts_metric",
    "scenes-relations": "flowt2i.evaluation.scenes:relations_metric",
    "fid": "flowt2i.evaluation.distribution:fid",
    "frechet": "flowt2i.evaluation.distribution:frechet",
    "kid": "flowt2i.evaluation.distribution:kid",
    "loss": "flowt2i.evaluation.loss:metric",
    "clip": "flowt2i.evaluation.clip:metric",
    "memorisation": "flowt2i.evaluation.memorisation:metric",
}


class Skipped(UserError):
    """A score that cannot be had of these samples; the others can. The message says why and what to do."""


@dataclass
class Scores:
    """What a metric found."""

    values: dict[str, float]  # full name, `what-n@pixels[/part]` -> number
    protocol: str  # one line: all that has to be equal for two numbers to be comparable
    lines: list[str]  # the same for people, without the protocol
    details: dict[str, dict[str, Any]] = field(default_factory=dict)  # more for programs, such as {"intervals": {name: …}}
    pictures: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)  # pairs that the report shows


@dataclass
class Context:
    """What there is to score: a model's pictures, or a folder of pictures (`folder`), against data."""

    world: World
    num: int  # pictures
    pipeline: Pipeline | None = None
    data: Path | None = None  # prepared dataset
    folder: Path | None = None  # of finished pictures
    given_num: int = 0  # --num, where it was given: the loss has another number of its own
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # of `Pipeline.sample`: steps, solver, guidance, shift
    net_name: str = "efficientnet-lite0"
    net_weights: Path | None = None
    clip_name: str = ""  # CLIP of the clip score: id or folder
    real: str = "heldout"  # heldout, train, a folder of images, or a finished reference
    heldout_pairs: bool = False  # scenes: ask for pairs that training never showed
    run: Path | None = None  # pictures are kept under it
    source: Path | None = None  # where the model was loaded from
    progress: bool = True
    nets: dict[str, FeatureNet] = field(default_factory=dict)
    _features: dict[str, torch.Tensor] = field(default_factory=dict)
    _references: dict[str, reference.Reference] = field(default_factory=dict)
    _images: dict[str, np.ndarray] = field(default_factory=dict)  # the ones drawn last

    def need_pipeline(self, metric: str) -> Pipeline:
        if self.pipeline is None:
            raise UserError(f"the {metric} score needs a model: give --model instead of --images")
        return self.pipeline

    def need_data(self, metric: str) -> Path:
        if self.data is None:
            raise UserError(f"the {metric} score needs the dataset: give --data DIR")
        return self.data

    def net(self, name: str | None = None) -> FeatureNet:
        """A feature net, loaded once."""
        name = name or self.net_name
        if name not in self.nets:
            self.nets[name] = load_net(name, self.world.device, self.net_weights if name == "inception" else None)
        return self.nets[name]

    def reference_of(self, name: str | None = None) -> reference.Reference:
        """Features of real pictures by a net, made once."""
        net = self.net(name)
        if net.name not in self._references:
            found = reference.get(self.real, net, self.resolution, self.data, self.world, self.progress, self.pipeline)
            self._references[net.name] = found
        return self._references[net.name]

    @property
    def resolution(self) -> int:
        """Side of the pictures that are scored."""
        return int(self.finished.shape[1]) if self.pipeline is None else self.pipeline.description.codec.image_size

    @cached_property
    def finished(self) -> np.ndarray:
        """Pictures of the folder, uint8 [N, S, S, 3], the first `num`."""
        if self.folder is None:
            raise UserError("nothing to score: give --model or --images")
        return pictures.read_folder(self.folder, self.num, self.progress and self.world.main)

    @cached_property
    def captions(self) -> ImageTextDataset:
        """The held-out images, whose captions are asked for; all where none is held out."""
        data = self.need_data("distribution")
        return ImageTextDataset(data, "heldout" if DatasetDescription.load(data).heldout_count else "train")

    @cached_property
    def prompts(self) -> list[str]:
        """Captions of the held-out images (of all, where none is held out), in `reference.captioned`'s order, over again where there are too few."""
        captions = self.captions.captions()
        return [captions[row] for row in self.rows]

    @cached_property
    def rows(self) -> np.ndarray:
        """Which of the captions' pictures these are. int64 [num]."""
        rows = reference.captioned(self.captions.captions())
        if not len(rows):
            raise UserError(f"the {self.captions.split} split of {self.data} has no captions to draw: prepare data with captions")
        return rows[np.arange(self.num) % len(rows)]

    @property
    def count(self) -> int:
        """Number of pictures that are scored."""
        return len(self.finished) if self.pipeline is None else self.num

    def images(
        self, prompts: Sequence[str] | None = None, seed: int | None = None, settings: dict[str, Any] | None = None, sizes: list[Shape] | None = None
    ) -> np.ndarray:  # fmt: skip
        """Pictures uint8 [N, S, S, 3], on every rank: of the folder, or drawn from `self.prompts` (or others, or with other seed and settings).

        sizes: (width, height) of each, None: the model's own. `self.prompts` are drawn in the shapes of their own pictures. Picture k has seed
        (seed + 1) * 1,000,000 + k. They are drawn once, over all ranks, and kept under RUN/evaluation/.
        """
        if self.pipeline is None:
            return self.finished
        asked, seed, settings = list(prompts or self.prompts), self.seed if seed is None else seed, self.settings | (settings or {})
        sizes = reference.sizes_of(self.captions, self.rows) if prompts is None else sizes
        key = json.dumps([asked, seed, settings, sizes])
        if key not in self._images:
            self._images = {key: pictures.Drawing(self.pipeline, asked, seed, settings, sizes).images(self.world, self.run, self.progress)}
        return self._images[key]

    def features(self, name: str | None = None) -> torch.Tensor:
        """Features float32 [N, dim] of `images()` by a net, on every rank."""
        net = self.net(name)
        if net.name not in self._features:
            self._features[net.name] = pictures.features(net, self.images(), self.world, self.progress, f"features of {self.count} pictures")
        return self._features[net.name]

    @cached_property
    def asked(self) -> str:
        """Which captions `prompts` are."""
        shapes = ", each in the shape of its own picture, squeezed to a square" if self.captions.description.buckets else ""
        return f"{self.captions.split} captions of data {reference.data_hash(self.captions)[:8]} in mixed order{shapes}"

    @cached_property
    def how(self) -> str:
        """The settings that the model draws with, in words; a weaker model that guides it has its weights named."""
        pipeline = self.need_pipeline("distribution")
        settings, guide = pipeline.settings(**self.settings), pipeline._guide(self.settings.get("guide"))
        if guide is not None:
            settings["guide"] = f"{Path(str(settings['guide'])).name}@{pictures.weights_hash(guide)[:8]}"
        return describe(settings)

    def protocol(self, seed: str = "") -> str:
        """How the pictures came about. seed: what is said of it, where `seed` is not that of the noise."""
        if self.pipeline is None:
            return f"pictures of {self.folder}"
        return f"{self.how}, {seed or f'seed {self.seed}'}, {self.pipeline.weights} weights"


def find(name: str) -> Callable[[Context], Scores]:
    """The function of a metric; UserError for an unknown name."""
    if name not in METRICS:
        raise UserError(f"no metric {name!r}{nearest(name, METRICS)}")
    module, _, function = METRICS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def check(name: str, context: Context) -> None:
    """What a metric can say before any work: its module's `check(context, name)`, where it has one."""
    module = importlib.import_module(METRICS[name].partition(":")[0])
    if hasattr(module, "check"):
        module.check(context, name)


@dataclass
class Outcome:
    """Scores of the metrics that were asked for; why others were left out; and what ended the last one, the scores before it standing."""

    found: dict[str, Scores]
    skipped: dict[str, str]
    failure: Exception | None = None


def score(names: Sequence[str], context: Context) -> Outcome:
    """Each metric's scores. Mistakes that show before the work are said before it. UserError where no score is left."""
    metrics = {name: find(name) for name in dict.fromkeys(names)}
    outcome = Outcome({}, {})
    for work in (lambda name: check(name, context), lambda name: outcome.found.update({name: metrics[name](context)})):
        for name in metrics:
            if name in outcome.skipped:
                continue
            try:
                work(name)
            except Skipped as error:
                outcome.skipped[name] = str(error)
            except Exception as error:
                if not outcome.found:
                    raise
                outcome.failure = error
                return outcome
    if not outcome.found:
        raise UserError(next(iter(outcome.skipped.values())))
    return outcome
