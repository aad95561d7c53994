"""`flowt2i prepare`: captioned images -> a dataset on disk."""

import argparse
import json
from pathlib import Path
from typing import Any

from flowt2i.commands.common import add_json, examples
from flowt2i.config import PREPARATION
from flowt2i.errors import UserError, nearest


def add(commands: Any) -> None:
    from flowt2i.data.options import PrepareOptions

    parser = commands.add_parser(
        "prepare",
        description="Read captioned images, filter, resize, encode, and write a dataset folder. The same command again continues where it stopped.",
        **examples(
            "flowt2i prepare scenes --out data/scenes --count 40000",
            "flowt2i prepare my_images/ --out data/mine                   # metadata.jsonl, or a .txt beside each image",
            "flowt2i prepare 'shards/{00000..00046}.tar' --out data/t2i --codec sd-vae-ft-mse --text t5-small",
            "flowt2i prepare --out data/text-to-image-2M --limit 100000   # jackyhate/text-to-image-2M from the hub, streamed",
            "torchrun --nproc-per-node 4 load_dataset.py 'shards/*.tar' --out data/t2i   # or, anywhere: prepare … --worker 0/4, 1/4, …",
            "flowt2i prepare my_images/ --like runs/mine --image-size 128 --out data/mine128   # for `train --init runs/mine`",
            "flowt2i prepare my_images/ --out data/mine --buckets          # pictures keep about their shape: wide, square, tall (docs/shapes.md)",
            "flowt2i prepare part0 part1 --merge --out data/t2i           # of workers that had no common disk",
        ),
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=PrepareOptions.model_fields["sources"].description)
    parser.add_argument("--config", metavar="PRESET", help="codec and text encoder of this preset, unless given")
    for name, info in PrepareOptions.model_fields.items():
        if name == "sources":
            continue
        flag = "--" + name.replace("_", "-")
        text = (info.description or "").replace("%", "%%")
        if isinstance(info.default, bool):
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(
                flag,
                dest=name,
                default=None,
                **({"nargs": "?", "const": "auto"} if name == "buckets" else {}),
                required=info.is_required(),
                metavar=name.split("_")[-1].upper(),
                help=f"{text}{'' if info.default in (None, '') or info.is_required() else f' (default {info.default})'}",
            )
    parser.add_argument("--merge", action="store_true", help="SOURCE are folders that workers (--worker) wrote: make one dataset of them")
    add_json(parser, "report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from flowt2i.data.options import PrepareOptions
    from flowt2i.data.prepare import prepare

    fields = {name: value for name in PrepareOptions.model_fields if (value := getattr(args, name)) not in (None, [])}
    if args.merge:
        from flowt2i.data.merge import merge

        if others := sorted(fields.keys() - {"sources", "out"}):
            raise UserError(f"--merge takes its options from the folders: leave out --{others[0].replace('_', '-')}")
        report = merge([Path(source) for source in args.sources], Path(args.out))
        if args.json:
            print(json.dumps(report))
        return 0
    preset = args.config or (None if args.sources or args.like else "stability")  # the hub's 2M pairs are what the big presets are for
    if preset and preset not in PREPARATION:
        raise UserError(f"no preset {preset!r}{nearest(preset, PREPARATION)}")
    report = prepare(PrepareOptions.of(**{**(PREPARATION[preset] if preset else {}), **fields}))
    if args.json:
        print(json.dumps(report))
    return 0
