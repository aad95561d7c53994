"""`flowt2i doctor`: the machine, and a run before it starts."""

import argparse
import json
from pathlib import Path
from typing import Any

from flowt2i.commands.common import add_config, add_json, add_moved, configuration, examples
from flowt2i.errors import UserError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        description="What this machine has and lacks. With --config and --data also a real step, a checkpoint and a picture, and what the run will take. "
        "Exit status 2 where something would stop the run.",
        **examples("flowt2i doctor", "flowt2i doctor --config stability --data data/mine --out runs/mine"),
    )
    add_config(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder: its disk is the one that is looked at (default runs/PRESET-DATA)")
    add_moved(parser)
    add_json(parser)
    parser.set_defaults(run=run, overrides=True)


def run(args: argparse.Namespace) -> int:
    if args.rest and not args.config:
        raise UserError(f"{args.rest[0]}: settings belong to a --config")
    if args.size and not args.config:
        raise UserError("--size belongs to a --config")
    config = configuration(args) if args.config else None
    from flowt2i.doctor import examine, report

    run = args.out or Path("runs") / (f"{config.preset}-{args.data.resolve().name}" if config and args.data else "")
    result = examine(config, args.data, run, codec=args.codec, text=args.text)
    print(json.dumps(result) if args.json else report(result))
    return 0 if result["ok"] else 2
