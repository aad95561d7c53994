"""Exported folders: complete or absent, and known as ours by `export.json`."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from flowt2i import __version__
from flowt2i.errors import UserError
from flowt2i.exported import MARK, read_mark

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what only a write meets, whichever file it names


def write_mark(folder: Path, format: str, **entries: Any) -> None:
    (folder / MARK).write_text(json.dumps({"format": format, "flowt2i": __version__, **entries}, indent=2) + "\n")


def check_target(target: Path, force: bool) -> None:
    """UserError where something stands in the way: anything but an empty folder, or with `force` an export of ours."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--to {target} is a file: give another name")
    if not any(target.iterdir()):
        return
    try:
        ours = read_mark(target) is not None
    except UserError:  # another program's export.json
        ours = False
    if not ours:
        raise UserError(f"--to {target} holds other files, and nothing was written: give a new or empty folder")
    if not force:
        raise UserError(f"--to {target} is an earlier export: add --force to replace it, or give another folder")


@contextlib.contextmanager
def aside(target: Path, force: bool) -> Iterator[Path]:
    """A hidden folder beside the target; renamed to it when all went well, removed otherwise. What a killed export left is cleared up first.

    Of a target that is a link, the folder that it leads to is the target.
    """
    target = target.resolve()
    beside, old, lock = (target.with_name(f".{target.name}.{what}") for what in ("tmp", "old", "lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                _restore(target, old)
                check_target(target, force)
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                yield beside
                check_target(target, force)  # it took a while
                if target.exists() and any(target.iterdir()):
                    os.replace(target, old)
                os.replace(beside, target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
                _restore(target, old)
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"another export is writing --to {target}: wait for it, or give another folder") from error
    except SafetensorError as error:  # its own error for a disk that is full
        raise UserError(f"cannot write --to {target}: {error}; nothing was exported") from error
    except OSError as error:
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        if file is None and error.errno not in WRITE_ERRORS:
            raise
        ours = error.errno in WRITE_ERRORS or any(file.is_relative_to(place) or place.is_relative_to(file) for place in (target, beside, old, lock) if file)
        raise UserError(f"{f'cannot write --to {target}' if ours else file}: {error.strerror or error}; nothing was exported") from error


def _restore(target: Path, old: Path) -> None:
    """An earlier export goes only once its replacement stands."""
    if old.exists() and target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.replace(old, target)
