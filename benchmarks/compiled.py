#!/usr/bin/env python3
"""What compiling the ends of the network and the loss saves of a training step, and what masks that look at their pixel cost of it.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --batch 32 --preset quickstart --out benchmarks/results/compiled-ends.json

Steps of four kinds by turns: with the blocks alone compiled, or all that training compiles; each without `model.pixel_masks` and with 4. Prints medians in
milliseconds, and their ratios to the first. Settings after the options (`--model.width 128 …`) hold for all. Run it on an idle machine; about three minutes.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import ending
import machine
import torch

from flowt2i.bench.step import BareStep, describe
from flowt2i.bench.timing import clock
from flowt2i.cli import Parser
from flowt2i.config import resolve
from flowt2i.errors import UserError
from flowt2i.training.compiling import compile_blocks, compile_training, has_compiler
from flowt2i.training.distributed import best_device

TOKENS = 21  # of every caption: the longest of the built-in scenes
MASKS = (0, 4)


@ending.told
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quickstart", help="(default quickstart)")
    parser.add_argument("--batch", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--steps", type=int, default=30, help="of each kind, by turns (default 30)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result there, as JSON")
    args, settings = parser.parse_known_args()
    if args.batch < 1 or args.steps < 1:
        raise UserError("--batch and --steps are at least 1")
    if not has_compiler():
        raise UserError("torch.compile needs a C++ compiler and Python's headers, which are not here")
    device = best_device()
    steps: dict[str, BareStep] = {}
    for masks in MASKS:
        for what, compile_it in {"blocks": lambda step: compile_blocks(step.model), "all": lambda step: compile_training(step.objective)}.items():
            config = resolve(args.preset, [*settings, "--model.pixel_masks", str(masks)])
            step = steps[f"{masks} pixel masks, {what} compiled"] = BareStep(config, describe(False, TOKENS), {TOKENS: 1}, device, compiled=True)
            compile_it(step)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        print(f"compiling: {name}", file=sys.stderr)
        for _ in range(3):
            step.step(args.batch, 1)
    for turn in range(args.steps):
        for name, step in list(steps.items())[:: 1 - 2 * (turn % 2)]:  # back and forth, so that a drift meets all alike
            began = clock(device)
            step.step(args.batch, 1)
            seconds[name].append(clock(device) - began)
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    found = {name: {"ms": round(ms, 2), "ratio": round(ms / first, 3)} for name, ms in medians.items()}
    if args.out:
        asked = {"preset": args.preset, "batch": args.batch, "settings": settings}
        args.out.write_text(json.dumps({**asked, "steps": found, **machine.facts(device)}, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:<32} {value['ms']:8.1f} ms  {value['ratio']:.3f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
