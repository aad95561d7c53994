"""`flowt2i models`: the models that come with the package."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from flowt2i.commands.common import add_json, examples


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "models",
        description="The trained models that come with flowt2i. Give their names wherever a model is asked for; the first one is used where no model is "
        "given and no run lies under runs/. Model cards are in the folders that --json tells.",
        **examples("flowt2i models", 'flowt2i generate "a small red circle" --model scenes --out circle.png', "flowt2i models --json"),
    )
    add_json(parser, "list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from flowt2i import box
    from flowt2i.human import size

    found = [box.describe(folder) for folder in box.folders()]
    if args.json:
        print(json.dumps({"models": [asdict(model) | {"path": str(model.path)} for model in found]}))
        return 0
    if not found:
        print("no model came with this installation: train one, for instance with `make quickstart`")
    for model in found:
        parameters = f", {model.parameters / 1e6:.1f}M parameters" if model.parameters else ""
        print(f"{model.name}: {size(model.bytes)}{parameters}, {model.image_size}×{model.image_size} pixels, licence {model.licence or 'not stated'}")
        print(f"  trained on: {model.data}")
        if model.score:
            print(f"  {model.score.name}: {model.score.shown()} {model.score.interval()}".rstrip() + (f" of {model.score.n:,}" if model.score.n else ""))
    return 0
