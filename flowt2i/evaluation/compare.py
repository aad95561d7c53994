"""Two models side by side: the same prompts, for each the same noise, and intervals of the difference that make use of the pairing.

A model's luck with a prompt, hard or easy, is shared by both, so the difference is known far better than two separate intervals suggest. Shares: Newcombe's
paired interval and the exact McNemar test; means: the normal interval of the mean of the differences (see `intervals`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowt2i.errors import UserError
from flowt2i.evaluation.clip import Clip, score_each
from flowt2i.evaluation.intervals import by_group, mean_interval, paired_difference
from flowt2i.evaluation.scenes import totals, verdicts
from flowt2i.pipeline import Pipeline
from flowt2i.training.distributed import World

METHOD = (
    "Intervals of the difference: for shares Newcombe's hybrid score interval for paired shares (1998, method 10), for means the normal interval of the mean "
    "difference; p is the exact McNemar test. A CLIP's cases are captions: of one that is asked for more than once its pictures' mean. "
    "Several rows are looked at: take the first as the result, the rest as where to look next."
)


def check_comparable(a: Pipeline, b: Pipeline) -> None:
    """UserError where the same prompts cannot be asked of both, or their pictures not be laid side by side."""
    if a.description.is_scenes != b.description.is_scenes:
        scenes, other = (a, b) if a.description.is_scenes else (b, a)
        raise UserError(f"{scenes.name} was trained on the built-in scenes and {other.name} on other data: no prompts are fair to both")
    sizes = [pipeline.description.codec.image_size for pipeline in (a, b)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{a.name} draws {sizes[0]} pixels and {b.name} {sizes[1]}: compare models of one size")


def of_scenes(first: Sequence[np.ndarray], second: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, Any]:
    """{name of a share: {a, b, share, difference}} of the pictures of two models, by the exact checker."""
    found = verdicts(first, prompts), verdicts(second, prompts)
    names = [name for name in totals(found[0]) if not name.endswith("_shown")]  # these depend on the pictures, so they are not paired
    rows = {}
    for name in names:
        rows[name] = of_shares(*([holds[name] for holds in one if name in holds] for one in found))
    return rows


def of_clip(net: Clip, first: np.ndarray, second: np.ndarray, prompts: Sequence[str], world: World | None = None) -> dict[str, Any]:
    """The same by a CLIP: its score, and retrieval of the right caption. Cases are captions: pictures of one caption are averaged before they are compared."""
    found = [score_each(net, images, prompts, world) for images in (first, second)]
    rows = {f"clip score ({net.name})": of_means(*(by_group(scores, prompts) for scores, _ in found))}
    if found[0][1]:
        repeated = len(set(prompts)) < len(prompts)
        shares = [by_group(hits, prompts) for _, hits in found]
        rows["retrieval"] = of_means(*shares) | {"share": True} if repeated else of_shares(found[0][1], found[1][1])
    return rows


def of_shares(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Two shares over the same cases."""
    return {"a": float(np.mean(first)), "b": float(np.mean(second)), "share": True, "difference": paired_difference(first, second)}


def of_means(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Two means over the same cases."""
    spread = mean_interval(np.asarray(second, np.float64) - np.asarray(first, np.float64))
    difference = {"difference": spread["mean"], "low": spread["low"], "high": spread["high"], "n": spread["n"]}
    return {"a": float(np.mean(first)), "b": float(np.mean(second)), "share": False, "difference": difference}
