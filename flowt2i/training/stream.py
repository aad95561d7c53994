"""What a step sees, as pure functions of (seed, step): which samples, which noise, which times, which captions dropped.

Nothing here has state, so a resume seeks at once, and any number of ranks sees the same global batch: each draws the whole
batch's randomness from the step's own generator and keeps its rows.

Where pictures have several shapes (aspect buckets), a global batch is of one of them. Each bucket has an endless sequence of batches of its own: its
samples in an order drawn anew for each epoch, epochs following on each other without a gap. Bucket b of n_b samples has had `floor(e n_b / batch)` of them
by the end of epoch e, so that it is visited in proportion to its samples, however few, and each of its samples as often as any other. Within an epoch
the batches of all buckets are shuffled. A dataset of one shape is the case of one bucket.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


@cache
def permutations(bucket: int) -> Callable[[int, int, int], np.ndarray]:
    """permutation(seed, epoch, count) of a bucket: the last two are kept, for a global batch straddles two epochs (or many tiny ones)."""

    def drawn(seed: int, epoch: int, count: int) -> np.ndarray:
        words = [seed, 1, epoch, *([bucket] if bucket else [])]  # of the first as where there is but one
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(words))).permutation(count)

    return lru_cache(maxsize=2)(drawn)


def permutation(seed: int, epoch: int, count: int, bucket: int = 0) -> np.ndarray:
    """The order of an epoch of a bucket: [count] int64, drawn from (seed, epoch, bucket) alone."""
    return permutations(bucket)(seed, epoch, count)


def sample_indices(seed: int, number: int, batch: int, count: int, bucket: int = 0) -> np.ndarray:
    """Places [batch] in a bucket of its batch of this number: epochs follow on each other without a gap or a short batch."""
    positions = np.arange(number * batch, (number + 1) * batch)
    epochs, offsets = positions // count, positions % count
    out = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permutation(seed, int(epoch), count, bucket)[offsets[here]]
    return out


@lru_cache(maxsize=2)
def epoch_buckets(seed: int, epoch: int, batch: int, counts: tuple[int, ...]) -> np.ndarray:
    """The bucket of each step of an epoch, [steps] int64. counts: samples of each bucket."""
    batches = [(epoch + 1) * count // batch - epoch * count // batch for count in counts]
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 3, epoch])))
    return generator.permutation(np.repeat(np.arange(len(counts)), batches))


def bucket_of(seed: int, step: int, batch: int, counts: tuple[int, ...]) -> tuple[int, int]:
    """Which bucket a step's global batch is of, and which number the batch has among that bucket's own."""
    if len(counts) == 1:
        return 0, step
    ends = lambda epoch: sum(epoch * count // batch for count in counts)  # steps before this epoch
    most = (step + len(counts)) * batch // sum(counts) + 2  # `ends` falls short of the unrounded sum by less than one a bucket
    epoch = bisect.bisect_right(range(most), step, key=ends) - 1
    order = epoch_buckets(seed, epoch, batch, counts)
    offset = step - ends(epoch)
    bucket = int(order[offset])
    return bucket, epoch * counts[bucket] // batch + int((order[:offset] == bucket).sum())


def global_batch(seed: int, step: int, batch: int, buckets: Sequence[np.ndarray]) -> np.ndarray:
    """Dataset indices [batch] of a step's global batch. buckets: the indices of the samples of each shape."""
    bucket, number = bucket_of(seed, step, batch, tuple(map(len, buckets)))
    return buckets[bucket][sample_indices(seed, number, batch, len(buckets[bucket]), bucket)]


class StepSampler(Sampler[list[int]]):
    """Batches of dataset indices for a DataLoader: this rank's micro-batches, from `first_step` on, without end unless `last_step` is set.

    buckets: the indices of the samples of each shape.
    """

    def __init__(self, seed: int, buckets: Sequence[np.ndarray], batch: int, micro: int, rank: int, world: int, first_step: int, last_step: int = 0):
        self.seed, self.buckets, self.batch, self.micro, self.rank, self.world = seed, buckets, batch, micro, rank, world
        self.first_step, self.last_step = first_step, last_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while not self.last_step or step < self.last_step:
            indices = global_batch(self.seed, step, self.batch, self.buckets)
            for rows in micro_rows(self.batch, self.micro, self.rank, self.world):
                yield indices[rows].tolist()
            step += 1


def micro_rows(batch: int, micro: int, rank: int, world: int) -> list[slice]:
    """Rows of the global batch that a rank works through, one slice a micro-batch."""
    share = batch // world
    return [slice(rank * share + start, rank * share + start + micro) for start in range(0, share, micro)]


class Draw(NamedTuple):
    """The randomness of one global batch."""

    noise: Tensor  # [batch, C, H, W] standard normal
    latent_noise: Tensor | None  # [batch, C, H, W], draws the latent from its VAE moments
    uniform: Tensor  # [batch] in (0, 1), stratified over the batch: for `flow.times`
    choice: Tensor  # [batch] in (0, 1): which times stay uniform
    dropped: Tensor  # [batch] bool: captions replaced by the empty one
    flipped: Tensor  # [batch] bool: images mirrored
    part: Tensor  # [batch] in (0, 1), on the CPU: whether a part of the caption is dropped, and which


def draw(seed: int, step: int, batch: int, shape: tuple[int, ...], dropout: float, moments: bool, device: torch.device) -> Draw:
    """All random numbers of a step, from a generator seeded by (seed, step)."""
    state = np.random.SeedSequence([seed, 2, step]).generate_state(2, np.uint32)
    generator = torch.Generator(device).manual_seed(int(state[0]) << 32 | int(state[1]))
    few = torch.Generator().manual_seed(int(state[1]) << 32 | int(state[0]))  # on the CPU: the same times on every kind of device
    noise = torch.randn(batch, *shape, generator=generator, device=device)
    latent_noise = torch.randn(batch, *shape, generator=generator, device=device) if moments else None
    strata = ((torch.randperm(batch, generator=few) + torch.rand(batch, generator=few)) / batch).clamp_max(1 - 2**-24)
    choice, drop, flip = torch.rand(3, batch, generator=few)
    part = torch.rand(batch, generator=few)
    return Draw(noise, latent_noise, strata.to(device), choice.to(device), (drop < dropout).to(device), (flip < 0.5).to(device), part)
