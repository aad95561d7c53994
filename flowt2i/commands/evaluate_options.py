"""The options of `flowt2i evaluate`: which go together (one that would do nothing is refused), and what they name, loaded."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowt2i.commands.common import load_pipeline, model_of, sampling
from flowt2i.errors import UserError

if TYPE_CHECKING:
    from flowt2i.evaluation.metrics import Context
    from flowt2i.training.distributed import World

SAMPLING = ("steps", "solver", "schedule", "shift", "tolerance", "guidance", "guidance_rule", "guidance_rescale", "analogy", "style_contrast", "zero_init",
            "negative", "guide")  # fmt: skip
OF_MODELS = (*SAMPLING, "guidance_interval", "heldout_pairs", "clip", "codec", "text", "compile")  # how pictures are drawn, and of what
OF_METRICS = {"net": ("frechet", "kid", "memorisation"), "reference": ("fid", "frechet", "kid")}
NOT_COMPARED = {  # what --compare does not look at
    "model": "names both models", "metrics": "measures by the exact checker on scenes, and by --clip on other data",
    "net": "looks at no features of real pictures", "net_weights": "looks at no features of real pictures", "reference": "looks at no real pictures",
    "curve_num": "draws no curves",
}  # fmt: skip


def check_before(args: argparse.Namespace, names: list[str]) -> None:
    """UserError for what can be refused before anything is loaded. names: of --metrics, none where it was not given."""
    from flowt2i.evaluation.metrics import find

    for name in names:
        find(name)
    if args.num is not None and args.num < 1:
        raise UserError("--num must be at least 1")
    if not 0 <= args.seed < 10**9:
        raise UserError("--seed must be between 0 and 10^9")
    if args.curve_num is not None and args.curve_num < 0:
        raise UserError("--curve-num must be at least 0")
    if args.images and args.model:
        raise UserError("--images scores pictures without a model: leave out --model or --images")
    if args.images and (args.out or args.compare):
        raise UserError("the report and the comparison need models: leave out --images")
    if args.compare:
        for name, why in NOT_COMPARED.items():
            if getattr(args, name) is not None:
                raise UserError(f"--compare A B {why}: leave out --{name.replace('_', '-')}")
    if args.net_weights and args.net != "inception" and "fid" not in names:
        raise UserError("--net-weights goes with inception (--metrics fid, or --net inception): for another net give the folder of the model itself")
    if args.curve_num is not None and not args.out:
        raise UserError("--curve-num is about the report: add --out DIR, or leave it out")
    if args.images:
        given = {name: getattr(args, name) for name in OF_MODELS} | {"weights": args.weights != "auto", "seed": args.seed != 0}
        for name, value in given.items():
            if value is not None and value is not False and value != "":
                raise UserError(f"--{name.replace('_', '-')} is about a model's pictures, and those of --images are finished: leave it out")


def check_names(args: argparse.Namespace, names: list[str], is_scenes: bool) -> None:
    """UserError for options that none of the metrics `names` looks at."""
    if args.heldout_pairs and not (is_scenes and "scenes" in names):
        raise UserError("--heldout-pairs is about the scenes score of a model of scenes: leave it out")
    for name, users in OF_METRICS.items():
        if getattr(args, name) and not set(users) & set(names):
            raise UserError(f"--{name} is about {', '.join(users[:-1])} and {users[-1]}, and the scores are {', '.join(names)}: leave it out")
    if args.clip and not ("clip" in names or (args.out and not is_scenes)):  # a report's curves of scenes are by the exact checker
        raise UserError("--clip is about the clip score, and the curves of a report on other data than scenes: add clip to --metrics, or leave it out")


def check_writable(folder: Path) -> None:
    """Before the work: can a report be written there?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write the report into {folder} ({error.strerror}): give another --out") from error


def build_context(args: argparse.Namespace, world: "World", names: list[str]) -> "Context":
    """What there is to score, loaded."""
    from dataclasses import replace

    import torch

    from flowt2i import box, hub
    from flowt2i.evaluation.metrics import Context
    from flowt2i.evaluation.nets import EFFICIENTNET
    from flowt2i.evaluation.scenes import PUBLISHED
    from flowt2i.training import checkpoint

    common: dict[str, Any] = {
        "clip_name": args.clip, "net_name": args.net or EFFICIENTNET, "net_weights": args.net_weights, "real": args.reference or "heldout", "seed": args.seed,
    }  # fmt: skip
    if args.images:
        if args.device:
            try:
                world = replace(world, device=torch.zeros(1, device=args.device).device)
            except (RuntimeError, AssertionError) as error:
                raise UserError(f"device {args.device!r} cannot be used here ({str(error).splitlines()[0]}): leave it out, or choose cpu") from error
        return Context(world, args.num or 0, folder=args.images, data=args.data, **common)
    model = model_of(args.model)
    folder = hub.local(model)
    source = checkpoint.find(folder)  # the newest of now, should training go on
    args.model = source
    pipeline = load_pipeline(args)
    pipeline.name = source.name if box.holds(source) else str(model)
    settings = sampling(args)
    pipeline.settings(**settings)
    pipeline._guide(args.guide)  # before the work
    scenes = pipeline.description.is_scenes and (not names or any(name.startswith("scenes") for name in names))
    num = args.num or (2048 if {"fid", "frechet"} & set(names) else PUBLISHED if scenes else 500)
    run: Path | None = checkpoint.home(source)
    if folder != model or box.holds(source):
        run = None  # neither the hub's cache nor the package is a place for pictures
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
