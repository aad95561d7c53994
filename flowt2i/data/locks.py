"""Who may work in a dataset folder. Locks end with the process, however it ends; where a file system has none, units written twice do no harm."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from flowt2i.data.share import Share
from flowt2i.data.units import full_disk_told
from flowt2i.errors import UserError


@contextlib.contextmanager
def locked(folder: Path, share: Share) -> Iterator[None]:
    """Keep a second `prepare` off the folder, or a second worker of the same number."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): name another folder with --out") from error
    with contextlib.ExitStack() as stack:
        if not _hold(stack, _path(folder, share), 1.0):  # another worker may be looking whether this one is at work
            who = "another prepare" if share.alone else f"another worker {share}"
            raise UserError(f"{who} is writing to {folder}: wait for it, or name another --out")
        yield


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """One worker at a time plans, commits a unit or completes the dataset; the others wait."""
    with contextlib.ExitStack() as stack:
        _hold(stack, folder / ".turn.lock", -1)
        yield


def others_at_work(folder: Path, share: Share) -> bool:
    """Is any other worker at work in the folder?"""
    for path in (folder / ".lock", *folder.glob(".work-*.lock")):
        with contextlib.ExitStack() as stack:
            if path != _path(folder, share) and not _hold(stack, path, 0):
                return True
    return False


def _path(folder: Path, share: Share) -> Path:
    return folder / (".lock" if share.alone else f".work-{share.number}-of-{share.of}.lock")


def _hold(stack: contextlib.ExitStack, path: Path, seconds: float) -> bool:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        with full_disk_told(path):
            lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except NotImplementedError:  # a file system without locks
        return True
    stack.callback(lock.release)
    return True
