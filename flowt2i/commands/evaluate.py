"""`flowt2i evaluate`: how good a model is."""

import argparse
import json
from pathlib import Path
from typing import Any

from flowt2i.commands.common import add_model, add_sampling, examples, load_pipeline, newest_run
from flowt2i.errors import UserError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a model",
        description="Scores with their protocol and 95% intervals; with --out a report (report.html, report.json); with --compare two models side by side.",
        **examples(
            "flowt2i evaluate --model runs/quickstart",
            "flowt2i evaluate --model runs/quickstart --metrics scenes,scenes-heldout,memorisation --data data/scenes --out report",
            "flowt2i evaluate --compare runs/quickstart runs/quickstart-seed1 --num 500 --out comparison",
            "flowt2i evaluate --model runs/mine --data data/mine --metrics clip --clip openai/clip-vit-base-patch32 --json",
        ),
    )
    add_model(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset to score on; scenes need none, their prompts are drawn anew")
    parser.add_argument("--metrics", default="scenes", help="which scores, with commas between")
    parser.add_argument("--num", type=int, default=2_000, help="pictures (default 2000, enough to publish)")
    parser.add_argument("--heldout-pairs", action="store_true", help="ask for pairs of colour and shape that training never showed")
    add_report(parser)
    add_sampling(parser, seed="of the prompts; the noise of picture k is that of seed (SEED + 1) x 1000000 + k (default 0)")
    parser.set_defaults(run=run)


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", default="", metavar="ID", help="CLIP of the clip score: Hugging Face id or folder, such as openai/clip-vit-base-patch32")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.html and report.json there, with samples and curves over steps and guidance")
    parser.add_argument("--curve-num", type=int, default=256, help="report: prompts at each point of the curves; 0: no curves (default 256)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two models on the same prompts and noise, with paired intervals")


def run(args: argparse.Namespace) -> int:
    if args.num < 1 or args.curve_num < 0:
        raise UserError("--num must be at least 1, --curve-num at least 0")
    if args.compare:
        return compare(args)
    from flowt2i.evaluation.metrics import find, score

    names = [name for name in args.metrics.split(",") if name]
    for name in names:
        find(name)
    args.model = args.model or newest_run()
    context = context_of(args, args.model)
    found, skipped = score(names, context)
    result: dict[str, Any] = {}
    for scores in found.values():
        result |= scores.values
    result |= {"intervals": {k: v for scores in found.values() for k, v in scores.details.get("intervals", {}).items()}}
    result |= {"protocol": "; ".join(scores.protocol for scores in found.values())}
    if args.out:
        result["report"] = write_report(args, context, found, skipped)
    if args.json:
        print(json.dumps(result))
    else:
        for scores in found.values():
            print("\n".join([scores.protocol, *scores.lines]))
        print("\n".join([*skipped.values(), *result.get("report", [])]))
    return 0


def write_report(args: argparse.Namespace, context: Any, found: Any, skipped: dict[str, str]) -> list[str]:
    """The files written."""
    from flowt2i.evaluation.assemble import assemble
    from flowt2i.evaluation.report import write

    report, pictures = assemble(context, found, args.model, skipped, args.curve_num)
    return [str(path) for path in write(report, pictures, args.out)] if context.world.main else []


def compare(args: argparse.Namespace) -> int:
    """Two models, paired."""
    if args.model:
        raise UserError("--compare A B names both models: leave out --model")
    from flowt2i.evaluation.assemble import set_side_by_side
    from flowt2i.evaluation.report import write

    first, second = (context_of(args, model) for model in args.compare)
    report, pictures = set_side_by_side(first, second, tuple(args.compare))
    found: dict[str, Any] = dict(report.comparison)
    if args.out:
        found["report"] = [str(path) for path in write(report, pictures, args.out)]
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"A: {found['a']}\nB: {found['b']}\n{found['n']} prompts, the same noise for both; B - A with its paired 95% interval")
    for name, row in found["scores"].items():
        d, form = row["difference"], (lambda v: f"{v:+.1%}") if row["share"] else (lambda v: f"{v:+.3f}")
        values = f"{row['a']:6.1%} {row['b']:6.1%}" if row["share"] else f"{row['a']:6.3f} {row['b']:6.3f}"
        p = f"   p={d['p']:.2g}" if "p" in d else ""
        print(f"  {name:24s} {values}   {form(d['difference'])} [{form(d['low'])}, {form(d['high'])}]   n={d['n']}{p}")
    print("\n".join(found.get("report", [])))
    return 0


def context_of(args: argparse.Namespace, model: Path) -> Any:
    """What a model's scores are made from."""
    from flowt2i.evaluation.metrics import Context
    from flowt2i.training import distributed

    args.model = model
    pipeline = load_pipeline(args)
    settings = {"steps": args.steps, "solver": args.solver, "guidance": args.guidance, "shift": args.shift}
    pipeline.settings(**settings)
    if args.data:
        check_data(args.data, pipeline)
    return Context(
        distributed.start(600), args.num, pipeline, args.data, seed=args.seed, settings=settings, clip_name=args.clip, heldout_pairs=args.heldout_pairs,
        run=None, source=model,
    )  # fmt: skip


def check_data(data: Path, pipeline: Any) -> None:
    """UserError where the dataset is not of the kind that the model was trained on."""
    from flowt2i.description import DatasetDescription, require_same

    description = DatasetDescription.load(data)
    if description.is_scenes != pipeline.description.is_scenes:
        raise UserError(
            f"{pipeline.name} was trained on {pipeline.description.source or 'other data'}, {data} holds {description.source}: give the model's own data"
        )
    require_same(pipeline.description.codec, description.codec, "codec of the model and of the data")
