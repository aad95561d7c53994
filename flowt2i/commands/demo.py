"""`flowt2i demo`: the web page."""

import argparse
from typing import Any

from flowt2i.commands.common import add_model, examples, load_pipeline


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="the web page",
        description="A page that draws pictures from prompts and shows them forming.",
        **examples("flowt2i demo", "flowt2i demo --model runs/quickstart --port 7861"),
    )
    add_model(parser)
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument("--share", action="store_true", help="also through a public gradio.live address; anyone with the link can use it")
    for flag in ("--codec", "--text", "--device"):
        parser.add_argument(flag, help="as in generate")
    parser.set_defaults(run=run, weights="auto")


def run(args: argparse.Namespace) -> int:
    from flowt2i.demo import serve

    serve(load_pipeline(args), port=args.port, share=args.share)
    return 0
