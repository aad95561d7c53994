"""What the machine's matrix units can do: the fastest of a few bare matrix products."""

import torch

from flowt2i.bench.timing import Budget, fastest_of
from flowt2i.config import ModelConfig
from flowt2i.errors import UserError
from flowt2i.memory import is_out_of_memory
from flowt2i.model import swiglu_hidden
from flowt2i.precision import DTYPES, Precision, has_bf16


def matrix_ceilings(precision: Precision, model: ModelConfig, rows: int, device: torch.device, seconds: float = 5.0) -> dict[str, float]:
    """TFLOP/s of bare products by name, "bf16 4096x4096x4096": the model's own sizes and squares in this precision, a square in the other
    where the device has units for it.

    model: resolved; rows: image tokens of a micro-batch. A size that does not fit into memory is left out, and the last ones where the time
    is up; UserError where none fits.
    """
    d = model.width
    hidden = 2 * swiglu_hidden(d, model.mlp_ratio) if model.block == "modern" else int(d * model.mlp_ratio)
    squares = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 4096)
    sizes: list[tuple[Precision, int, int, int]] = [(precision, rows, d, 3 * d), (precision, rows, d, hidden), *((precision, n, n, n) for n in squares)]
    other: Precision = "fp32" if precision == "bf16" else "bf16"
    if other == "fp32" or has_bf16(device.type):  # emulated, a single product would take seconds
        sizes.append((other, squares[1], squares[1], squares[1]))
    out: dict[str, float] = {}
    budget = Budget(seconds)
    for name, n, k, m in sizes:
        if out and not budget.left:
            break
        try:
            out[f"{name} {n}x{k}x{m}"] = matrix_rate(n, k, m, DTYPES[name], device, seconds / len(sizes))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    if not any(name.startswith(precision) for name in out):
        raise UserError("not even a single matrix product fits into memory: free what else uses it")
    return out


def matrix_rate(n: int, k: int, m: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """TFLOP/s of `[n, k] @ [k, m]`, the fastest of several."""
    a, b = torch.randn(n, k, device=device).to(dtype), torch.randn(k, m, device=device).to(dtype)
    return 2 * n * k * m / fastest_of(lambda: a @ b, device, least=3, seconds=seconds) / 1e12
