"""Prompt following on the built-in scenes: what share of pictures shows what the prompt says, by an exact checker, with Wilson's intervals.

A concept is one thing that a prompt says: a shape, a colour, a size, a number above one, a relation, a background. "a red star" has two, "a small red
star left of a large blue ring on a white background" eight; the share of pictures that show all of k concepts falls with k (as in ConceptMix,
Wu et al. 2024, whose k counts what is said beyond the object).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flowt2i.data import scenes, scenes_check
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation.intervals import tally, wilson
from flowt2i.evaluation.metrics import Context, Scores

__all__ = ["ATOMS", "FIRST_SEED", "PUBLISHED", "concepts", "kind", "metric", "score_images", "tally", "totals", "verdicts", "wilson"]

FIRST_SEED = 1_000_000  # of the noise: picture k has seed FIRST_SEED + k
PUBLISHED = 2_000  # prompts of a score that is published: its 95% interval is at most 4.4 points wide
ATOMS = ("shape", "colour", "size", "count", "relation", "background")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def check(context: Context, name: str) -> None:
    """UserError where there is no model (for the score `name`), or model or data are not of scenes."""
    pipeline = context.need_pipeline(name)
    if context.data and not DatasetDescription.load(context.data).is_scenes:
        raise UserError(f"the scenes score is for the built-in data, and {context.data} is not: leave out --data, or prepare `scenes`")
    if not pipeline.description.is_scenes:
        raise UserError("the scenes score asks for shapes and colours, but this model was trained on other data: take --metrics kid")


def metric(context: Context) -> Scores:
    """`scenes`: prompts whose pairs of colour and shape were in training (or, with `context.heldout_pairs`, were not)."""
    return heldout_metric(context) if context.heldout_pairs else _asked(context, "prompts", scenes.prompts(context.seed, context.num))


def heldout_metric(context: Context) -> Scores:
    """`scenes-heldout`: each prompt names a pair of colour and shape that training never showed."""
    return _asked(context, "heldout-pairs", scenes.prompts(context.seed, context.num, heldout=True))


def counts_metric(context: Context) -> Scores:
    """`scenes-counts`: each prompt asks for two, three or four alike."""
    return _asked(context, "counts", prompts_of_kind("several_alike", context.seed, context.num))


def relations_metric(context: Context) -> Scores:
    """`scenes-relations`: each prompt asks for two objects in a relation."""
    return _asked(context, "relations", prompts_of_kind("two_objects", context.seed, context.num))


def prompts_of_kind(which: str, seed: int, count: int) -> list[str]:
    """The first `count` prompts of a kind (see `kind`) in the endless row of a seed."""
    found: list[str] = []
    looked = count
    while len(found) < count:
        looked *= 2
        found = [prompt for prompt in scenes.prompts(seed, looked) if kind(prompt) == which]
    return found[:count]


def _asked(context: Context, which: str, prompts: list[str]) -> Scores:
    """--seed is that of the prompts; picture k has the noise of seed `FIRST_SEED + k` in any case."""
    pipeline = context.need_pipeline("scenes")
    found = score_images(context.images(prompts, seed=0), prompts)
    title = f"scenes-{which}-{context.num}@{pipeline.description.codec.image_size}"
    protocol = f"{title}, {context.protocol(f'prompt seed {context.seed}')}"
    lines = [f"{part:22s} {score['accuracy']:6.1%}   [{score['low']:.1%}, {score['high']:.1%}]   n={score['n']}" for part, score in found.items()]
    values = {f"{title}/{part}": score["accuracy"] for part, score in found.items()}
    return Scores(values, protocol, lines, {"intervals": {f"{title}/{part}": score for part, score in found.items()}})


def score_images(images: Iterable[np.ndarray], prompts: Sequence[str]) -> dict[str, Any]:
    """Shares with their intervals: of everything right, each atom, each kind of prompt and number of concepts. images uint8 [H, W, 3], one a prompt."""
    return totals(verdicts(images, prompts))


def verdicts(images: Iterable[np.ndarray], prompts: Sequence[str]) -> list[dict[str, bool]]:
    """What holds of each picture, by the name of the share that it counts in; a name is absent where the prompt does not ask for it.

    `relation_swapped`: the opposite of the asked relation holds. A model that knows that two things are to be there, but not which is where, shows both
    alike often: `relation` well above `relation_swapped` is knowledge. `relation_shown` and `relation_swapped_shown`: the same among the pictures that
    show both things with the asked shapes and colours.
    """
    found = []
    for image, prompt in zip(images, prompts):
        scene = scenes.parse(prompt)
        result = scenes_check.check(image, scene)
        holds = {"all": result.all, kind(scene): result.all, f"concepts_{concepts(scene)}": result.all}
        holds |= {atom: value for atom, value in result.atoms().items() if value is not None}
        if scene.relation:
            holds["relation_swapped"] = bool(scenes_check.check(image, replace(scene, relation=OPPOSITE[scene.relation])).relation)
            if result.shape and result.colour:
                holds |= {"relation_shown": holds["relation"], "relation_swapped_shown": holds["relation_swapped"]}
        found.append({name: bool(value) for name, value in holds.items()})
    return found


def totals(found: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """Shares with their intervals (see `intervals.tally`), in the order in which they are best read."""
    names = {name for holds in found for name in holds}
    order = ["all", "one_object", "several_alike", "two_objects", *sorted(n for n in names if n.startswith("concepts_")), *ATOMS]
    order += ["relation_swapped", "relation_shown", "relation_swapped_shown"]
    values = {name: [holds[name] for holds in found if name in holds] for name in order if name in names}
    return {name: tally(sum(hits), len(hits)) for name, hits in values.items()}


def kind(asked: str | scenes.Scene) -> str:
    """`one_object`, `several_alike`, or `two_objects` (with a relation)."""
    scene = scenes.parse(asked) if isinstance(asked, str) else asked
    if len(scene.things) > 1:
        return "two_objects"
    return "one_object" if scene.things[0].count == 1 else "several_alike"


def concepts(asked: str | scenes.Scene) -> int:
    """How many things a prompt says: 2 ("a red star") to 8."""
    scene = scenes.parse(asked) if isinstance(asked, str) else asked
    of_things = sum(2 + (thing.size is not None) + (thing.count > 1) for thing in scene.things)
    return of_things + (scene.relation is not None) + (scene.background is not None)
