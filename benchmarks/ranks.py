#!/usr/bin/env python3
"""Throughput of several ranks against one, at one global batch: images a second of `train`, the first steps left out.

    python benchmarks/ranks.py --data data/scenes [--ranks 2] [--parallel ddp] [--steps 60] [--json]

On GPUs one card a rank. On a CPU the cores are shared out: one rank with all of them against N ranks with an Nth each, so that the ratio tells what
the agreement between ranks costs, not what more hardware brings. Run it on an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SETTINGS = ["--config", "quickstart", "--data.batch_size", "64", "--train.eval_images", "16", "--train.score_prompts", "0", "--sample.images", "1",
            "--sample.steps", "1", "--train.log_every", "5", "--optim.name", "adamw", "--train.compile", "off"]  # fmt: skip


def images_per_second(ranks: int, data: Path, run: Path, steps: int, parallel: str) -> float:
    """The median over the log lines of the second half of a training."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "flowt2i", "train", "--data", str(data), "--out", str(run), *SETTINGS]
    command += ["--train.steps", str(steps), "--train.parallel", parallel]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {**os.environ} if torch.cuda.is_available() else {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // ranks))}
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_s"] for line in lines if line["step"] > steps // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        speeds = {n: images_per_second(n, args.data, Path(folder) / str(n), args.steps, args.parallel) for n in (1, args.ranks)}
    result = {"parallel": args.parallel, "one_rank": round(speeds[1], 1), f"{args.ranks}_ranks": round(speeds[args.ranks], 1)}
    result["ratio"] = round(speeds[args.ranks] / speeds[1], 3)
    text = f"{args.parallel}: 1 rank {speeds[1]:.0f} images/s, {args.ranks} ranks {speeds[args.ranks]:.0f} images/s: {result['ratio']:.2f} times"
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    main()
