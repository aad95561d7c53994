#!/usr/bin/env python3
"""How long a resume takes to find its place in the stream: there is nothing to replay, an epoch's order is drawn anew and entered.

    python benchmarks/resume_seek.py [--step 1000000] [--samples 2000000] [--batch 576] [--json]

Times the order of one epoch, the first batch of a resume at this step, and the batch after it, without reading any data.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator

import numpy as np

from flowt2i.training import stream


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def first_batches(step: int, samples: int, batch: int) -> Iterator[list[int]]:
    return iter(stream.StepSampler(0, [np.arange(samples)], batch, batch, 0, 1, first_step=step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=576)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    permutation = timed(lambda: stream.permutation(0, 0, args.samples))
    stream.permutations.cache_clear()
    at_start = timed(lambda: next(first_batches(0, args.samples, args.batch)))
    stream.permutations.cache_clear()
    batches = first_batches(args.step, args.samples, args.batch)
    seek, following = timed(lambda: next(batches)), timed(lambda: next(batches))
    result = vars(args) | {"permutation_s": permutation, "first_batch_at_step_0_s": at_start, "seek_s": seek, "next_batch_s": following}
    del result["json"]
    if args.json:
        print(json.dumps({key: round(value, 6) for key, value in result.items()}))
    else:
        print(
            f"resume at step {args.step:,} of {args.samples:,} samples, batch {args.batch}: first batch after {seek * 1e3:.1f} ms "
            f"(at step 0: {at_start * 1e3:.1f} ms; the order of an epoch {permutation * 1e3:.1f} ms; a batch after that {following * 1e3:.2f} ms)"
        )


if __name__ == "__main__":
    main()
