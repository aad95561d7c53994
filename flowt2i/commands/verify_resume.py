"""`flowt2i verify-resume`: an interrupted training loses nothing."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flowt2i.commands.common import add_config, add_json, add_moved, configuration, examples, only_dataset


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "verify-resume",
        description="Train a few steps with and without a stop in the middle, in temporary folders, and compare losses, weights, averages and optimizer "
        "bit by bit. Exit status 0: equal, 1: not.",
        **examples(
            "flowt2i verify-resume --config quickstart --data data/scenes",
            "flowt2i verify-resume --config stability --data data/mine --ranks 2 --json",
        ),
    )
    add_config(parser, "stability")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset (default: the only one under data/)")
    parser.add_argument("--steps", type=int, default=6, help="steps to train (default 6)")
    parser.add_argument("--at", type=int, default=3, help="step during which the signal comes (default 3)")
    parser.add_argument("--ranks", type=int, default=1, help="processes, started by torchrun where more than one (default 1)")
    add_moved(parser)
    add_json(parser)
    parser.set_defaults(run=run, overrides=True)


def run(args: argparse.Namespace) -> int:
    config = configuration(args)
    from flowt2i.verify_resume import report, verify_resume

    words = [word for flag in ("config", "codec", "text") if (value := getattr(args, flag)) for word in (f"--{flag}", value)]
    say = lambda text: print(f"verify-resume: {text} …", file=sys.stderr)
    result = verify_resume(config, [*words, *args.rest], args.data or only_dataset(), args.steps, args.at, args.ranks, say)
    print(json.dumps(result) if args.json else report(result))
    return 0 if result["equal"] else 1
