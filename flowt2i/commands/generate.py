"""`flowt2i generate`: prompts -> pictures."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from flowt2i import __version__
from flowt2i.commands.common import add_model, add_sampling, examples, load_pipeline
from flowt2i.errors import UserError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="pictures from prompts",
        description="Draw pictures. One picture goes to FILE; several go to FILE-000.png, FILE-001.png, …, and FILE is their captioned grid.",
        **examples(
            'flowt2i generate "a large red circle" --model runs/quickstart --out circle.png',
            'flowt2i generate "a blue star" "a red heart" --model runs/quickstart --out grid.png --num 4 --guidance 2 --steps 30',
            "flowt2i generate --prompts prompts.txt --model runs/quickstart --out grid.png",
        ),
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the picture shows")
    parser.add_argument("--prompts", dest="file", type=Path, help="a text file with a prompt a line")
    add_model(parser)
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="PNG to write (default picture.png)")
    parser.add_argument("--num", type=int, default=1, help="pictures of each prompt (default 1)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default 64)")
    add_sampling(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prompts = list(args.prompts)
    if args.file:
        try:
            prompts += [line.strip() for line in args.file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {args.file}: {error}") from error
    if not prompts:
        raise UserError('no prompt: flowt2i generate "a large red circle" --out picture.png')
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: pictures are written as PNG, so give a name that ends in .png")
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write --out {args.out}: {error.strerror}") from error
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):  # before the work, not after it
        raise UserError(f"cannot write --out {args.out}: give another name or folder")
    from tqdm import tqdm

    from flowt2i.grid import grid
    from flowt2i.pipeline import save_png

    pipeline = load_pipeline(args)
    with tqdm(total=len(prompts) * max(1, args.num), desc="drawing", unit="image", leave=False, disable=None) as bar:
        samples = pipeline.sample(
            prompts, steps=args.steps, solver=args.solver, guidance=args.guidance, shift=args.shift, seed=args.seed, num=args.num,
            batch_size=args.batch_size, progress=bar.update,
        )  # fmt: skip
    pictures = samples.pictures()
    files = [args.out] if len(pictures) == 1 else [args.out.with_name(f"{args.out.stem}-{i:03d}.png") for i in range(len(pictures))]
    for picture, file in zip(pictures, files):
        save_png(picture, file)
    result: dict[str, Any] = {
        "files": [str(f) for f in files],
        "seconds": round(samples.seconds, 3),
        "evaluations": samples.evaluations,
        **samples.settings,
    }
    if len(pictures) > 1:
        columns = args.num if args.num > 1 else min(8, round(len(pictures) ** 0.5 + 0.49))
        sheet = grid(samples.images, samples.prompts, columns=columns)
        sheet.info["flowt2i"] = json.dumps({"prompts": samples.prompts, "seeds": samples.seeds, **samples.settings, "version": __version__})
        save_png(sheet, args.out)
        result["grid"] = str(args.out)
    print(
        json.dumps(result) if args.json else f"wrote {args.out} ({len(pictures)} picture(s), {samples.evaluations} evaluations each, {samples.seconds:.1f} s)"
    )
    return 0
