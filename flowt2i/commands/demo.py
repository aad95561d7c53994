"""`flowt2i demo`: the web page."""

import argparse
from pathlib import Path
from typing import Any

from flowt2i import box
from flowt2i.commands.common import MODEL, OR_ELSE, add_moved, examples, say_taken


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        description="A page that draws pictures from prompts and shows them forming, and a small HTTP API; for this machine only, unless you --share.",
        **examples(
            "flowt2i demo",
            "flowt2i demo --model runs/quickstart --port 7861",
            "flowt2i demo --model runs/a runs/b --only",
            "flowt2i demo --share --auth friend:some-password",
        ),
    )
    parser.add_argument("--model", type=Path, nargs="+", default=[], metavar="PATH",
                        help=f"one or several of: {MODEL} (default: {OR_ELSE.replace('run under runs/', 'under runs/ and models/')})")  # fmt: skip
    parser.add_argument("--only", action="store_true",
                        help="offer no other model than --model (default: also those under runs/ and models/, and the packaged ones)")  # fmt: skip
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument("--share", action="store_true", help="also through a public gradio.live address; needs --auth or --public")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="let in only those who know these, on the page and in the API")
    parser.add_argument("--public", action="store_true", help="with --share: anyone who has the link may draw")
    add_moved(parser)
    parser.add_argument("--device", help="cpu, cuda, … (default: the best there is)")
    parser.set_defaults(run=run, weights="auto")


def run(args: argparse.Namespace) -> int:
    from flowt2i.demo import Library, found, parse_auth, serve

    auth = parse_auth(args.auth)
    others = [] if args.only and args.model else [*found(), *box.folders()]
    library = Library(args.model, others, weights=args.weights, device=args.device, codec=args.codec, text=args.text)
    if not args.model:
        say_taken(library.card(library.first).path)
    serve(library, port=args.port, share=args.share, auth=auth, public=args.public)
    return 0
