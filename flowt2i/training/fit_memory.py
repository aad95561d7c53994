"""Out of memory is met once, before step 0: the micro-batch is halved on all ranks alike until a pass fits, at the same effective batch."""

from collections.abc import Callable

from flowt2i.errors import UserError


def fitting_micro_batch(micro: int, share: int, fits: Callable[[int], bool]) -> int:
    """The first of `micro`, then ever smaller divisors of a rank's `share` at most half as large, that fits on every rank.

    fits(micro) must give the same answer on all ranks. UserError where not even one image fits.
    """
    while not fits(micro):
        if micro == 1:
            raise UserError("out of memory with a micro-batch of one image: choose a smaller model, or --train.parallel fsdp on several ranks")
        micro = next(size for size in range(micro // 2, 0, -1) if share % size == 0)
    return micro
