#!/usr/bin/env python3
"""A model before and after some minutes on a folder of own pictures: all weights, and low-rank adapters.

    python benchmarks/fine_tune.py --model scenes --images my_images/ --minutes 10 --out runs/fine_tune
    python benchmarks/fine_tune.py --model emoji --data data/own --arms full --minutes 5 --optim.lr 3e-4      # prepared with --like emoji; any setting

Prepares the folder as the model reads it (`prepare --like MODEL`), a share of it held out (`--heldout`), and trains each arm for `--minutes` by
`flowt2i train --init MODEL` at the model's own learning rates: `full` with `flow.edges` 4 where the model puts out clean pictures, `lora` as adapters of
rank `--rank` by AdamW. Measured of the model and of each arm, averaged weights, on the same noise and times:

    loss           of the held-out pictures (`evaluate --metrics loss`)
    kid-heldout    kernel distance on EfficientNet-lite0 between `--num` pictures of held-out captions and the held-out pictures, with its standard error
    kid-train      the same pictures against those that were trained on: far below kid-heldout, it has learned them by heart

Writes OUT/fine_tune.json, .md (the table) and .png: held-out pictures, and what each model draws of their captions, the first ones, not picked. A second call
goes on where the first was stopped.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ending
import learning_runs
import machine
import numpy as np
from growing import seconds_by_step

from flowt2i.data.dataset import ImageTextDataset
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import nets, reference
from flowt2i.evaluation.distribution import LEAST_KERNEL
from flowt2i.evaluation.metrics import Context, Scores, score
from flowt2i.grid import grid
from flowt2i.pipeline import Pipeline, save_png
from flowt2i.training import start
from flowt2i.training.distributed import World

ARMS = ("full", "lora")
SHOWN = 8  # captions in the picture
QUIET = ["--train.eval_every", "0", "--train.score_images", "0", "--train.score_prompts", "0"]  # nothing takes time from the training


def settings(arm: str, model: start.Start, rank: int, minutes: float) -> list[str]:
    """What `flowt2i train` is told of an arm."""
    own = {"full": ["--flow.edges", "4"] if model.model.target == "x" else [], "lora": ["--lora", str(rank)]}
    return [*own[arm], "--train.minutes", f"{minutes:g}", *QUIET]


def measure(model: str | Path, data: Path, num: int, keep: Path, progress: bool = True) -> tuple[dict[str, Any], np.ndarray]:
    """Scores of a model on new data, and its pictures of held-out captions, uint8 [num, S, S, 3], which are kept under KEEP/evaluation."""
    folder = start.find(model).folder
    pipeline = Pipeline.from_pretrained(folder)
    count = DatasetDescription.load(data).heldout_count  # of the loss: all, and the same noise for every model
    context = Context(World(0, 1, pipeline.device), num, pipeline, data, given_num=count, run=keep, source=folder, progress=progress)
    found: dict[str, Any] = {"loss": loss(context)}
    for real in ("heldout", "train"):
        context = replace(context, real=real, _references={})  # pictures and their features stay
        kid = scored("kid", context)
        title = min(kid.values, key=len)
        value, error, floor = kid.values[title], kid.details["errors"][title], kid.values[f"{title}/floor"]
        found[f"kid-{real}"] = {"value": value, "error": error, "floor": floor, "protocol": kid.protocol}
    return found, context.images()


def loss(context: Context) -> dict[str, Any]:
    """Of the weights that are drawn with, the mean and by time."""
    found, own = scored("loss", context), f"/{context.need_pipeline('loss').weights.lower()}"
    bins = {name.rpartition("/")[2]: value for name, value in found.values.items() if f"{own}/" in name}
    return {"value": next(value for name, value in found.values.items() if name.endswith(own)), "bins": bins, "protocol": found.protocol}


def scored(name: str, context: Context) -> Scores:
    """A score by `flowt2i evaluate`'s own metric."""
    outcome = score([name], context)
    if outcome.failure:
        raise outcome.failure
    return outcome.found[name]


def heldout_pictures(data: Path, pipeline: Pipeline, count: int) -> tuple[np.ndarray, list[str]]:
    """The first held-out pictures in the order in which their captions are drawn, uint8 [count, S, S, 3], and these captions."""
    dataset = ImageTextDataset(data, "heldout")
    captions = dataset.captions()
    rows = reference.captioned(captions)[:count]
    return reference.real_images(dataset, pipeline.codec, rows), [captions[row] for row in rows]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a model."""
    lines = ["| model | held-out loss | kid-heldout × 1000 | kid-train × 1000 | steps | time in steps |", "|---|---|---|---|---|---|"]
    for name, found in results.items():
        kids = [f"{found[kid]['value'] * 1000:.1f} ± {found[kid]['error'] * 1000:.1f}" for kid in ("kid-heldout", "kid-train")]
        trained = [f"{found['steps']:,}", f"{found['seconds'] / 60:.1f} min"] if "steps" in found else ["", ""]
        lines.append("| " + " | ".join([name, f"{found['loss']['value']:.4f}", *kids, *trained]) + " |")
    floor = next(iter(results.values()))["kid-heldout"]["floor"]
    return "\n".join([*lines, "", f"± one standard error. Half of the held-out pictures against the other half: {floor * 1000:.1f}."])


def prepared(args: argparse.Namespace, model: start.Start) -> Path:
    """The data to adapt to. UserError where they are not of the model's kind and size, or too few."""
    data = args.data or args.out / "data"
    if args.images:
        prepare(PrepareOptions.of(sources=[str(args.images)], out=data, like=args.model, heldout=args.heldout))
    description = learning_runs.described(data)
    start.require_fit(args.model, model.description, description)
    ours, theirs = model.description.codec.image_size, description.codec.image_size
    if ours != theirs:
        raise UserError(
            f"{data} was prepared at {theirs} pixels, and {args.model} draws {ours}: before and after would not compare; prepare it with --like alone"
        )
    return data


def require_same(out: Path, plan: dict[str, Any]) -> None:
    """UserError where the folder holds a comparison of another kind; else what this one is, is written down."""
    file = out / "plan.json"
    before = json.loads(file.read_text()) if file.exists() else plan
    if other := next((name for name in plan if before.get(name) != plan[name]), None):
        raise UserError(
            f"{out} holds a comparison with {other} {before.get(other)!r}, and this one has {plan[other]!r}: choose another --out, or remove that folder"
        )
    learning_runs.write_whole(file, json.dumps(plan, indent=1))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run folder, checkpoint, exported model, name of a packaged model or hub id")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of captioned images (or another source of `flowt2i prepare`)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="or data that `flowt2i prepare --like MODEL` made")
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tune"))
    parser.add_argument("--minutes", type=float, default=10, help="training time of each arm (default 10)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default 8)")
    parser.add_argument("--heldout", type=float, default=0.2, help="share of the images that is held out (default 0.2)")
    parser.add_argument("--num", type=int, default=200, help="pictures drawn of each model (default 200)")
    args, rest = parser.parse_known_args(words)
    if bool(args.images) == bool(args.data):
        raise UserError("what is the model to adapt to? give --images DIR, or --data DIR of prepared data")
    if args.minutes <= 0 or args.num < LEAST_KERNEL:
        raise UserError(f"--minutes must be above 0 and --num at least {LEAST_KERNEL}, below which a kernel distance is all error")
    if not nets.has_efficientnet():
        raise UserError(f"the kernel distance needs EfficientNet-lite0: {nets.EFFICIENTNET_INSTALL}")
    model = start.find(args.model)
    start.configuration(args.model, model, model.description, rest)  # a setting that is none is told before any work
    args.out.mkdir(parents=True, exist_ok=True)
    data = prepared(args, model)
    told = {arm: [*settings(arm, model, args.rank, args.minutes), *rest] for arm in ARMS}
    require_same(args.out, {
        "model": args.model, "data": DatasetDescription.load(data).fingerprint, "minutes": args.minutes, "rank": args.rank, "num": args.num, "settings": rest,
        "arms": told
    })  # fmt: skip

    results, drawn = {}, {}
    results["before"], drawn["before"] = measure(args.model, data, args.num, args.out / "before")
    for arm in args.arms:
        run = args.out / arm
        done = args.out / f"{arm}.json"
        if not done.exists():
            learning_runs.train_apart(["--init", args.model, "--data", str(data), "--out", str(run), *told[arm]])
            step, seconds = seconds_by_step(run)[-1]
            learning_runs.write_whole(done, json.dumps({"steps": step, "seconds": round(seconds, 1), "settings": told[arm]}))
        found, drawn[arm] = measure(run, data, args.num, run)
        results[arm] = found | json.loads(done.read_text())

    pipeline = Pipeline.from_pretrained(model.folder)
    real, captions = heldout_pictures(data, pipeline, SHOWN)
    columns = {"held-out picture": real, **{name: images[: len(real)] for name, images in drawn.items()}}
    titles = {name: f"{name}, {found['steps']:,} steps" if "steps" in found else name for name, found in results.items()}
    cells = [(images[k], titles.get(name) or f"{name}: {captions[k]}") for k in range(len(real)) for name, images in columns.items()]
    save_png(grid([image for image, _ in cells], [caption for _, caption in cells], columns=len(columns)), args.out / "fine_tune.png")
    counts = DatasetDescription.load(data)
    facts = {"model": args.model, "minutes": args.minutes, "rank": args.rank, "train": counts.train_count, "heldout": counts.heldout_count}
    learning_runs.write_whole(args.out / "fine_tune.json", json.dumps(machine.facts(pipeline.device) | facts | {"results": results}, indent=1))
    learning_runs.write_whole(args.out / "fine_tune.md", table(results))
    print(table(results))
    print(f"{args.out}/fine_tune.png, .json, .md")


if __name__ == "__main__":
    sys.exit(ending.told(main)())
