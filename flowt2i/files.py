"""Files that appear whole or not at all, and weights that whoever may read the files beside them can read, too.

safetensors writes a file for its owner alone (mode 0600, from 0.8 on): a model in a folder that is shared, or served by another user, could not be opened.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what lies there takes the place of `path` at the end, and is removed where anything is raised before."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous CPU tensors by name, with the mode of any new file here. OSError or SafetensorError where the disk does not take it."""
    path.touch()
    mode = path.stat().st_mode  # as the process's umask has it, which cannot be asked for without changing it for all threads
    save_file(tensors, path, metadata)
    if path.stat().st_mode != mode:  # not every file system takes a mode
        path.chmod(mode)


def share_tensors(folder: Path, like: Path) -> None:
    """Give every tensor file that another library wrote below `folder` the mode of the file `like`."""
    mode = like.stat().st_mode
    for path in folder.rglob("*.safetensors"):
        if path.stat().st_mode != mode:
            path.chmod(mode)
