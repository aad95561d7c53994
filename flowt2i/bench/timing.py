"""Clocks that wait for the device, a time budget, and what this machine calls itself."""

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowt2i import __version__


def clock(device: torch.device) -> float:
    """Seconds now, all work on the device done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def fastest_of(work: Callable[[], Any], device: torch.device, least: int = 3, seconds: float = 1.5) -> float:
    """Seconds of the fastest of at least `least` runs within about `seconds`, after one to warm up: what else the machine does only slows it."""
    return min(times_of(work, device, least, seconds))


def mean_of(work: Callable[[], Any], device: torch.device, least: int = 2, seconds: float = 3.0) -> float:
    """Mean seconds of runs that follow on each other without a wait for the device between them, as in a training; after one to warm up."""
    work()
    begun, runs = clock(device), 0
    while runs < least or time.perf_counter() - begun < seconds:
        work()
        runs += 1
    return (clock(device) - begun) / runs


def times_of(work: Callable[[], Any], device: torch.device, least: int, seconds: float) -> list[float]:
    """Seconds of each run, after one to warm up."""
    work()
    begun = clock(device)
    times: list[float] = []
    while len(times) < least or clock(device) - begun < seconds:
        a = clock(device)
        work()
        times.append(clock(device) - a)
    return times


def one_shape_each() -> Any:
    """A context in which what is compiled is compiled for each shape by itself, as in a training, which only ever sees one."""
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64)


class Budget:
    """The time a benchmark may take, from now on."""

    def __init__(self, seconds: float):
        self.total, self.started = seconds, time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        return max(0.0, self.total - self.spent)

    def share(self, part: float) -> float:
        """Seconds for a part that is meant to take this share of the whole: less where little is left."""
        return min(part * self.total, self.left)


def device_name(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", "2 threads of AMD EPYC 9B45", "mps"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {cpu_name()}" if device.type == "cpu" else device.type


def cpu_name() -> str:
    """As Linux calls the processor; elsewhere its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a figure must be told with: date, processor, cores, memory, versions."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "flowt2i": __version__,
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_gib": round(memory_bytes() / 2**30, 1),
        "python": platform.python_version(), "torch": torch.__version__, "platform": sys.platform,
    }  # fmt: skip
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}
        facts |= {"cuda": torch.version.cuda}
    return facts


def memory_bytes(available: bool = False) -> int:
    """Main memory of this machine, all of it, or what is free for a new program (0 where the system does not say)."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(fields["MemAvailable" if available else "MemTotal"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
