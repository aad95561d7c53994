"""Which numbers to compute with: bf16 where the processor or the GPU has units for it, else fp32.

    python -m flowt2i.precision    # what this machine computes in

Weights are fp32 in either case. Without such units (most x86 processors without AVX-512 bf16 or AMX, and older cards) bf16 is emulated, and a
product of matrices takes tens of times as long as in fp32 (docs/experiments.md, "A processor without bf16 units").
"""

import functools
import time
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolved(precision: str, device: torch.device) -> Precision:
    """`train.precision` on a device: what is asked for, or for "auto" what the device is made for."""
    if precision == "auto":
        return "bf16" if has_bf16(device.type) else "fp32"
    return "bf16" if precision == "bf16" else "fp32"


def to_draw(precision: str, device: torch.device) -> Precision:
    """What a model that was trained with this `train.precision`, perhaps elsewhere, computes in here: fp32 does for either."""
    return "fp32" if precision == "fp32" else resolved("auto", device)


def double(x: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which a network computes in a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@functools.cache
def has_bf16(device: str) -> bool:
    """Whether this kind of device ("cpu", "cuda", "mps") has units for bf16. A CPU is tried, for torch has no flag that tells it of all makes."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return True
    tries = [(_seconds(torch.bfloat16), _seconds(torch.float32)) for _ in range(5)]  # by turns: another program's load meets both
    bf16, fp32 = (min(seconds) for seconds in zip(*tries))
    return bf16 < fp32


def _seconds(dtype: torch.dtype, size: int = 256) -> float:
    """Of a product of matrices on the CPU."""
    with torch.autocast("cpu", enabled=False):
        a = torch.ones(size, size, dtype=dtype, device="cpu")
        begun = time.perf_counter()
        a @ a
        return time.perf_counter() - begun


if __name__ == "__main__":
    from flowt2i.training.distributed import best_device

    print(resolved("auto", best_device()))
