"""`flowt2i evaluate`: how good a model is."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowt2i.commands.common import add_model, add_sampling, examples, load_pipeline, newest_run, sampling
from flowt2i.errors import UserError, told_elsewhere

if TYPE_CHECKING:
    from flowt2i.evaluation.metrics import Context, Scores
    from flowt2i.training.distributed import World

SAMPLING = ("steps", "solver", "schedule", "shift", "tolerance", "guidance", "guidance_rule", "guidance_rescale", "zero_init", "negative", "guide")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        description="Scores that say how they were taken.\n\n"
        "  scenes            do pictures of the built-in scenes show what the prompt says? by an exact checker\n"
        "  fid frechet kid   how far are drawn pictures from real ones? beside what real ones score\n"
        "  loss              on held-out images, by time, of raw and averaged weights\n"
        "  clip              how well pictures fit their captions in the eyes of a CLIP, and retrieval of the right one of 100 captions\n"
        "  memorisation      the nearest training picture of every sample, and the share of near copies\n"
        "  scenes-heldout    as scenes, with pairs of colour and shape that training never showed\n\n"
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
    parser.add_argument("--metrics", help="which scores, with commas between: scenes, scenes-heldout, clip, memorisation, fid, frechet, kid, loss "
                        "(default: scenes for a scenes model, else kid)")  # fmt: skip
    parser.add_argument("--num", type=int, help="pictures (default 2000 for scenes, 2048 where fid or frechet are asked for, else 500; with --images all); "
                        "of the loss: held-out images (default: as many as its training looked at)")  # fmt: skip
    parser.add_argument("--net", help="feature net of frechet, kid and memorisation: efficientnet-lite0 (default), inception, or a "
                        "Hugging Face image model by id or folder, such as facebook/dinov2-small")  # fmt: skip
    parser.add_argument("--net-weights", type=Path, metavar="FILE", help="weights of inception, where they are not in torch's cache")
    parser.add_argument("--reference", default="heldout", help="real pictures: heldout (default) or train (of the data), or a folder of images")
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
    from flowt2i.evaluation.metrics import METRICS, find, score

    names = [name.strip() for name in args.metrics.split(",")] if args.metrics is not None else []
    for name in names:  # before the work, not after it
        find(name)
    if args.num is not None and args.num < 1:
        raise UserError("--num must be at least 1")
    if args.images and args.model:
        raise UserError("--images scores pictures without a model: leave out --model or --images")
    if args.net_weights and args.net != "inception" and "fid" not in names:
        raise UserError("--net-weights goes with inception (--metrics fid, or --net inception): for another net give the folder of the model itself")
    if not 0 <= args.seed < 10**9:
        raise UserError("--seed must be between 0 and 10^9")
    if args.curve_num is not None and args.curve_num < 0:
        raise UserError("--curve-num must be at least 0")
    if args.images and (args.out or args.compare):
        raise UserError("the report and the comparison need models: leave out --images")
    if args.compare:
        return compare(args, world)
    if args.curve_num is not None and not args.out:
        raise UserError("--curve-num is about the report: add --out DIR, or leave it out")
    if args.images:
        refuse_options_of_models(args)
    if args.out:
        world.on_main(lambda: check_writable(args.out))
    model = None if args.images else args.model or newest_run()
    context = build_context(args, world, names)
    is_scenes = bool(context.pipeline and context.pipeline.description.is_scenes)
    names = names or (["scenes"] if is_scenes else ["kid"])
    if args.heldout_pairs and not (is_scenes and "scenes" in names):
        raise UserError("--heldout-pairs is about the scenes score of a model of scenes: leave it out")
    if args.net and not {"frechet", "kid", "memorisation"} & set(names):
        raise UserError(f"--net is about frechet, kid and memorisation, and the scores are {', '.join(names)}: leave it out")
    if args.clip and not ("clip" in names or args.out):
        raise UserError("--clip is about the clip score and the curves of a report: add clip to --metrics, or leave it out")
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


def refuse_options_of_models(args: argparse.Namespace) -> None:
    """UserError for what says how pictures are drawn, where they are finished."""
    given = {name: value for name, value in vars(args).items() if name in (*SAMPLING, "guidance_interval", "heldout_pairs", "clip", "codec", "text", "compile")}
    given |= {"weights": args.weights != "auto", "seed": args.seed != 0}
    for name, value in given.items():
        if value is not None and value is not False and value != "":
            raise UserError(f"--{name.replace('_', '-')} is about a model's pictures, and those of --images are finished: leave it out")


def check_writable(folder: Path) -> None:
    """Before the work: can a report be written there?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write the report into {folder} ({error.strerror}): give another --out") from error


def write_report(args: argparse.Namespace, context: "Context", found: "dict[str, Scores]", skipped: dict[str, str], model: Path) -> list[str]:
    """Measure what the report shows beside the scores, and write it; the files."""
    from flowt2i.evaluation.assemble import CURVE, assemble
    from flowt2i.evaluation.report import write

    report, pictures = assemble(context, found, model, skipped, CURVE if args.curve_num is None else args.curve_num)
    return [str(path) for path in write(report, pictures, args.out)] if context.world.main else []


def compare(args: argparse.Namespace, world: "World") -> int:
    """Two models on the same prompts and noise."""
    if args.model or args.metrics is not None:
        raise UserError("--compare A B names both models and what is measured (scenes, or --clip): leave out --model and --metrics")
    if args.out:
        world.on_main(lambda: check_writable(args.out))
    from flowt2i.evaluation.assemble import set_side_by_side
    from flowt2i.evaluation.report import write

    contexts = []
    for model in args.compare:
        args.model = model
        contexts.append(build_context(args, world, ["scenes"]))
    report, pictures = set_side_by_side(contexts[0], contexts[1], tuple(args.compare))
    if not world.main:
        return 0
    found: dict[str, Any] = dict(report.comparison)
    if args.out:
        found["report"] = [str(path) for path in write(report, pictures, args.out)]
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"A: {found['a']}\nB: {found['b']}\n{found['n']} prompts, the same noise for both; A, B, and B - A with its paired 95% interval")
    for name, row in found["scores"].items():
        d = row["difference"]
        plain, signed = ("{:6.1%}", "{:+.1%}") if row["share"] else ("{:6.2f}", "{:+.2f}")
        p = f"   p={d['p']:.2g}" if "p" in d else ""
        values = f"{plain.format(row['a'])} {plain.format(row['b'])}   {signed.format(d['difference'])}"
        print(f"  {name:22s} {values} [{signed.format(d['low'])}, {signed.format(d['high'])}]   n={d['n']}{p}")
    print("\n".join(found.get("report", [])), end="\n" if args.out else "")
    return 0


def build_context(args: argparse.Namespace, world: "World", names: list[str]) -> "Context":
    """What there is to score, loaded."""
    from dataclasses import replace

    import torch

    from flowt2i import hub
    from flowt2i.evaluation.metrics import Context
    from flowt2i.evaluation.nets import EFFICIENTNET
    from flowt2i.evaluation.scenes import PUBLISHED
    from flowt2i.training import checkpoint

    common: dict[str, Any] = {
        "clip_name": args.clip, "net_name": args.net or EFFICIENTNET, "net_weights": args.net_weights, "real": args.reference, "seed": args.seed,
    }  # fmt: skip
    if args.images:
        if args.device:
            try:
                world = replace(world, device=torch.zeros(1, device=args.device).device)
            except (RuntimeError, AssertionError) as error:
                raise UserError(f"device {args.device!r} cannot be used here ({str(error).splitlines()[0]}): leave it out, or choose cpu") from error
        return Context(world, args.num or 0, folder=args.images, data=args.data, **common)
    model = args.model or newest_run()
    folder = hub.local(model)
    source = checkpoint.find(folder)  # the newest of now, should training go on
    args.model = source
    pipeline = load_pipeline(args)
    pipeline.name = str(model)
    settings = sampling(args)
    pipeline.settings(**settings)
    pipeline._guide(args.guide)  # before the work
    scenes = pipeline.description.is_scenes and (not names or any(name.startswith("scenes") for name in names))
    num = args.num or (2048 if {"fid", "frechet"} & set(names) else PUBLISHED if scenes else 500)
    run = None if folder != model else source.parents[1] if source.parent.name == "checkpoints" else source  # the hub's cache is no place for pictures
    return Context(
        replace(world, device=pipeline.device), num, pipeline, args.data or trained_on(pipeline), given_num=args.num or 0, settings=settings,
        heldout_pairs=args.heldout_pairs, run=run, source=source, **common,
    )  # fmt: skip


def trained_on(pipeline: Any) -> Path | None:
    """The dataset of a run, where it still lies there unchanged."""
    from flowt2i.description import DatasetDescription
    from flowt2i.evaluation.reference import same_data

    try:
        run = Path(pipeline.name)
        home = next(folder for folder in (run, run.parent, run.parent.parent) if (folder / "config.json").exists() and (folder / "checkpoints").exists())
        data = Path(json.loads((home / "config.json").read_text())["resolved"]["data"])
        return data if same_data(DatasetDescription.load(data), pipeline.description) else None
    except (StopIteration, OSError, ValueError, KeyError, TypeError):
        return None


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
