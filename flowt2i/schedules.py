"""Time grids for the solvers, from noise (t = 0) to data (t = 1): uniform, shifted, searched, or written out."""

import functools
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flowt2i.errors import UserError, nearest

if TYPE_CHECKING:  # the configuration needs this module for its names alone, and `flowt2i --help` must not wait for torch
    from torch import Tensor

Times = TypeVar("Times", "Tensor", float)
SHORTEST = 1e-6  # interval that may be written out: times are fp32 (6e-8 next to the data), and equal where they agree so far
SEARCHED = Path(__file__).with_name("schedules.json")  # {name: {number of steps: times}}, written by benchmarks/search_schedule.py


def uniform_times(steps: int) -> "Tensor":
    """Equally spaced times from 0 to 1. [steps + 1]."""
    import torch

    return torch.linspace(0, 1, steps + 1)


def shift_times(times: Times, shift: float) -> Times:
    """Move times in [0, 1] towards the noise: `t / (t + shift (1 - t))` (Esser et al. 2403.03206, eq. 23, written for our direction of t).

    The larger the picture for what it says, the more of it is decided next to the noise: a flat background shows through all but the
    strongest noise. shift 1 changes nothing.
    """
    return times / (times + shift * (1 - times))


def resample_times(times: "Tensor", steps: int) -> "Tensor":
    """A grid of another number of steps with the same density: linear in the step's index. [N + 1] -> [steps + 1]."""
    import torch

    place = torch.linspace(0, len(times) - 1, steps + 1, dtype=times.dtype)
    below = place.long().clamp_max(len(times) - 2)
    return times[below] + (place - below) * (times[below + 1] - times[below])


def times_from(times: "Tensor", start: float) -> "Tensor":
    """The part of a grid after `start` < 1, which becomes its first time: what a flow that begins later still has to go. [M + 1], M >= 1.

    What is left of the interval that `start` falls into is a step of its own if it is at least a quarter of it; less goes with the next step,
    because an evaluation for a sliver would be wasted.
    """
    import torch

    after = min(int((times <= start + SHORTEST).sum()), len(times) - 1)  # index of the first time kept
    if after < len(times) - 1 and times[after] - start < 0.25 * (times[after] - times[max(after - 1, 0)]):
        after += 1
    return torch.cat([torch.tensor([start], dtype=times.dtype), times[after:]])


@functools.cache
def searched() -> dict[str, dict[int, tuple[float, ...]]]:
    """The searched grids that come with the package: {name: {steps: times}}."""
    found = json.loads(SEARCHED.read_text())
    return {name: {int(steps): tuple(times) for steps, times in grids["times"].items()} for name, grids in found.items()}


def written(schedule: str) -> list[float] | None:
    """The times of a schedule that is written out, such as "0,0.02,0.1,0.4,1"; None where it is a name. UserError where they do not increase from 0 to 1."""
    if "," not in schedule:
        return None
    try:
        times = [float(word) for word in schedule.split(",")]
    except ValueError:
        times = []
    if len(times) < 2 or len(times) > 1001 or times[0] != 0 or times[-1] != 1 or not all(b - a >= SHORTEST for a, b in itertools.pairwise(times)):
        raise UserError(f"schedule {schedule[:60]!r}: give times that increase from 0 to 1 by at least {SHORTEST:f}, such as 0,0.02,0.1,0.4,1")
    return times


def check_schedule(schedule: str) -> None:
    """UserError unless `schedule` is "uniform", the name of a searched one, or written out."""
    if written(schedule) is None and schedule != "uniform" and schedule not in searched():
        raise UserError(f"no schedule {schedule!r}{nearest(schedule, ['uniform', *searched()])}; or write out its times: 0,0.02,0.1,0.4,1")


def make_times(schedule: str, steps: int, shift: float = 1.0) -> "Tensor":
    """The grid of a schedule at a number of steps, shifted. [steps + 1], fp32, on the CPU: solvers need no GPU to know the time.

    A searched or written grid of another number of steps is resampled from the nearest one that is at least as fine. All is computed in double
    precision; UserError where neighbouring times would still be the same number in single precision.
    """
    import torch

    check_schedule(schedule)
    if schedule == "uniform":
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    else:
        grids = searched().get(schedule) or {}
        known = written(schedule) or grids[min((n for n in grids if n >= steps), default=max(grids))]
        times = resample_times(torch.tensor(known, dtype=torch.float64), steps)
    times = shift_times(times, shift).float()
    if not (times.diff() > 0).all():
        raise UserError(f"schedule {schedule[:60]!r} at {steps} steps and shift {shift:g}: times are too near each other, choose fewer steps or a shift near 1")
    return times
