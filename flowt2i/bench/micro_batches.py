"""The largest micro-batch that fits, and the fastest one."""

from collections.abc import Callable
from typing import Any

import torch

from flowt2i.bench.footprint import footprint
from flowt2i.bench.step import BareStep
from flowt2i.bench.timing import Budget, memory_bytes
from flowt2i.errors import UserError


def divisors(batch: int) -> list[int]:
    return [size for size in range(1, batch + 1) if batch % size == 0]


def largest_that_fits(sizes: list[int], fits: Callable[[int], bool]) -> int:
    """The largest of `sizes` (ascending) that fits, by bisection; 0 where none does. What fits at one size fits at all smaller ones."""
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else 0


def largest(step: BareStep, batch: int) -> tuple[int, str]:
    """The largest micro-batch of an effective batch that fits, and how that is known: "measured" on a GPU, "computed" where memory is virtual.

    UserError where not even one image fits.
    """
    sizes = divisors(batch)
    if step.device.type == "cuda":
        found = largest_that_fits(sizes, step.fits)
    else:
        models = [step.model, *([step.ema.model] if step.ema else [])]
        there = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
        most = footprint(step).largest((memory_bytes(available=True) or memory_bytes()) + there)
        found = largest_that_fits(sizes, lambda size: size <= most)
    if not found:
        raise UserError(f"not even one image fits into memory: choose a smaller model (--model.width, --model.depth){_capacity(step.device)}")
    return found, "measured" if step.device.type == "cuda" else "computed"


def _capacity(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f"; {torch.cuda.get_device_name(device)} has {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB"


def rates(step: BareStep, batch: int, first: int, most: int, update: float, cost: float, budget: Budget, bar: Any) -> dict[int, float]:
    """Images a second at micro-batches other than `first`, by turns smaller and larger, while time is left.

    most: the largest that fits; update: seconds of clipping, optimizer and EMA, once a step; cost: seconds it took to measure `first`, since each size is
    compiled anew.
    """
    out: dict[int, float] = {}
    for size in neighbours(first, batch, most):
        if cost * max(1.0, size / first) > budget.left:
            break
        bar.set_description(f"training, micro-batch {size}")
        out[size] = batch / (batch // size * step.micro_seconds(size) + update)
    return out


def neighbours(first: int, batch: int, most: int) -> list[int]:
    """Divisors of the batch near `first`, up to `most`: about half and twice of it, then a quarter and four times."""
    sizes = [size for size in divisors(batch) if size <= most]
    out: list[int] = []
    for wanted in (first / 2, first * 2, first / 4, first * 4):
        near = min(sizes, key=lambda size: abs(size - wanted))
        if 0.7 < near / wanted < 1.5 and near != first and near not in out:
            out.append(near)
    return out
