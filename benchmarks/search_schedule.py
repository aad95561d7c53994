#!/usr/bin/env python3
"""Search the times of few solver steps that come nearest to what many steps draw from the same seeds, and store them by name.

    python benchmarks/search_schedule.py --model runs/quickstart --solver ab2 --steps 8 --name quickstart

The reference is 100 midpoint steps, 200 evaluations (--reference). Searched is by a (1+1) evolution strategy on the logarithms of the intervals (its
width by the one-fifth rule), from the best of a few shifted grids; what it minimises is the root mean square difference of the pictures, of values in
[0, 1], mean over the pictures. Pictures of other prompts and seeds, which the search never saw, are the test that is printed. The grid goes to
flowt2i/schedules.json under --name, beside those of other numbers of steps, with what it was searched for; `--schedule NAME` and `sample.schedule` know
it from then on.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import ending
from sampling import benchmark_prompts, distances

from flowt2i import Pipeline
from flowt2i.commands.common import newest_run
from flowt2i.errors import UserError
from flowt2i.schedules import SEARCHED, shift_times, uniform_times, written

SHIFTS = (1.0, 2.0, 4.0, 6.0, 9.0)  # of the grids that the search may start from


def distance(images: np.ndarray, reference: np.ndarray) -> float:
    return float(distances(images, reference).mean())


def grid(logs: np.ndarray) -> list[float]:
    """Logarithms of intervals [N] -> times [N + 1] from 0 to 1."""
    lengths = np.exp(logs - logs.max())
    times = np.concatenate([[0.0], np.cumsum(lengths / lengths.sum())])
    return [*map(float, times[:-1].round(5)), 1.0]


def search(
    pipeline: Pipeline, prompts: Sequence[str], reference: np.ndarray, settings: dict[str, Any], steps: int, tries: int, seed: int = 0
) -> tuple[list[float], float]:
    """The best grid found and its distance to the reference, whose first picture has the seed `seed`."""

    def loss(logs: np.ndarray) -> float:
        times = ",".join(map(str, grid(logs)))
        try:
            written(times)
        except UserError:  # intervals so short that they round to nothing
            return math.inf
        return distance(pipeline.sample(prompts, schedule=times, shift=1.0, seed=seed, **settings).images, reference)

    starts = [np.log(np.diff(shift_times(uniform_times(steps).double(), shift).numpy())) for shift in SHIFTS]
    scored = [(loss(logs), i) for i, logs in enumerate(tqdm(starts, desc="starts", leave=False))]
    best, number = min(scored)
    logs, width = starts[number], 0.25
    random = np.random.default_rng(0)
    with tqdm(range(tries), desc="searching", leave=False) as bar:
        for _ in bar:
            candidate = logs + width * random.standard_normal(steps)
            found = loss(candidate)
            if found < best:
                best, logs = found, candidate
            width = max(0.02, width * (1.5 if found <= best else 1.5**-0.25))  # the one-fifth rule (Rechenberg 1973)
            bar.set_postfix(distance=f"{best:.4f}", width=f"{width:.3f}")
    return grid(logs), best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the newest run")
    parser.add_argument("--solver", default="ab2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--reference", type=int, default=100, help="midpoint steps of the reference (default 100)")
    parser.add_argument("--num", type=int, default=32, help="prompts to search with, and as many to test with (default 32)")
    parser.add_argument("--tries", type=int, default=60, help="grids to try (default 60)")
    parser.add_argument("--name", help="store the grid under this name")
    parser.add_argument("--device")
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.model or newest_run(), device=args.device)
    prompts = benchmark_prompts(pipeline, 2 * args.num)
    settings = {"solver": args.solver, "guidance": args.guidance, "steps": args.steps}
    far = pipeline.sample(prompts, steps=args.reference, guidance=args.guidance, solver="midpoint", schedule="uniform", shift=1.0, seed=0).images
    half = args.num
    times, found = search(pipeline, prompts[:half], far[:half], settings, args.steps, args.tries)

    def tested(**schedule: Any) -> float:
        return round(distance(pipeline.sample(prompts[half:], seed=half, **settings, **schedule).images, far[half:]), 4)

    result = {
        "times": times, "distance": round(found, 4), "test": tested(schedule=",".join(map(str, times)), shift=1.0),
        "test_uniform": tested(schedule="uniform", shift=1.0), "test_shift_5": tested(schedule="uniform", shift=5.0),
    }  # fmt: skip
    if args.name:
        known = json.loads(SEARCHED.read_text())
        entry = known.setdefault(args.name, {"times": {}, "found": {}})
        entry["times"][str(args.steps)] = times
        facts = {"model": Path(pipeline.name).name, "solver": args.solver, "guidance": pipeline.settings(guidance=args.guidance)["guidance"]}
        facts |= {"reference": args.reference, "prompts": half, "tries": args.tries}
        entry["found"][str(args.steps)] = facts | {k: v for k, v in result.items() if k != "times"}
        SEARCHED.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(ending.told(main)())
