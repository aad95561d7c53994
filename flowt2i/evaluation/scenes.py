"""Prompt-following on the built-in scenes: what share of pictures shows what the prompt says, by an exact checker."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from flowt2i.data import scenes, scenes_check
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation.metrics import Context, Scores
from flowt2i.pipeline import Pipeline
from flowt2i.settings import describe

FIRST_SEED = 1_000_000  # of the noise: picture k has seed FIRST_SEED + k
ATOMS = ("shape", "colour", "size", "count", "relation", "background")


def metric(context: Context) -> Scores:
    """`evaluate --metrics scenes`: --seed is that of the prompts, and picture k has the noise of seed `FIRST_SEED + k` in any case."""
    pipeline = context.need_pipeline("scenes")
    if context.data and not DatasetDescription.load(context.data).is_scenes:
        raise UserError(f"the scenes score is for the built-in data, and {context.data} is not: leave out --data, or prepare `scenes`")
    if not pipeline.description.is_scenes:
        raise UserError("the scenes score asks for shapes and colours, but this model was trained on other data: take --metrics kid")
    prompts = scenes.prompts(context.seed, context.num, heldout=context.heldout_pairs)
    found = score_images(context.images(prompts, seed=0), prompts)
    kind = "heldout-pairs" if context.heldout_pairs else "prompts"
    title = f"scenes-{kind}-{context.num}@{pipeline.description.codec.image_size}"
    protocol = f"{title}, {describe(pipeline.settings(**context.settings))}, prompt seed {context.seed}, {pipeline.weights} weights"
    lines = [f"{part:14s} {score['accuracy']:6.1%}   [{score['low']:.1%}, {score['high']:.1%}]   n={score['n']}" for part, score in found.items()]
    values = {f"{title}/{part}": score["accuracy"] for part, score in found.items()}
    return Scores(values, protocol, lines, {"intervals": {f"{title}/{part}": score for part, score in found.items()}})


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson 1927, eq. 4)."""
    if not total:
        return 0.0, 1.0
    p, n = hits / total, total
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def tally(hits: int, total: int) -> dict[str, Any]:
    low, high = wilson(hits, total)
    return {"accuracy": hits / total if total else 0.0, "low": low, "high": high, "n": total}


def score_pipeline(pipeline: Pipeline, count: int, *, seed: int = 0, heldout: bool = False, progress: bool = False, **settings: Any) -> dict[str, Any]:
    """Accuracy with Wilson's interval over `count` prompts: "all" (every atom right), each atom, and by kind of prompt.

    Prompts are drawn from `scenes.prompts(seed, count, heldout)`; image k has seed `FIRST_SEED + k`. Settings as in `Pipeline.sample`.
    """
    prompts = scenes.prompts(seed, count, heldout=heldout)
    with tqdm(total=count, desc="drawing", unit="image", disable=not progress, leave=False) as bar:
        samples = pipeline.sample(prompts, seed=FIRST_SEED, progress=bar.update, **settings)
    return score_images(samples.images, prompts)


def score_images(images: Iterable[np.ndarray], prompts: Sequence[str]) -> dict[str, Any]:
    """The same of pictures that are drawn: images uint8 [H, W, 3], one a prompt."""
    hits: dict[str, list[bool]] = {}
    for image, prompt in zip(images, prompts):
        result = scenes_check.check(image, prompt)
        hits.setdefault("all", []).append(bool(result.all))
        hits.setdefault(kind(prompt), []).append(bool(result.all))
        for atom in ATOMS:
            value = getattr(result, atom)
            if value is not None:
                hits.setdefault(atom, []).append(bool(value))
    return {name: tally(sum(values), len(values)) for name, values in hits.items()}


def kind(prompt: str) -> str:
    """`one_object`, `several_alike`, or `two_objects` (with a relation)."""
    scene = scenes.parse(prompt)
    if len(scene.things) > 1:
        return "two_objects"
    return "one_object" if scene.things[0].count == 1 else "several_alike"
