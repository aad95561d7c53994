"""Validation loss at fixed noise and fixed times, by time bin: comparable between steps, runs and machines."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flowt2i.data.dataset import Batch, ImageTextDataset
from flowt2i.training import stream
from flowt2i.training.distributed import World
from flowt2i.training.objective import Objective

BINS = 5
SEED = 20_777  # not a run's seed: every run meets the same noise


def fixed_times(count: int) -> Tensor:
    """`count` times that fill (0, 1) evenly in any prefix: the golden-ratio sequence. [count]."""
    return torch.from_numpy(((np.arange(count) + 0.5) * 0.6180339887498949) % 1.0).float()


@torch.no_grad()
def heldout_loss(
    objective: Objective, dataset: ImageTextDataset, latents: Callable[[Batch, Tensor | None], Tensor], text_of: Callable[[Batch], Tensor],
    count: int, most: int, world: World, at_once: int = 64,
) -> dict[str, float]:  # fmt: skip
    """`validation_loss` of the first `count` images of a dataset. `most` is the number asked for: it decides the batches, and so the noise.

    at_once: how many go through the network in one pass.
    """
    together = min(64, most)

    def loss(rows: np.ndarray, t: Tensor, draw: stream.Draw) -> Tensor:
        found = []
        for first in range(0, together, at_once):
            part = slice(first, min(first + at_once, len(rows)))
            if first < len(rows):
                found.append(loss_of(dataset.fetch(rows[part]), t[part], draw, part))
            elif world.size > 1:  # as many passes of every batch, however short: a sharded model needs every rank at each
                loss_of(dataset.fetch(rows[:1]), t[:1], draw, slice(1))
        return torch.cat(found)

    def loss_of(batch: Batch, t: Tensor, draw: stream.Draw, part: slice) -> Tensor:
        data = latents(batch, None if draw.latent_noise is None else draw.latent_noise[part])
        return objective(data, draw.noise[part], t, text_of(batch), batch.mask.to(world.device)).losses

    codec = dataset.description.codec
    shaped = zip(dataset.by_bucket(count), map(codec.latent_shape, dataset.description.sizes))
    return validation_loss(loss, list(shaped), together, codec.kind == "vae", world)


def validation_loss(
    loss: Callable[[np.ndarray, Tensor, stream.Draw], Tensor],
    images: Sequence[tuple[np.ndarray, tuple[int, ...]]],
    batch: int,
    moments: bool,
    world: World,
) -> dict[str, float]:
    """Mean loss, and mean loss of each fifth of the times (`t0.0-0.2` … `t0.8-1.0`): the same on every rank, and for any number of ranks.

    Whole batches are divided over the ranks, as many for each (a sharded model needs every rank at every pass).

    images: the numbers of those of each shape, and the shape of their latents; all numbers together are 0 to their count.
    loss(rows, t, draw) gives the loss per image of held-out images `rows` [b] at times `t` [b] with the noise of the first rows of `draw`.
    """
    batches = [(rows[start : start + batch], shape) for rows, shape in images for start in range(0, len(rows), batch)]
    count = sum(len(rows) for rows, _ in batches)
    share = world.share(len(batches))
    mine = np.zeros((len(share), batch))
    for place, number in enumerate(share.tolist()):
        rows, shape = batches[number]
        draw = stream.draw(SEED, number, batch, shape, 0.0, moments, world.device)
        mine[place, : len(rows)] = loss(rows, fixed_times(count)[rows].to(world.device), draw).float().cpu()
    found = world.collect(mine, len(batches))
    losses = torch.zeros(count, dtype=torch.float64)
    for values, (rows, _) in zip(found, batches):
        losses[rows] = torch.from_numpy(values[: len(rows)])
    bins = (fixed_times(count) * BINS).long().clamp(0, BINS - 1)
    out = {"loss": losses.mean().item()}
    for number in range(BINS):
        inside = losses[bins == number]
        if len(inside):
            out[f"t{number / BINS:.1f}-{(number + 1) / BINS:.1f}"] = inside.mean().item()
    return out
