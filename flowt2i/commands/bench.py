"""`flowt2i bench`: speed and memory on this machine."""

import argparse
import json
from typing import Any

from flowt2i.commands.common import add_json, examples
from flowt2i.config import PREPARATION, Config, resolve
from flowt2i.errors import UserError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed and memory on this machine",
        description="Images a second in training and sampling, and the share of the machine's measured ceiling.",
        **examples("flowt2i bench --config quickstart", "flowt2i bench --config stability --json --train.micro_batch 32"),
    )
    parser.add_argument("--config", metavar="PRESET", default="quickstart", help="preset (default quickstart)")
    parser.add_argument("--text-tokens", type=int, default=16, help="tokens a caption (default 16)")
    parser.add_argument(
        "--latents",
        action=argparse.BooleanOptionalAction,
        help="8x8x4 latents and 512-wide features of a frozen encoder, instead of pixels and the built-in encoder",
    )
    add_json(parser)
    parser.set_defaults(run=run, overrides=True)


def run(args: argparse.Namespace) -> int:
    from flowt2i.bench import bench

    config: Config = resolve(args.config, args.rest)
    if args.text_tokens < 1:
        raise UserError("--text-tokens must be at least 1")
    result = bench(
        config, text_tokens=args.text_tokens, latents=PREPARATION.get(config.preset, {}).get("codec") != "pixels" if args.latents is None else args.latents
    )
    print(json.dumps(result) if args.json else result["verdict"])
    return 0
