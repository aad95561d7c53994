"""`flowt2i generate`: prompts -> pictures."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from flowt2i import __version__
from flowt2i.commands.common import add_model, add_sampling, examples, load_pipeline, sampling
from flowt2i.errors import UserError

MOST = 10_000  # pictures of one call: all of them are kept for the grid


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        description="Draw pictures. One picture goes to FILE; several go to FILE-000.png, FILE-001.png, …, and FILE is their captioned grid.",
        **examples(
            'flowt2i generate "a large red circle" --model runs/quickstart --out circle.png',
            'flowt2i generate "a blue star" "a red heart" --model runs/quickstart --out grid.png --num 4 --guidance 2 --steps 30',
            "flowt2i generate --prompts prompts.txt --model runs/quickstart --out grid.png",
            'flowt2i generate "a red circle" --to "a blue star" --num 8 --out way.png            # from one prompt to another (--to-seed: from seed to seed)',
            'flowt2i generate "a red circle" --seed 7 --variation 0.3 --num 8 --out near.png    # pictures near that of seed 7',
            'flowt2i generate "a blue star" --init circle.png --strength 0.7 --out star.png     # from a picture; --mask mask.png: its bright part only',
            'flowt2i generate "a lighthouse" --model runs/mine --width 80 --height 48 --out wide.png  # a shape that its data had, or any other',
            "flowt2i generate --like circle.png --out again.png                                 # the same picture from what its PNG tells",
        ),
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the picture shows")
    parser.add_argument("--prompts", dest="file", type=Path, help="a text file with a prompt a line")
    add_model(parser)
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="PNG to write (default picture.png)")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="of the pictures, with --height (default: the size the model was trained at)")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="of the pictures, with --width")
    parser.add_argument("--num", type=int, default=1, help="pictures of each prompt (default 1)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default 64)")
    parser.add_argument("--to", metavar="PROMPT", help="the pictures lead from the prompt to this one, all from one seed")
    parser.add_argument("--to-seed", type=int, metavar="N", help="the pictures lead from the noise of --seed to that of N")
    parser.add_argument("--variation", type=float, default=0.0, metavar="SHARE", help="variations of --seed: how far their noise moves away from it, 0 to 1")
    parser.add_argument("--init", type=Path, metavar="PICTURE", help="a picture to start from")
    parser.add_argument("--strength", type=float, metavar="SHARE", help="how much of it is drawn anew, to 1: all (default 0.6; with a mask 1)")
    parser.add_argument("--mask", type=Path, metavar="PICTURE", help="as large as --init: bright where it is drawn anew, dark where it stays")
    parser.add_argument("--like", type=Path, metavar="PNG", help="draw this picture of ours again; settings given beside it replace its own, but for the seed")
    add_sampling(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prompts = list(args.prompts)
    if args.file:
        try:
            prompts += [line.strip() for line in args.file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {args.file}: {error}") from error
    if args.like and (prompts or args.num != 1 or args.variation):
        raise UserError("--like draws one picture again, with its own prompt: leave prompts, --num and --variation out")
    if not prompts and not args.like:
        raise UserError('no prompt: flowt2i generate "a large red circle" --out picture.png')
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: pictures are written as PNG, so give a name that ends in .png")
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if len(prompts) * args.num > MOST:
        raise UserError(f"{len(prompts)} prompt(s) with --num {args.num} are more pictures than the {MOST} drawn in one go: give fewer, and go on with --seed")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write --out {args.out}: {error.strerror}") from error
    total = max(1, len(prompts)) * max(1, args.num)
    files = [args.out] if total == 1 else [args.out.with_name(f"{args.out.stem}-{i:03d}.png") for i in range(total)]
    for file in [args.out, *files]:  # before the work, not after it
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise UserError(f"cannot write {file}: give --out another name or folder")
    from tqdm import tqdm

    from flowt2i.grid import grid
    from flowt2i.pictures import Samples, read_settings, save_png

    def save(picture: Any, file: Path) -> None:
        try:
            save_png(picture, file)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror or error}") from error

    def keep(first: int, samples: Samples) -> None:  # as they come: what is drawn is there, whatever happens to the rest
        for picture, file in zip(samples.pictures(), files[first:]):
            save(picture, file)

    if args.like and args.weights == "auto" and (weights := read_settings(args.like).get("weights")) in ("EMA", "raw"):
        args.weights = weights.lower()
    pipeline = load_pipeline(args)
    edits = {name: getattr(args, name) for name in ("to", "to_seed", "init", "strength", "mask", "width", "height")}
    settings = sampling(args) | edits
    with tqdm(total=total, desc="drawing", unit="image", leave=False, disable=None) as bar:
        if args.like:
            samples = pipeline.redraw(args.like, **{name: value for name, value in settings.items() if value is not None}, progress=bar.update)
        else:
            samples = pipeline.sample(
                prompts, seed=args.seed, num=args.num, batch_size=args.batch_size, variation=args.variation, progress=bar.update, done=keep, **settings
            )
    if args.like:
        keep(0, samples)
    result: dict[str, Any] = {
        "files": [str(f) for f in files],
        "seconds": round(samples.seconds, 3),
        "evaluations": samples.evaluations,
        **samples.settings,
    }
    if total > 1:
        columns = args.num if args.num > 1 else min(8, round(total**0.5 + 0.49))
        sheet = grid(samples.images, samples.prompts, columns=columns)
        ways = {"between": samples.between} if samples.between else {}
        told = {"prompts": samples.prompts, "seeds": samples.seeds, **ways, **samples.settings, **samples.model, "version": __version__}
        sheet.info["flowt2i"] = json.dumps(told)
        save(sheet, args.out)
        result["grid"] = str(args.out)
    print(json.dumps(result) if args.json else f"wrote {args.out} ({total} picture(s), {samples.evaluations} evaluations each, {samples.seconds:.1f} s)")
    return 0
