"""`flowt2i bench`: speed and memory on this machine."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flowt2i.commands.common import add_json, examples
from flowt2i.config import PREPARATION, Config, resolve
from flowt2i.errors import UserError
from flowt2i.memory import is_out_of_memory


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        description="Images a second in training and sampling at several micro-batches, the share of the machine's own measured ceiling, where a step's time "
        "goes, what the training loop adds to it, memory, and a verdict in one sentence. For figures to quote, on a machine that does nothing else.",
        **examples(
            "flowt2i bench --config quickstart",
            "flowt2i bench --config stability --data data/t2i --json",
            "flowt2i bench --config stability --train.micro_batch 32 --text-tokens 128",
            "flowt2i bench --peers                 # and diffusers' PixArt, PRX and SD3 at the seed size, against ours",
        ),
    )
    parser.add_argument("--config", metavar="PRESET", default="quickstart", help="preset (default quickstart); settings as --section.field value")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset (default: a few of the built-in scenes, prepared in a temporary folder)")
    parser.add_argument("--text-tokens", type=int, metavar="N", help="every caption N tokens long, instead of as long as those of the data")
    parser.add_argument(
        "--latents",
        action=argparse.BooleanOptionalAction,
        help="without --data: 8x8x4 latents and 512-wide features of a frozen encoder, or pixels and the built-in encoder (default: as the preset is meant)",
    )
    parser.add_argument("--seconds", type=float, default=80, help="about how long it may take, peers not counted (default 80)")
    parser.add_argument(
        "--peers",
        nargs="?",
        const="all",
        metavar="NAMES",
        help="also time other transformers: all (default), or some of full_scale (our own preset with the wider MLP), pixart, prx, sd3, with commas between",
    )
    parser.add_argument("--peer-batch", type=int, metavar="N", help="images in a step of the comparison (default 32 on a CPU, 96 on a GPU)")
    parser.add_argument("--peer-rounds", type=int, metavar="N", help="timed steps of each, by turns (default 5)")
    add_json(parser)
    parser.set_defaults(run=run, overrides=True)


def run(args: argparse.Namespace) -> int:
    config: Config = resolve(args.config, args.rest)
    for name in ("text_tokens", "peer_batch", "peer_rounds", "seconds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if not args.peers and (args.peer_batch or args.peer_rounds):
        raise UserError("--peer-batch and --peer-rounds belong to --peers")
    if config.train.lora:
        raise UserError("--train.lora belongs to `flowt2i train --init`: here the training of all weights is timed")
    if args.data and (args.text_tokens or args.latents is not None):
        raise UserError("--data says how long captions are and whether they come with latents: leave --text-tokens and --latents out")
    from flowt2i.bench import peers
    from flowt2i.bench.run import bench
    from flowt2i.bench.verdict import summary
    from flowt2i.training.loop import Stopped

    names = peers.chosen(args.peers) if args.peers else []
    latents = PREPARATION.get(config.preset, {}).get("codec") != "pixels" if args.latents is None else args.latents
    try:
        result = bench(config, args.data, latents, args.text_tokens or 0, args.seconds)
        if not args.json:
            print(summary(result))
        if names:
            lengths = {args.text_tokens: 1} if args.text_tokens else peers.lengths_of(args.data)
            compared = peers.compare(names, args.peer_batch or 0, args.peer_rounds or 5, lengths=lengths)
            result |= {"peers": peers.ratios(compared), "peer_runs": compared}
            if not args.json:
                print(peers.table(compared))
    except Stopped as stopped:
        raise KeyboardInterrupt from stopped
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).splitlines()[0][:160] if str(error) else "main memory"
        raise UserError(f"out of memory ({what}): choose a smaller --train.micro_batch or model, or free what else uses it") from error
    if args.json:
        print(json.dumps(result))
    sys.stdout.flush()
    return 0
