#!/usr/bin/env python3
"""How long a save stops the training, and how long the write beside it takes: seed model (about 120M parameters), EMA, AdamW.

    python benchmarks/checkpoint_stall.py [--saves 3] [--out DIR] [--sharing] [--json]

Needs about 2 GB of disk a checkpoint (two at a time) in DIR (default: a temporary folder) and 6 GB of memory. A training reserves the
memory for the copies beside its first steps; here that is waited for. --sharing: matrices are multiplied while the write goes on, and how much
slower they are then is told too (on a GPU the training does not share the processor with the write).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from flowt2i.config import ModelConfig, resolve
from flowt2i.model import FlowTransformer, count_parameters
from flowt2i.training.distributed import World, best_device
from flowt2i.training.ema import EMA
from flowt2i.training.optim import Optimizer
from flowt2i.training.saver import Saver


def work(device: torch.device, seconds: float = 0.0, saver: Saver | None = None) -> float:
    """Matrix products a second, for so long or until nothing is being written any more."""
    a = torch.randn(512, 512, device=device)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or (saver and saver.writing):
        a @ a
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sharing", action="store_true", help="work while the write goes on, and tell how much slower it was")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    device = best_device()
    seed: ModelConfig = resolve("seed").model.resolve("vae", (4, 8, 8))
    model = FlowTransformer(seed, (4, 8, 8), text_dim=512).to(device)
    ema, optimizer = EMA(model, 0.9999), Optimizer(resolve("seed").optim, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    optimizer.zero_grad()
    tensors = {"model": model.state_dict(), "ema": ema.model.state_dict(), "optimizer": optimizer.state()}
    alone, shared = (work(device, 3.0) if args.sharing else 0.0), []
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        saver = Saver(World(0, 1, device), Path(folder), keep_recent=1, keep_every=0)
        start = time.perf_counter()
        saver.reserve(tensors)
        saver.settle()
        reserve = time.perf_counter() - start
        for step in range(1, args.saves + 1):
            saver.save(step, tensors, {"state.json": "{}"}, {})
            if args.sharing:
                shared.append(work(device, saver=saver))
            saver.wait()
    reports = saver.reports
    result = {
        "device": str(device), "parameters": count_parameters(model)["total"], "bytes": int(reports[0]["bytes"]),
        "stall_s": max(r["stall_s"] for r in reports), "write_s": max(r["write_s"] for r in reports), "reserve_s": round(reserve, 4),
    }  # fmt: skip
    if args.sharing:
        result["speed_while_writing"] = round(sum(shared) / len(shared) / alone, 3)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['parameters'] / 1e6:.1f}M parameters with EMA and AdamW, {result['bytes'] / 2**20:,.0f} MiB on {device}: a save stalls the training for "
            f"{result['stall_s']:.2f} s, its write takes {result['write_s']:.1f} s beside it (memory reserved in {result['reserve_s']:.1f} s)"
            + (f", which runs at {result['speed_while_writing']:.0%} of its speed meanwhile" if args.sharing else "")
        )


if __name__ == "__main__":
    main()
