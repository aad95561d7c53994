"""`flowt2i export`: a model that travels."""

import argparse
import json
from pathlib import Path
from typing import Any

from flowt2i.commands.common import MODEL, OR_ELSE, add_json, add_moved, examples, model_of
from flowt2i.errors import UserError
from flowt2i.human import size


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        description="Write a model with all it needs, a model card and samples into a folder: for `flowt2i` and `Pipeline.from_pretrained`, "
        "for diffusers, or for ONNX; on request send it to the Hugging Face hub. The folder is complete or absent.",
        **examples(
            "flowt2i export runs/quickstart --to exports/scenes --license apache-2.0",
            "flowt2i export runs/quickstart --to exports/scenes --force --push me/scenes   # and to the hub",
            "flowt2i export runs/stability --to exports/big-bf16 --dtype bf16 --take-nets",
            "flowt2i export runs/a --average runs/b runs/c --to exports/mean   # of three trainings on from one model",
            "flowt2i export runs/quickstart --to exports/scenes-diffusers --format diffusers",
            "flowt2i export runs/quickstart --to exports/scenes-onnx --format onnx",
            "flowt2i export runs/quickstart --to exports/scenes --sample.guidance 2   # any setting of how it draws of its own (`train --help`)",
        ),
    )
    parser.add_argument("model", nargs="?", metavar="RUN", help=f"{MODEL} (default: {OR_ELSE})")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--format", default="flowt2i", help="flowt2i, diffusers or onnx (default flowt2i)")
    parser.add_argument("--weights", default="auto", help="ema, raw, or auto: EMA where there is one (default auto)")
    parser.add_argument(
        "--average",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="other models that were trained on from the same one: the mean of the weights of all is written",
    )
    parser.add_argument("--dtype", default="fp32", help="of the weights: fp32, or bf16 at half the size (default fp32)")
    parser.add_argument(
        "--license", default="", metavar="ID", help="licence of the weights, as the hub writes it: apache-2.0, mit, cc-by-4.0, … (default: none stated)"
    )
    parser.add_argument("--source", default="", metavar="TEXT", help='what the training pictures are called in the card (default: scenes and datasets of the '
                        "hub by name, all else as local files)")  # fmt: skip
    parser.add_argument("--notes", type=Path, metavar="FILE", help="Markdown that the card ends with: whose pictures, under which terms, on which machine")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="scores for the card: the report.json that `flowt2i evaluate --out DIR` wrote")
    parser.add_argument("--samples", type=int, default=16, help="pictures in the card, not picked (default 16; 0: none)")
    parser.add_argument(
        "--take-nets", action="store_true", help="format flowt2i: copy VAE and text encoder too where the hub has them; those in folders are always copied"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export at DIR")
    parser.add_argument("--push", default="", metavar="OWNER/NAME", help="send the folder to the Hugging Face hub under this name")
    parser.add_argument("--private", action="store_true", help="with --push: only you see it")
    add_moved(parser)
    parser.add_argument("--device", help="where samples are drawn: cpu, cuda, … (default: the best there is)")
    add_json(parser)
    parser.set_defaults(run=run, overrides=True)


def run(args: argparse.Namespace) -> int:
    from flowt2i.export.card import Told
    from flowt2i.export.export import export
    from flowt2i.exported import read_scores

    told = Told(args.license, args.source, read_text(args.notes), read_scores(args.scores) if args.scores else None)
    model = args.model or model_of(None)
    result = export(
        model, args.to, format=args.format, weights=args.weights, dtype=args.dtype, told=told, samples=args.samples, nets=args.take_nets,
        force=args.force, average=args.average, push=args.push, private=args.private, codec=args.codec, text=args.text, device=args.device, progress=True,
        sample=args.rest,
    )  # fmt: skip
    if args.json:
        print(json.dumps(result))
        return 0
    step = "" if result["step"] is None else f", step {result['step']:,}"
    print(f"exported {args.to} ({size(result['bytes'])}, {result['format']}, {result['weights']} weights{step})")
    for name, error in result.get("errors", {}).items():
        print(f"  {name}.onnx: differs from torch by at most {error:.1e} of the largest value")
    if result["pushed"]:
        print(f"  sent to {result['pushed']}")
    return 0


def read_text(file: Path | None) -> str:
    """Of the file of notes; UserError where it cannot be read."""
    try:
        return file.read_text() if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --notes {file}: {error}") from error
