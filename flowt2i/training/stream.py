"""What a step sees, as pure functions of (seed, step): which samples, which noise, which times, which captions dropped.

Nothing here has state, so a resume seeks at once, and any number of ranks sees the same global batch: each draws the whole
batch's randomness from the step's own generator and keeps its rows.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


@lru_cache(maxsize=2)  # a global batch straddles two epochs, or many tiny ones
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch: [count] int64, drawn from (seed, epoch) alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1, epoch]))).permutation(count)


def sample_indices(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Dataset indices [batch] of a step's global batch: epochs follow on each other without a gap or a short batch."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs, offsets = positions // count, positions % count
    out = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permutation(seed, int(epoch), count)[offsets[here]]
    return out


class StepSampler(Sampler[list[int]]):
    """Batches of dataset indices for a DataLoader: this rank's micro-batches, from `first_step` on, without end unless `last_step` is set."""

    def __init__(self, seed: int, count: int, batch: int, micro: int, rank: int, world: int, first_step: int, last_step: int = 0):
        self.seed, self.count, self.batch, self.micro, self.rank, self.world = seed, count, batch, micro, rank, world
        self.first_step, self.last_step = first_step, last_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while not self.last_step or step < self.last_step:
            indices = sample_indices(self.seed, step, self.batch, self.count)
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


def draw(seed: int, step: int, batch: int, shape: tuple[int, ...], dropout: float, moments: bool, device: torch.device) -> Draw:
    """All random numbers of a step, from a generator seeded by (seed, step)."""
    state = np.random.SeedSequence([seed, 2, step]).generate_state(2, np.uint32)
    generator = torch.Generator(device).manual_seed(int(state[0]) << 32 | int(state[1]))
    few = torch.Generator().manual_seed(int(state[1]) << 32 | int(state[0]))  # on the CPU: the same times on every kind of device
    noise = torch.randn(batch, *shape, generator=generator, device=device)
    latent_noise = torch.randn(batch, *shape, generator=generator, device=device) if moments else None
    strata = ((torch.randperm(batch, generator=few) + torch.rand(batch, generator=few)) / batch).clamp_max(1 - 2**-24)
    choice, drop, flip = torch.rand(3, batch, generator=few)
    return Draw(noise, latent_noise, strata.to(device), choice.to(device), (drop < dropout).to(device), (flip < 0.5).to(device))
