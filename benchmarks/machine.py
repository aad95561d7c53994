"""What a figure was taken on: written beside every result."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import flowt2i


def facts(device: torch.device) -> dict[str, Any]:
    """`date` (UTC), `machine` (processor, and GPU where one is used), `cores` that this process may use, `threads`, and versions."""
    name = _processor() + (f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"flowt2i": flowt2i.__version__, "python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy")}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "machine": name, "cores": cores, "threads": torch.get_num_threads(), "versions": versions}


def _processor() -> str:
    """As Linux calls it; elsewhere the kind of processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
