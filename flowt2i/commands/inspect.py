"""`flowt2i inspect`: a look at a prepared dataset."""

import argparse
import json
from pathlib import Path
from typing import Any

from flowt2i.commands.common import add_json, examples


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        description="Counts, statistics and caption lengths of a dataset, and a contact sheet.",
        **examples("flowt2i inspect data/scenes", "flowt2i inspect data/scenes --out sheet.png --json"),
    )
    parser.add_argument("data", metavar="DIR", type=Path, help="prepared dataset")
    parser.add_argument("--out", type=Path, help="where the contact sheet goes (default DIR/contact.png)")
    add_json(parser, "statistics")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from flowt2i.data.inspect import inspect

    summary = inspect(args.data, args.out, quiet=args.json)
    if args.json:
        print(json.dumps(summary))
    return 0
