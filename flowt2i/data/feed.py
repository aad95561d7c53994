"""Batches from loader processes, and one clear error within a minute where such a process was killed, was stopped or hangs."""

import multiprocessing
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from flowt2i.errors import UserError

WAIT = 45  # seconds for a batch: a disk may be slow, but not so slow


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader. UserError where its processes give no more; none of them is left when the iterator ends, however it ends."""
    iterator = iter(loader)
    try:
        yield from iterator
    except RuntimeError as error:
        if loader.num_workers and "DataLoader" in str(error):  # torch has no error of its own for it
            what = f"no batch came from the data workers for {WAIT} s (is one stopped?)" if "timed out" in str(error) else "a data worker was killed"
            raise UserError(f"{what}: add --resume latest to continue from the newest checkpoint, and --data.workers 0 if memory is short") from error
        raise
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            for child in multiprocessing.active_children():  # a stopped process does not hear the SIGTERM that it was sent
                child.kill()
                child.join(5)
