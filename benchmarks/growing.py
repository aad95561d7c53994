#!/usr/bin/env python3
"""What growing saves: 128 pixels reached by a model grown from 64, against 128 from scratch, at equal compute.

    flowt2i prepare EMOJI_TARS --out data/emoji                                      # 64 pixels
    flowt2i prepare EMOJI_TARS --like data/emoji --image-size 128 --out data/emoji128
    python benchmarks/growing.py --small data/emoji --large data/emoji128 --minutes 60 --out runs/growing

Two arms of `--minutes` each, one after the other on the whole machine: `scratch` trains at the large size from the first step; `grown` trains a share of
the time (`--share`, 0.5) at the small size, then goes on at the large one (`train --init`). Model, batch, optimizer, times and way of drawing are the same at
the large size, learning rates end at zero in each stage, and the normalisation is each one's own. Evaluations at the large size (validation loss of the
averaged weights; kernel distance against held-out pictures, where EfficientNet-lite0 is installed) are told by seconds spent in steps since the arm began,
the small stage counted in. Writes OUT/growing.json and OUT/growing.png, and prints at what share of the time, and of the operations by formula, the grown
arm is as good as the other one at its best.
A second call goes on where the first was stopped. On a machine of several cores or GPUs the arms can run beside each other, on equal parts of it: call it with
`--only grown` and `--only scratch` at once, and then without.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ending
import learning_runs
import machine

from flowt2i.config import load_config, resolve
from flowt2i.schedules import shift_times
from flowt2i.training.distributed import best_device

RECIPE = ["--data.batch_size", "64", "--flow.logit_mean", "-0.8", "--flow.floor", "0.2", "--train.ema", "0.998", "--sample.steps", "16"]


def train(run: Path, data: Path, words: list[str]) -> None:
    """A stage, from its start or from where it was stopped."""
    learning_runs.train_apart(["--data", str(data), "--out", str(run), *words])


def seconds_by_step(run: Path) -> list[tuple[int, float]]:
    """Steps and the seconds spent in them up to there, without evaluations: from the rates of the log."""
    found, seconds, before = [(0, 0.0)], 0.0, 0
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        seconds += (line["images_seen"] - before) / line["images_per_s"]
        before = line["images_seen"]
        found.append((line["step"], seconds))
    return found


def seconds_at(step: int, times: list[tuple[int, float]]) -> float:
    """Seconds spent until a step; the few after the last line of the log took as long as those before it."""
    (before, earlier), (until, spent) = times[-2:]
    if step > until:
        return spent + (step - until) * (spent - earlier) / (until - before)
    return max(spent for other, spent in times if other <= step)


def flops_of(run: Path, data: Path) -> float:
    """Operations of an image's forward and backward pass in a run, by formula."""
    return learning_runs.training_flops(load_config(run / "config.json"), data)


def curve(run: Path, data: Path, seconds: float = 0.0, pflop: float = 0.0) -> list[dict[str, Any]]:
    """The evaluations of a run: seconds and 10^15 operations since its arm began (those before the run are given), step, images of this run, validation
    loss, kernel distance and its error (where it was measured)."""
    times, each = seconds_by_step(run), flops_of(run, data)
    points = []
    for line in map(json.loads, (run / "eval.jsonl").read_text().splitlines()):
        spent = seconds_at(line["step"], times)
        loss = line.get("validation_ema", line["validation"])["loss"]
        cost = {"seconds": round(seconds + spent, 2), "pflop": float(f"{pflop + each * line['images_seen'] / 1e15:.4g}")}
        points.append(cost | {"step": line["step"], "images": line["images_seen"], "loss": loss} | {k: line[k] for k in ("kid", "kid_error") if k in line})
    return points


def reached(points: list[dict[str, Any]], name: str, goal: float) -> dict[str, Any] | None:
    """Where a falling curve first stands at the goal or under it."""
    return next((point for point in points if name in point and point[name] <= goal), None)


def draw(curves: dict[str, list[dict[str, Any]]], small: float, path: Path) -> None:
    """A panel for each measure; a line where the small stage, of `small` seconds, ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = [(name, label) for name, label in (("loss", "validation loss at the large size"), ("kid", "kernel distance"))
                if all(name in point for points in curves.values() for point in points)]  # fmt: skip
    figure, axes = plt.subplots(1, len(measures), figsize=(5.5 * len(measures), 4), squeeze=False, constrained_layout=True)
    for axis, (name, label) in zip(axes[0], measures):
        for arm, points in curves.items():
            errors = [point.get("kid_error", 0.0) if name == "kid" else 0.0 for point in points]
            axis.errorbar([point["seconds"] / 60 for point in points], [point[name] for point in points], errors, marker="o", ms=3, capsize=2, label=arm)
        axis.axvline(small / 60, color="0.5", ls="--", lw=1, label="the small stage ends")
        axis.set(xlabel="minutes of training", ylabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=Path, required=True, metavar="DIR", help="prepared data of the small size")
    parser.add_argument("--large", type=Path, required=True, metavar="DIR", help="the same, prepared at the large size with --like the small one")
    parser.add_argument("--out", type=Path, default=Path("runs/growing"))
    parser.add_argument("--minutes", type=float, default=60, help="training time of an arm (default 60)")
    parser.add_argument("--share", type=float, default=0.5, help="of it at the small size, for the grown arm (default 0.5)")
    every = "steps between evaluations, which may take a twentieth of the time: one that would take more is put off (default 50)"
    parser.add_argument("--every", type=int, default=50, help=every)
    parser.add_argument("--only", choices=("grown", "scratch"), help="train this arm and compare nothing")
    parser.add_argument("--config", default="quickstart")
    args, words = parser.parse_known_args()

    from flowt2i.description import DatasetDescription
    from flowt2i.training.grow import time_shift

    shapes = [DatasetDescription.load(data).codec.shape for data in (args.small, args.large)]
    shift = time_shift(*shapes)
    common = ["--config", args.config, *RECIPE, *words]
    small, grown, scratch = (args.out / name for name in ("small", "grown", "scratch"))
    evaluated = ["--train.eval_every", str(args.every)]
    # The times at the large size are the same for both arms: a growing model is given them, the other one is told.
    config = resolve(args.config, [*RECIPE, *words])
    moved = {"flow.perceptual_from": config.flow.perceptual_from, "sample.guidance_until": config.sample.guidance_until}
    large = ["--flow.time_shift", str(shift), "--sample.shift", str(config.sample.shift * shift), *evaluated]
    for name, time in moved.items():  # as `--init` moves them
        large += [f"--{name}", str(shift_times(time, shift))]
    if args.only != "scratch":
        train(small, args.small, [*common, "--train.minutes", str(args.minutes * args.share)])
        train(grown, args.large, ["--init", str(small), *common, *large, "--train.minutes", str(args.minutes * (1 - args.share))])
    if args.only != "grown":
        train(scratch, args.large, [*common, *large, "--train.minutes", str(args.minutes)])
    if args.only:
        print(f"trained: {args.only}. The same command without --only compares, when both arms are there")
        return

    end = json.loads((small / "eval.jsonl").read_text().splitlines()[-1])  # of the small stage: its last evaluation is after its last step
    offset, small_pflop = seconds_at(end["step"], seconds_by_step(small)), end["images_seen"] * flops_of(small, args.small) / 1e15
    curves = {f"grown from {shapes[0][1]}": curve(grown, args.large, offset, small_pflop), "from scratch": curve(scratch, args.large)}
    ours, theirs = curves.values()
    savings = {}
    for name in ("loss", "kid"):
        if name in theirs[-1]:
            best = min(theirs, key=lambda point: point[name])
            savings[name] = {"scratch": best, "grown": reached(ours, name, best[name]), "grown_best": min(p[name] for p in ours)}
    result = machine.facts(best_device()) | {
        "small": shapes[0],
        "large": shapes[1],
        "minutes": args.minutes,
        "share": args.share,
        "small_seconds": round(offset, 1),
        "small_pflop": float(f"{small_pflop:.4g}"),
        "curves": curves,
        "saving": savings,
    }
    (args.out / "growing.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(curves, offset, args.out / "growing.png")
    for name, found in savings.items():
        one, other = found["scratch"], found["grown"]
        sooner = f"at {other['seconds'] / one['seconds']:.0%} of the time, {other['pflop'] / one['pflop']:.0%} of the operations" if other else "not reached"
        end = f"from scratch {one[name]:.4g} after {one['seconds'] / 60:.1f} min, {one['pflop']:.3g} PFLOP"
        print(f"{name}: {end}; grown is as good {sooner}, and its best is {found['grown_best']:.4g}")


if __name__ == "__main__":
    sys.exit(ending.told(main)())
