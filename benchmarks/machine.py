"""Where and with what a figure was measured: what every results file says of its machine."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import flowt2i
from flowt2i.training.distributed import best_device


def facts() -> dict[str, Any]:
    """`date`, `machine` (processor, cores, threads, memory, GPU) and `versions` (Python, torch, flowt2i and its commit)."""
    machine: dict[str, Any] = {"processor": processor(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    machine |= {"torch_threads": torch.get_num_threads(), "device": best_device().type}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name(0)
    if hasattr(os, "sysconf"):
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "flowt2i": flowt2i.__version__, "commit": commit()}
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine, "versions": versions}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the code, "+" behind it where files differ from it; empty outside of a checkout."""
    git = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short", "HEAD")
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "") if head.returncode == 0 else ""
    except OSError:
        return ""
