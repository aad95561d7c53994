"""Out of memory is met once, before step 0: the micro-batch is halved on all ranks alike until a pass fits, at the same effective batch."""

from collections.abc import Callable

from flowt2i.errors import UserError


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
