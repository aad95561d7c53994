"""Does a model repeat its training pictures? The nearest training picture of every sample, held against how near real pictures lie that were never trained on.

A distance by itself says nothing: of two pictures of a star on white, both real, one may all but cover the other. So the near-copy distance is measured: the
1st percentile of the distances from held-out pictures to their nearest training picture. By definition one held-out picture in a hundred lies within it; a
model that samples what it learned should do the same, one that copies lies within it far more often. (Near pictures of real data as the yardstick: as in
Somepalli et al. 2212.03860, who hold nearest samples against nearest training pictures of training pictures.) Copying is said where the interval of the share
lies wholly above that of the held-out pictures, and nowhere else.

Beside it stands, without a verdict, z of Meehan, Chaudhuri and Dasgupta 2004.05675 over one cell: Mann and Whitney's U that samples lie farther from the
training set than held-out pictures do. They call a model under -3 copying, but blur does the same: in the middle of the data everything is near. Held-out
scenes blurred by 8 pixels have z = -11, flat colours -18 (and no near copies), as far down as copies have it.

Ask with held-out captions: then samples and held-out pictures show things of one kind. Training captions show whether a caption calls its own picture back, but
a good model, too, is nearer to the training set there.

The training set is read once, in chunks that are dealt out to the ranks; of each only features are made, and only the nearest is kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation.intervals import tally
from flowt2i.evaluation.metrics import Context, Scores, Skipped
from flowt2i.evaluation.nets import EFFICIENTNET, has_efficientnet
from flowt2i.evaluation.pictures import STRIDE, raise_everywhere
from flowt2i.evaluation.reference import data_hash, real_images, same_data, sizes_of, spread
from flowt2i.training.distributed import World

PERCENTILE = 1.0  # of the held-out distances: the near-copy distance
LEAST_HELDOUT = 100  # held-out pictures below which there is no such percentile
MOST_HELDOUT = 2_000  # held-out pictures that the near-copy distance is measured on
TRAINING_CAPTIONS = 500  # captions of training pictures that are asked for besides
MOST_ON_CPU = 10_000  # training pictures whose features a CPU makes (some minutes); beyond it only pixels are compared there
PAIRS = 8  # closest pairs that are shown
CHUNK = 1024  # training pictures at a time
PIXEL_SIDE = 16  # pixels are compared at this size: blur, noise and a shift by a pixel do not hide a copy

METHOD = (
    f"nearest training picture, pixels at {PIXEL_SIDE}x{PIXEL_SIDE} less mean brightness, features as unit vectors; near copies lie within percentile "
    f"{PERCENTILE:g} of the distances of up to {MOST_HELDOUT} held-out pictures"
)

VERDICTS = {"held-out captions": "it copies", "training captions": "these captions call their own pictures back"}  # where there are more than of new pictures
Z_NOTE = "z is also far below 0 for blurred or flat pictures, which lie near everything: near copies tell of copying, z alone does not"

Features = Callable[[np.ndarray], np.ndarray]  # uint8 [N, H, W, 3] -> float32 [N, D], compared by Euclidean distance


@dataclass
class Nearest:
    """The nearest training picture of each query, in one kind of feature."""

    distance: np.ndarray  # float64 [N]
    index: np.ndarray  # int64 [N], into the training split


def metric(context: Context) -> Scores:
    """`memorisation`: asked with held-out captions, and with captions of training pictures; in pixels, and in a net's features where one is at hand."""
    check(context)
    pipeline, data = context.need_pipeline("memorisation"), context.need_data("memorisation")
    train, heldout = ImageTextDataset(data, "train"), ImageTextDataset(data, "heldout")
    trained = min(pipeline.config.data.subset or len(train), len(train))
    kinds: dict[str, Features] = {"pixels": pixel_features}
    affordable = trained <= MOST_ON_CPU or context.world.device.type != "cpu"
    if affordable and (context.net_name != EFFICIENTNET or has_efficientnet()):
        net = context.net()
        kinds[net.name] = net_features(net)
    captions = train.captions()[:trained]
    recalled = _evenly(captions, min(context.num, TRAINING_CAPTIONS))
    asked = {
        "held-out captions": context.prompts,
        "training captions": [captions[row] for row in recalled],
    }
    shapes = {"held-out captions": sizes_of(context.captions, context.rows), "training captions": sizes_of(train, np.array(recalled))}
    drawn = {whose: context.images(captions, sizes=shapes[whose]) for whose, captions in asked.items()}
    real = real_images(heldout, pipeline.codec, spread(len(heldout))[:MOST_HELDOUT])
    queries = np.concatenate([real, *drawn.values()])
    show = context.progress and context.world.main
    found = over_ranks(context.world, lambda: nearest(queries, chunks_of(train, pipeline.codec, trained, show, context.world), kinds))
    ends = np.cumsum([len(real), *map(len, drawn.values())])
    title = f"memorised-{context.count}@{context.resolution}"
    of_data = f"{trained} training and {len(real)} held-out pictures of data {data_hash(train)[:8]}, {len(asked['training captions'])} training captions"
    nets = "".join(f", {net.name} {net.fingerprint[:8]}" for net in context.nets.values() if net.name in kinds)
    protocol = f"{title}: {METHOD}{nets}; {of_data}; {context.protocol()}, noise of picture k of either set that of {(context.seed + 1) * STRIDE} + k"
    scores = Scores({}, protocol, [], {"intervals": {}, "memorisation": {}})
    for kind, near in found.items():
        for whose, (start, end) in zip(asked, zip(ends, ends[1:])):
            name, part = f"{title}/{kind}, {whose}", Nearest(near.distance[start:end], near.index[start:end])
            judged = judge(part.distance, near.distance[: len(real)])
            order, pairs = closest_pairs(drawn[whose], part, PAIRS, lambda index: real_images(train, pipeline.codec, index))
            judged["pairs"] = [
                {"sample": int(k), "prompt": asked[whose][k], "training": int(part.index[k]), "caption": train.caption(int(part.index[k])),
                 "distance": float(part.distance[k]), "near_copy": bool(part.distance[k] <= judged["threshold"])}
                for k in order
            ]  # fmt: skip
            judged["verdict"] = VERDICTS[whose] if judged["copies"] else "no more than new pictures"
            share = judged["near_copies"]
            scores.values[name], scores.details["intervals"][name] = share["accuracy"], share
            scores.details["memorisation"][f"{kind}, {whose}"] = judged
            scores.pictures[f"{kind}, {whose}"] = [(a, b) for a, b in pairs]
            interval = f"[{share['low']:.1%}, {share['high']:.1%}]"
            expected = f"held-out pictures {judged['expected']:.1%}: {judged['verdict']}; z {judged['z']:+.1f}"
            scores.lines.append(f"{kind + ', ' + whose:38s} {share['accuracy']:6.1%} near copies {interval}   n={share['n']}   {expected}")
    scores.lines.append(f"({Z_NOTE})")
    return scores


def check(context: Context, name: str = "memorisation") -> None:
    """What is wrong before any work: no model, or data that do not go with it."""
    check_data(context.need_pipeline(name).description, context.need_data(name))


def check_data(trained_on: DatasetDescription, data: Path) -> None:
    """UserError where there is nothing to measure against, or `data` is not what the model was trained on, in the same split; Skipped for too little."""
    if not trained_on.heldout_count:
        raise UserError(f"memorisation is measured against held-out pictures, and {data} has none: prepare it with --heldout")
    if not same_data(DatasetDescription.load(data), trained_on):
        raise UserError(f"memorisation is about the data that a model was trained on, and {data} is other data: give the model's own with --data")
    if trained_on.heldout_count < LEAST_HELDOUT:
        raise Skipped(
            f"near copies are told by the nearest {PERCENTILE:g}% of held-out pictures, and {data} has {trained_on.heldout_count} of them: "
            f"prepare more, {LEAST_HELDOUT} at least (--heldout)"
        )


def _evenly(captions: Sequence[str], count: int) -> list[int]:
    """Which `count` captions (or all there are), evenly spaced; empty ones left out."""
    said = [row for row, caption in enumerate(captions) if caption.strip()]
    return [said[k * len(said) // min(count, len(said))] for k in range(min(count, len(said)))]


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Pictures at 16 x 16, less their mean brightness, so that brightness alone does not part a copy from its original (colour does).

    uint8 [N, H, W, 3] -> float32 [N, 768], scaled so that the Euclidean distance is the root mean square difference in grey levels of 255.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(pixels, (PIXEL_SIDE, PIXEL_SIDE), mode="area")
    free = (small - small.mean((1, 2, 3), keepdim=True)).flatten(1)
    return (free / math.sqrt(free.shape[1])).numpy()


def net_features(net: Callable[[np.ndarray], torch.Tensor]) -> Features:
    """Features of a net as unit vectors: their Euclidean distance is 0 for the same direction, 2 for the opposite one."""
    return lambda images: torch.nn.functional.normalize(net(images).float(), dim=-1).numpy()


def chunks_of(
    dataset: ImageTextDataset, codec: Any, limit: int = 0, progress: bool = False, world: World | None = None, size: int = CHUNK
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """All pictures of a dataset (or its first `limit`), `size` at a time, each chunk with the number of its first; of several ranks each gets its part."""
    count = min(limit or len(dataset), len(dataset))
    starts = range(0, count, size)[world.rank :: world.size] if world else range(0, count, size)
    for start in tqdm(starts, desc="training pictures", unit="chunk", disable=not progress, leave=False):
        yield start, real_images(dataset, codec, np.arange(start, min(start + size, count)))


def nearest(queries: np.ndarray, chunks: Iterable[tuple[int, np.ndarray]], features: dict[str, Features]) -> dict[str, Nearest]:
    """The nearest picture of all chunks (number of the first, pictures) to each of the queries (uint8 [N, H, W, 3]), by every kind of feature.

    The distance is infinite where there are no chunks.
    """
    asked = {name: torch.from_numpy(make(queries)) for name, make in features.items()}
    best = {name: (torch.full((len(queries),), math.inf, dtype=torch.float64), torch.zeros(len(queries), dtype=torch.int64)) for name in features}
    for start, chunk in chunks:
        for name, make in features.items():
            known, query = torch.from_numpy(make(chunk)), asked[name]
            rough = (known * known).sum(-1) - 2 * query @ known.T  # squared distance less |query|^2: one matrix product, the same order
            place = rough.argmin(-1)
            exact = (query.double() - known[place].double()).norm(dim=-1)  # a product of fp32 says 0.01 where a copy's distance is 0
            distance, index = best[name]
            nearer = exact < distance
            best[name] = torch.where(nearer, exact, distance), torch.where(nearer, place + start, index)
    return {name: Nearest(distance.numpy(), index.numpy()) for name, (distance, index) in best.items()}


def over_ranks(world: World, work: Callable[[], dict[str, Nearest]]) -> dict[str, Nearest]:
    """The nearest of what every rank found in its chunks, on every rank. Where one fails, all stop."""
    found: dict[str, Nearest] = {}
    failure: Exception | None = None
    try:
        found = work()
    except Exception as error:  # the others must not wait for a rank that gave up
        failure = error
    raise_everywhere(world, failure)
    gather = lambda values: world.collect(values[None], world.size)  # [N] of each rank -> [ranks, N]
    return {name: merge(gather(near.distance), gather(near.index)) for name, near in found.items()}


def merge(distance: np.ndarray, index: np.ndarray) -> Nearest:
    """The nearest of several, [R, N] each; of equally near ones the first in the training split, so the number of ranks changes nothing."""
    least = distance.min(0)
    return Nearest(least, np.where(distance == least, index, np.iinfo(np.int64).max).min(0))


def judge(samples: np.ndarray, heldout: np.ndarray) -> dict[str, Any]:
    """Distances to the nearest training picture, of samples [N] and of held-out pictures [M] -> what the module's head describes.

    `near_copies`: a tally (share, interval) of samples within `threshold`; `expected`, `expected_high`: the share of the held-out pictures within it and
    where its interval ends; `copies`: whether the first interval lies wholly above the second; `z`: Meehan's test.
    """
    threshold = float(np.percentile(heldout, PERCENTILE, method="inverted_cdf"))
    share, expected = (tally(int((distances <= threshold).sum()), len(distances)) for distances in (samples, heldout))
    return {
        "near_copies": share, "expected": expected["accuracy"], "expected_high": expected["high"], "copies": share["low"] > expected["high"],
        "threshold": threshold, "z": mann_whitney_z(samples, heldout), "median": float(np.median(samples)), "heldout_median": float(np.median(heldout)),
        "heldout_n": len(heldout),
    }  # fmt: skip


def mann_whitney_z(first: np.ndarray, second: np.ndarray) -> float:
    """z-score of U, the number of pairs in which the first is larger (ties half), with the variance corrected for ties; under 0 the first tend to be smaller.

    Mann and Whitney 1947; no continuity correction. 0 where all values are alike.
    """
    n, m = len(first), len(second)
    both = np.concatenate([first, second])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    u = ranks[:n].sum() - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - (counts.astype(np.float64) ** 3 - counts).sum() / (total * (total - 1)))
    return float((u - n * m / 2) / math.sqrt(variance)) if variance > 0 else 0.0


def closest_pairs(samples: np.ndarray, found: Nearest, count: int, real: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The samples nearest to a training picture, nearest first: their numbers [K] and [K, 2, H, W, 3] sample and training picture, K <= count.

    real(index) gives the training pictures of these numbers.
    """
    order = np.argsort(found.distance, kind="stable")[:count]
    return order, np.stack([samples[order], real(found.index[order])], axis=1)
