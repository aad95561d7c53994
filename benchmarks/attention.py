#!/usr/bin/env python3
"""Written-out attention against torch's fused kernel at the shapes of a training step, forward and backward.

    python benchmarks/attention.py [--batch 32] [--heads 3] [--image-tokens 64] [--text-tokens 21] [--json]
    for n in 64 256 484 1024; do python benchmarks/attention.py --batch 4 --heads 6 --image-tokens $n --json; done   # where `model.attend` should switch

Prints milliseconds of the best of several runs for each path, eager and compiled, and their ratio. Run on an idle machine.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from flowt2i.model import mask_bias


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As `model.attend` has it on a CPU, also beyond the number of keys from which that takes the fused kernel."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias.to(q.dtype)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def milliseconds(function, inputs: list[Tensor], bias: Tensor, runs: int = 20) -> float:
    """Best time of a forward and backward pass."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        function(*inputs, bias).float().square().mean().backward()
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 32), ("heads", 3), ("image-tokens", 64), ("text-tokens", 21)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keys = args.image_tokens + args.text_tokens
    make = lambda tokens: torch.randn(args.batch, args.heads, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    inputs, bias = [make(args.image_tokens), make(keys), make(keys)], mask_bias(torch.ones(args.batch, keys, dtype=torch.bool))
    result = {}
    for kind, wrap in (("eager", lambda f: f), ("compiled", torch.compile)):
        for name, function in (("written out", written_out), ("fused", fused)):
            run = wrap(function)
            milliseconds(run, inputs, bias, 3)
            result[f"{name}, {kind}"] = round(milliseconds(run, inputs, bias), 3)
        result[f"fused / written out, {kind}"] = round(result[f"fused, {kind}"] / result[f"written out, {kind}"], 2)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:32s} {value:8.3f}{'' if '/' in name else ' ms'}")


if __name__ == "__main__":
    main()
