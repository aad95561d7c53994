"""What a figure was taken on: written beside every result."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import flowt2i
from flowt2i.bench.timing import cpu_name


def facts(device: torch.device) -> dict[str, Any]:
    """`date` (UTC), `machine` (processor, and GPU where one is used), `cores` that this process may use, `threads`, versions, and the `commit` of the code."""
    name = cpu_name() + (f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"flowt2i": flowt2i.__version__, "python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy")}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "machine": name, "cores": cores, "threads": torch.get_num_threads(), "versions": versions, "commit": commit()}


def commit() -> str:
    """With "+" behind it where tracked files differ from it; empty outside of a checkout."""
    git = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short", "HEAD")
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "") if head.returncode == 0 else ""
    except OSError:
        return ""
