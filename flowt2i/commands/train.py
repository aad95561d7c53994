"""`flowt2i train`: a dataset -> a trained model."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from flowt2i.commands.common import add_json, add_moved, add_size, configuration, only_dataset
from flowt2i.config import PRESETS, Config, describe_fields
from flowt2i.errors import INTERRUPTED, UserError, first_of_node, told_elsewhere
from flowt2i.memory import is_out_of_memory, told


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        description="Train a run. Any setting can be given as --section.field value.",
        epilog="examples:\n  flowt2i train --config quickstart --data data/scenes\n"
        "  flowt2i train --config stability --data data/mine --out runs/mine --optim.lr 3e-4\n"
        "  flowt2i train --config quickstart --size M --data data/mine --print-config\n"
        "  flowt2i train --config stability --data data/mine --out runs/mine --resume latest\n"
        "  flowt2i train --init runs/mine --data data/mine128 --out runs/mine128 --train.steps 5000    # a model of 64 pixels goes on at 128\n"
        "  flowt2i train --init runs/mine --data data/own --out runs/own --lora 8 --train.steps 500    # or low-rank adapters only\n"
        "  torchrun --nproc-per-node 2 train.py --config stability --data data/mine\n\n"
        "presets: " + ", ".join(PRESETS) + "\n\nsettings:\n" + describe_fields().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="PRESET", help="preset, or the config.json of a run (default stability)")
    add_size(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset (default: the only one under data/)")
    parser.add_argument(
        "--out", type=Path, metavar="RUN", help="run folder (default runs/PRESET-DATA; with --size runs/PRESET-SIZE-DATA, with --init alone runs/MODEL-DATA)"
    )
    parser.add_argument(
        "--init",
        metavar="MODEL",
        help="begin from the weights of this run, checkpoint, exported or packaged model or hub id, at the picture size of the data; "
        "its architecture, way of drawing and, without --config, all other settings are taken over (docs/growing.md)",
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="with --init: train low-rank adapters only (the same as --train.lora)")
    parser.add_argument("--image-size", type=int, metavar="N", help="refuse data that were not prepared at this size")
    parser.add_argument("--resume", metavar="latest|PATH", help="continue from the run's newest checkpoint, or from the one at PATH")
    parser.add_argument("--stop-after", metavar="TIME", help="save and stop after so long, such as 3h or 90m (the same as --train.stop_after)")
    add_moved(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and start nothing")
    add_json(parser, "summary")
    parser.set_defaults(run=run, overrides=True)


def run(args: argparse.Namespace) -> int:
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        config, data, run, init = settled(args)
    except UserError:
        if first_of_node():
            raise
        return told_elsewhere()  # it was given the same words
    if args.print_config:
        print(json.dumps(resolved_config(config, args.data), indent=2))
        return 0
    from flowt2i.training.distributed import ToldElsewhere
    from flowt2i.training.loop import Stopped, train

    try:
        summary = train(config, data, run, args.resume, codec=args.codec, text=args.text, init=init)
    except Stopped as stopped:
        if main_rank:
            print(f"flowt2i train: {stopped}", file=sys.stderr)
        return INTERRUPTED
    except ToldElsewhere:
        return told_elsewhere()
    except (RuntimeError, MemoryError) as error:  # later than the start, where the micro-batch is fitted
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({told(error)}): free some, or run again with --resume latest and a smaller --train.micro_batch") from error
    if not main_rank:
        return 0
    if args.json:
        print(json.dumps(summary))
    else:
        print(
            f"trained {summary['step']} steps ({summary['images_seen']:,} images) in "
            f"{summary['seconds'] / 60:.1f} min, at most {summary['peak_memory_gib']} GiB: {run}",
            file=sys.stderr,
        )
        print(f'next: flowt2i generate "…" --model {run} --out picture.png', file=sys.stderr)
    return 0


def settled(args: argparse.Namespace) -> tuple[Config, Path, Path, Path | None]:
    """Configuration, data, run folder, and the folder of the model to begin from (None: from nothing, or the run's own checkpoints go on)."""
    if args.lora is not None:
        args.rest = [*args.rest, "--train.lora", str(args.lora)]
    base = configuration(args)  # without --config: of the default preset, and not used where there is --init
    needless = args.print_config and not args.init and args.image_size is None  # settings alone are shown
    data = args.data or (Path("data") if needless else only_dataset())
    if args.image_size is not None:
        _require_size(args.image_size, data, args.init)
    name = base.preset if args.config or not args.init else Path(args.init).resolve().name
    run = args.out or Path("runs") / "-".join(filter(None, (name, args.size, data.resolve().name)))
    if not args.init:
        return base, data, run, None
    if args.size:
        raise UserError("--init brings the size of its model along: leave out --size")
    from flowt2i.description import DatasetDescription
    from flowt2i.training import start

    if args.resume not in (None, "latest"):
        raise UserError("--init and --resume PATH both say what to begin from: leave out one of them")
    if args.resume and (before := start.continued(run, args.rest)):
        return before, data, run, None
    found = start.find(args.init)
    config = start.configuration(args.init, found, DatasetDescription.load(data), args.rest, base if args.config else None)
    return config, data, run, found.folder


def _require_size(size: int, data: Path, init: str | None) -> None:
    from flowt2i.description import DatasetDescription

    have = DatasetDescription.load(data).codec.image_size
    if size < 8:
        raise UserError(f"--image-size {size} is too small for a picture: {data} has {have} pixels")
    if have != size:
        like = f" --like {init}" if init else ""
        raise UserError(f"--image-size {size}: {data} was prepared at {have} pixels: run `flowt2i prepare SOURCE --image-size {size}{like} --out DIR` first")


def resolved_config(config: Config, data: Path | None) -> dict[str, Any]:
    """The configuration, and, where the data is given, what follows from it."""
    if data is None:
        return config.model_dump()
    from flowt2i.description import DatasetDescription
    from flowt2i.training.distributed import accumulation

    codec = DatasetDescription.load(data).codec
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    micro, accumulate = accumulation(config.data.batch_size, config.train.micro_batch, ranks)
    facts = {"data": str(data), "micro_batch": micro, "accumulation": accumulate, "ranks": ranks}
    return config.model_dump() | {"resolved": facts | {"model": config.model.resolve(codec.kind, codec.shape).model_dump()}}
