"""`flowt2i evaluate`: how good a model is."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowt2i.commands.common import add_model, add_sampling, examples, model_of
from flowt2i.commands.evaluate_compare import compare
from flowt2i.commands.evaluate_options import build_context, check_before, check_names, check_writable
from flowt2i.errors import UserError, told_elsewhere

if TYPE_CHECKING:
    from flowt2i.evaluation.metrics import Context, Scores
    from flowt2i.training.distributed import World


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        description="Scores that say how they were taken.\n\n"
        "  scenes            do pictures of the built-in scenes show what the prompt says? by an exact checker\n"
        "  fid frechet kid   how far are drawn pictures from real ones? beside what real ones score\n"
        "  loss              on held-out images, by time, of raw and averaged weights\n"
        "  clip              how well pictures fit their captions in the eyes of a CLIP, and retrieval of the right one of 100 captions\n"
        "  memorisation      the nearest training picture of every sample, and the share of near copies\n"
        "  scenes-heldout    as scenes, with pairs of colour and shape that training never showed\n"
        "  scenes-counts     as scenes, every prompt with two to four alike; scenes-relations: every prompt with two objects in a relation\n\n"
        "--out DIR writes a report with pictures, --compare A B sets two models side by side. "
        "Pictures are kept under RUN/evaluation/: an evaluation that was stopped goes on where it was.",
        **examples(
            "flowt2i evaluate --model runs/quickstart --num 500",
            "flowt2i evaluate --model runs/quickstart --heldout-pairs --json",
            "flowt2i evaluate --model runs/mine --data data/mine --metrics kid,loss --num 1000",
            "flowt2i evaluate --model runs/mine --data data/mine --metrics fid,kid --net inception --reference train --num 5000",
            "flowt2i evaluate --images pictures/ --reference real_pictures/ --metrics frechet,kid --net facebook/dinov2-small",
            "torchrun --nproc-per-node 2 -m -- flowt2i evaluate --model runs/mine --metrics frechet --num 50000",
            "flowt2i evaluate --model runs/mine --metrics clip --clip openai/clip-vit-base-patch32",
            "flowt2i evaluate --model runs/quickstart --metrics scenes,scenes-heldout,memorisation --out report",
            "flowt2i evaluate --compare runs/quickstart runs/quickstart-seed1 --num 500 --out comparison",
        ),
    )
    add_model(parser)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="score these finished pictures (or .npy of uint8 [N, S, S, 3]) instead of a model")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset to score on (default: the one the model was trained on, where it still is)")
    parser.add_argument("--metrics", help="which scores, with commas between: scenes, scenes-heldout, scenes-counts, scenes-relations, "
                        "clip, memorisation, fid, frechet, kid, loss (default: scenes for a scenes model, else kid)")  # fmt: skip
    parser.add_argument("--num", type=int, help="pictures (default 2000 for scenes, 2048 where fid or frechet are asked for, else 500; with --images all); "
                        "of the loss: held-out images (default: as many as its training looked at)")  # fmt: skip
    parser.add_argument("--net", help="feature net of frechet, kid and memorisation: efficientnet-lite0 (default), inception, or a "
                        "Hugging Face image model by id or folder, such as facebook/dinov2-small")  # fmt: skip
    parser.add_argument("--net-weights", type=Path, metavar="FILE", help="weights of inception, where they are not in torch's cache")
    parser.add_argument("--reference", help="real pictures: heldout (default) or train (of the data), or a folder of images")
    parser.add_argument("--heldout-pairs", action="store_true", help="scenes: ask for pairs of colour and shape that training never showed")
    parser.add_argument("--clip", default="", metavar="ID", help="CLIP of the clip score: Hugging Face id or folder, such as openai/clip-vit-base-patch32")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.html and report.json there: scores, samples, curves, closest training pictures")
    parser.add_argument("--curve-num", type=int, help="report: prompts at each point of the curves over steps and guidance (default 256; 0: none)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two models on the same prompts and noise, with paired intervals")
    add_sampling(parser, seed="scenes: of the prompts, with the noise of picture k always that of seed 1000000 + k; else the noise is that of "
                 "(seed + 1) * 1000000 + k (default 0)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from flowt2i.training import distributed

    world = distributed.start()
    try:
        return evaluate(args, world)
    except distributed.ToldElsewhere:
        return told_elsewhere()
    except UserError as error:
        if isinstance(distributed.said_once(error), distributed.ToldElsewhere):
            return told_elsewhere()
        raise
    finally:
        distributed.stop()


def evaluate(args: argparse.Namespace, world: "World") -> int:
    """One model, or finished pictures; with --compare two models."""
    from flowt2i.evaluation.metrics import METRICS, score

    names = [name.strip() for name in args.metrics.split(",")] if args.metrics is not None else []
    check_before(args, names)
    if args.out:
        world.on_main(lambda: check_writable(args.out))
    if args.compare:
        return compare(args, world)
    model = args.model = None if args.images else model_of(args.model)
    context = build_context(args, world, names)
    is_scenes = bool(context.pipeline and context.pipeline.description.is_scenes)
    names = names or (["scenes"] if is_scenes else ["kid"])
    check_names(args, names, is_scenes)
    outcome = score([name for name in METRICS if name in names], context)
    found, skipped = outcome.found, outcome.skipped
    if world.main and not args.json:  # before the report: what was found stands, whatever becomes of that
        for scores in found.values():
            print(scores.protocol)
            print("\n".join(f"  {line}" for line in scores.lines))
        for name, why in skipped.items():
            print(f"{name} was left out: {why}", flush=True)
    failure, written = outcome.failure, []
    if args.out and model and not failure:
        try:
            written = write_report(args, context, found, skipped, model)
        except Exception as error:
            failure = error
    if world.main:
        if args.json:
            print(json.dumps(as_json(found, skipped) | ({"report": written} if written else {})))
        elif written:
            print("\n".join(written))
    if failure:
        raise failure
    return 0


def write_report(args: argparse.Namespace, context: "Context", found: "dict[str, Scores]", skipped: dict[str, str], model: Path) -> list[str]:
    """Measure what the report shows beside the scores, and write it; the files."""
    from flowt2i.evaluation.assemble import CURVE, assemble
    from flowt2i.evaluation.report import write

    report, pictures = assemble(context, found, model, skipped, CURVE if args.curve_num is None else args.curve_num)
    return [str(path) for path in write(report, pictures, args.out)] if context.world.main else []


def as_json(found: "dict[str, Scores]", skipped: dict[str, str]) -> dict[str, Any]:
    """One object: every score under its full name, then what belongs to them."""
    values: dict[str, Any] = {}
    for scores in found.values():
        values |= scores.values
    for scores in found.values():
        for kind, entries in scores.details.items():
            values[kind] = values.get(kind, {}) | entries
    protocols = {name: scores.protocol for name, scores in found.items()}
    values |= {"protocol": " | ".join(protocols.values()), "protocols": protocols}
    return values | ({"skipped": skipped} if skipped else {})
