"""`flowt2i evaluate`: how good a model is."""

import argparse
import json
from pathlib import Path
from typing import Any

from flowt2i.commands.common import add_model, add_sampling, examples, load_pipeline, sampling
from flowt2i.errors import UserError, nearest


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a model",
        description="Prompt following on the built-in scenes, judged by an exact checker, with 95% intervals.",
        **examples("flowt2i evaluate --model runs/quickstart --num 500", "flowt2i evaluate --model runs/quickstart --heldout-pairs --json"),
    )
    add_model(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset to score on; scenes need none, their prompts are drawn anew")
    parser.add_argument("--metrics", default="scenes", help="which scores, with commas between: scenes")
    parser.add_argument("--num", type=int, default=500, help="prompts (default 500)")
    parser.add_argument("--heldout-pairs", action="store_true", help="ask for pairs of colour and shape that training never showed")
    add_sampling(parser, seed="seed of the prompts; the noise of picture k is always that of seed 1000000 + k (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in args.metrics.split(","):
        if name != "scenes":
            raise UserError(f"no metric {name!r}{nearest(name, ['scenes'])}")
    if args.num < 1:
        raise UserError("--num must be at least 1")
    from flowt2i.description import DatasetDescription

    if args.data and not DatasetDescription.load(args.data).is_scenes:
        raise UserError(f"the scenes score is for the built-in data, and {args.data} is not: leave out --data, or prepare `scenes`")
    pipeline = load_pipeline(args)
    if not pipeline.description.is_scenes:
        raise UserError("the scenes score asks for shapes and colours, but this model was trained on other data")
    from flowt2i.evaluation.scenes import score_pipeline
    from flowt2i.settings import describe

    asked = sampling(args)
    scores = score_pipeline(pipeline, args.num, seed=args.seed, heldout=args.heldout_pairs, progress=True, **asked)
    away = {name: str(asked.pop(name) or "") for name in ("negative", "guide")}
    used = pipeline.settings(**asked) | {name: value for name, value in away.items() if value}
    kind = "heldout-pairs" if args.heldout_pairs else "prompts"
    title = f"scenes-{kind}-{args.num}@{pipeline.description.codec.image_size}"
    protocol = f"{title}, {describe(used)}, prompt seed {args.seed}, {pipeline.weights} weights"
    if args.json:
        values = {f"{title}/{part}": score["accuracy"] for part, score in scores.items()}
        print(json.dumps(values | {"intervals": {f"{title}/{part}": score for part, score in scores.items()}, "protocol": protocol}))
    else:
        print(protocol)
        for part, score in scores.items():
            print(f"  {part:14s} {score['accuracy']:6.1%}   [{score['low']:.1%}, {score['high']:.1%}]   n={score['n']}")
    return 0
