"""Out of memory is met once, before step 0: the micro-batch is halved on all ranks alike until a pass fits, at the same effective batch."""

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowt2i.errors import UserError
from flowt2i.memory import is_out_of_memory
from flowt2i.training import distributed

if TYPE_CHECKING:
    from flowt2i.training.loop import Trainer


class StartAgain(Exception):
    """A sharded pass ran out of memory on all ranks, which leaves the model in no state to go on: build it anew with micro-batches of `micro`.

    What the new start must not forget: when the run was started (a `time.perf_counter`), and a signal that came meanwhile.
    """

    def __init__(self, micro: int, started: float, stop_signal: int | None):
        super().__init__(micro)
        self.micro, self.started, self.stop_signal = micro, started, stop_signal


def fitting_micro_batch(micro: int, share: int, fits: Callable[[int], bool]) -> int:
    """The first of `micro`, then ever smaller divisors of a rank's `share` at most half as large, that fits on every rank.

    fits(micro) must give the same answer on all ranks. UserError where not even one image fits.
    """
    while not fits(micro):
        micro = smaller(micro, share)
    return micro


def smaller(micro: int, share: int) -> int:
    """The largest divisor of a rank's `share` that is at most half of `micro`."""
    if micro == 1:
        raise UserError("out of memory with a micro-batch of one image: choose a smaller model, or --train.parallel fsdp on several ranks")
    return next(size for size in range(micro // 2, 0, -1) if share % size == 0)


def fit_memory(trainer: "Trainer") -> None:
    """Halve the micro-batch, on all ranks alike, until a forward and backward pass at it fits; said in one line.

    Nothing of the training changes but the micro-batch: what a step draws is a function of its number. Raises StartAgain where a
    sharded pass did not fit: see there.
    """
    asked, share = trainer.micro, trainer.config.data.batch_size // trainer.world.size
    if trainer.sharded:
        micro = asked if _fits(trainer, asked) else smaller(asked, share)
    else:
        micro = fitting_micro_batch(asked, share, lambda size: _fits(trainer, size))
    if micro == asked:
        return
    trainer.micro, trainer.accumulate = micro, share // micro
    if trainer.compiled:
        torch.compiler.reset()
    if trainer.world.main:
        warnings.warn(
            f"out of memory with a micro-batch of {asked}: going on with {micro} x {trainer.accumulate} accumulation, the same effective batch",
            stacklevel=2,
        )
    if trainer.sharded:
        raise StartAgain(micro, trainer.started, trainer.stop_signal)


def _fits(trainer: "Trainer", micro: int) -> bool:
    """Whether a forward and backward pass of this many images fits on every rank."""
    fits = True
    try:
        _probe(trainer, micro)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    trainer.optimizer.zero_grad()
    if trainer.sharded and not _fits_shares(trainer, micro, fits):
        return False  # and the cache stays: emptying it waits for the device, where a collective may be in flight that another rank never joined
    if trainer.world.device.type == "cuda":
        torch.cuda.empty_cache()
    return trainer.sharded or not trainer.world.any(not fits)


def _fits_shares(trainer: "Trainer", micro: int, fits: bool) -> bool:
    """The same where the model is sharded: a rank whose pass went on may wait in it for one whose pass broke off, so no collective can ask it.

    UserError from the first rank that was short, where another gives no answer.
    """
    world, patience = trainer.world, min(60.0, trainer.config.train.timeout_s / 2)
    answers = distributed.votes(world, "fits" if fits else "short", patience)
    silent = [rank for rank in range(world.size) if rank not in answers]
    if silent:
        short = min((rank for rank, answer in answers.items() if answer == "short"), default=None)
        if short is None:
            raise UserError(f"rank {silent[0]} gave no answer for {patience:.0f} s: it was lost, or hangs")
        if world.rank != short:
            raise distributed.ToldElsewhere("out of memory")
        raise UserError(
            f"rank {short} ran out of memory with a micro-batch of {micro}, rank {silent[0]} did not: "
            f"choose a smaller --train.micro_batch, or free what else uses rank {short}'s memory"
        )
    return all(answer == "fits" for answer in answers.values())


def _probe(trainer: "Trainer", micro: int) -> None:
    """The pass that takes most: over the samples with the longest captions, of the shape of most patches, beside an optimizer's state."""
    largest = max((k for k, rows in enumerate(trainer.buckets) if len(rows)), key=lambda k: math.prod(trainer.shapes[k]))
    rows = trainer.buckets[largest]
    longest = rows[np.argsort(trainer.dataset.token_lengths()[rows], kind="stable")[-micro:]]
    batch = trainer.dataset.fetch(np.resize(longest, micro))
    draw, t = trainer.draw(0, trainer.shapes[largest])
    if trainer.perceptual:
        t = t.clamp_min(trainer.config.flow.perceptual_from)  # so that all pictures go through its network
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    state = [torch.empty_like(p) for p in trained for _ in range(2)] if not trainer.optimizer.state() else []
    trainer.forward(trainer.objective, batch, draw, t, slice(0, micro))[1].mean().backward()
    del state
