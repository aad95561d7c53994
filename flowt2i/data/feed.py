"""Batches from loader processes, and one clear error within a minute where such a process was killed, was stopped or hangs."""

import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from flowt2i.errors import UserError

WAIT, FIRST_WAIT = 45, 300  # seconds for a batch; the first one takes starting the processes


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader. UserError where its processes give no more; none of them is left when the iterator ends, however it ends."""
    if not loader.num_workers:
        yield from loader
        return
    iterator = _start(loader)
    watchdog = _Watchdog(iterator._workers)
    try:
        yield from _watched(iterator, watchdog)
    except (RuntimeError, OSError, EOFError) as error:
        ours = "DataLoader worker (pid" in str(error) or not isinstance(error, RuntimeError)  # OSError: where a dead worker is asked for memory
        if not watchdog.bit and ("in DataLoader worker process" in str(error) or not ours):  # an error inside of a worker, or of another kind
            raise
        silent = "no batch came from the data workers for too long (is one stopped, or its disk?)"
        what = silent if watchdog.bit else "a data worker was killed (out of memory?)"
        raise UserError(f"{what}: add --resume latest to go on from the newest checkpoint, and --data.workers 0 where it happens again") from error


def _start(loader: DataLoader[Any]) -> Any:
    """The loader's iterator, without torch's handler of SIGCHLD: it raises wherever the main thread is, in the middle of an optimizer step too.

    Without it a worker's end is noticed where its batch is waited for, within 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _watched(iterator: Any, watchdog: "_Watchdog") -> Iterator[Any]:
    try:
        while True:
            watchdog.left = FIRST_WAIT if watchdog.left is None else WAIT
            batch = next(iterator, None)
            watchdog.left = 0
            if batch is None:
                return
            yield batch
    finally:
        watchdog.over.set()
        iterator._shutdown_workers()
        _kill(iterator._workers)


class _Watchdog(threading.Thread):
    """Kills the workers when one batch is waited for too long, so that the wait ends in an error.

    The loader's own `timeout` is not enough: for a batch that lies ready it asks the worker for the memory, and a stopped one never
    answers. Ticks are counted, not time, so that a pause of this very process does no harm.
    """

    def __init__(self, workers: list[Any]) -> None:
        super().__init__(daemon=True)
        self.workers = workers
        self.left: int | None = None  # ticks; 0: nobody waits
        self.bit = False
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(1):
            if self.left:
                self.left -= 1
                if not self.left:
                    self.bit = True
                    _kill(self.workers)


def _kill(workers: list[Any]) -> None:
    for worker in workers:  # a stopped process does not hear the SIGTERM that the loader sends
        if worker.is_alive():
            worker.kill()
