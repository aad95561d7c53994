#!/usr/bin/env python3
"""Puts a trained run into the package: exported in bf16, scored as it is shipped, with its model card. The same command replaces an earlier one.

    python benchmarks/pack_model.py runs/quickstart --name scenes
    python benchmarks/pack_model.py runs/emoji --name emoji --scores scored/report.json --source "5,094 emoji of Noto, Twemoji and Fluent"

1. WORK/candidate/NAME   what would be shipped, without scores: the EMA weights in bf16 (read back to fp32 at loading)
2. WORK/evaluation       its pictures, kept: an evaluation that was stopped goes on. Of a model of scenes 2,000 prompts (`--num`) each of all kinds, of pairs of
                         colour and shape that training never showed, of two to four alike, of two objects in a relation; of other models `--metrics` on
                         `--data`, or the scores that `--scores` has (the report.json of `flowt2i evaluate --out DIR`, of that candidate)
3. WORK/final/NAME       with scores and samples of seeds 0 to 15; NAME.md under benchmarks/notes/ ends the card (`--notes` names another file)
4. flowt2i/models/NAME   the same, put in place whole or not at all

Further words, `--sample.field value`, say how it draws of its own, where otherwise than before.
Nothing is put in place where the weights of all packaged models together would be larger than the limit, or where a file names a folder of this machine.
"""

import argparse
import re
import shutil
import sys
import time
from pathlib import Path

import ending

from flowt2i import __version__, box
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation.assemble import from_scores
from flowt2i.evaluation.metrics import METRICS, Context, score
from flowt2i.evaluation.scenes import PUBLISHED
from flowt2i.export.card import Told
from flowt2i.export.export import export
from flowt2i.export.folder import aside
from flowt2i.exported import Measured, read_scores
from flowt2i.pipeline import Pipeline
from flowt2i.training.checkpoint import total_bytes
from flowt2i.training.distributed import World

SCENES = ("scenes", "scenes-heldout", "scenes-counts", "scenes-relations")
NOTES = Path(__file__).with_name("notes")
PATH = re.compile(r"(?<![\w.:/])(?:/[\w.+-]+){2,}")  # absolute, and no part of an address


def measure(model: Path, work: Path, num: int, metrics: tuple[str, ...], data: Path | None, progress: bool = True) -> Measured:
    """Scores of a model, with its own settings of sampling; its pictures are kept under WORK/evaluation."""
    pipeline = Pipeline.from_pretrained(model)
    context = Context(World(0, 1, pipeline.device), num, pipeline, data, given_num=num, run=work, source=model, progress=progress)
    names = metrics or (SCENES if pipeline.description.is_scenes else ("kid",))
    outcome = score([name for name in METRICS if name in names], context)
    if outcome.failure:
        raise outcome.failure
    return Measured(made=time.strftime("%Y-%m-%d", time.gmtime()), version=__version__, scores=from_scores(outcome.found))


def check_size(folder: Path, target: Path) -> None:
    """UserError where the weights of the packaged models would be larger than the limit with this one in the place of `target`."""
    others = sum(box.weight_bytes(other) for other in target.parent.glob("[!._]*/") if other.name != target.name)
    together = others + box.weight_bytes(folder)
    if together > box.LIMIT:
        raise UserError(
            f"{target.name} makes the packaged weights {together / 1e6:.1f} MB together, and {box.LIMIT / 1e6:.0f} MB is the limit: train a smaller one"
        )


def check_private(folder: Path) -> None:
    """UserError where a text in it names a place that there is on this machine."""
    for file in (f for f in folder.rglob("*") if f.is_file() and f.suffix in (".json", ".md", ".txt")):
        for path in PATH.findall(file.read_text()):
            if Path(*Path(path).parts[:3]).exists():
                raise UserError(f"{file} would tell everyone of {path} on this machine: name it otherwise (--source, --notes)")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN", type=Path, help="run folder, checkpoint or exported model")
    parser.add_argument("--name", required=True, help="what it is called: `--model NAME`")
    parser.add_argument(
        "--average", nargs="+", default=[], metavar="MODEL", help="models whose weights are averaged with its own (see `flowt2i export --help`)"
    )
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default apache-2.0)")
    parser.add_argument("--source", default="", help="what the training pictures are called, where they are not the built-in scenes")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="Markdown for the end of the card (default benchmarks/notes/NAME.md, where it is there)")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="scores that were taken already: the report.json of `flowt2i evaluate --out DIR`")
    parser.add_argument("--metrics", default="", help="scores to take, with commas between (default: the four of scenes; of other models kid)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset, for scores that need one")
    parser.add_argument("--num", type=int, default=PUBLISHED, help=f"pictures of each score (default {PUBLISHED:,})")
    parser.add_argument("--work", type=Path, metavar="DIR", help="what is kept between two calls (default runs/packing/NAME)")
    parser.add_argument("--to", type=Path, default=box.BOX, metavar="DIR", help="folder of the packaged models (default: the package's own)")
    args, sample = parser.parse_known_args(words)
    if Path(args.name).name != args.name or args.name.startswith((".", "_")):
        raise UserError(f"--name {args.name!r} is no name of a model: give one word, such as scenes")
    work = args.work or Path("runs") / "packing" / args.name
    notes = args.notes or NOTES / f"{args.name}.md"
    if args.notes and not notes.is_file():
        raise UserError(f"no notes at --notes {notes}")
    given = read_scores(args.scores) if args.scores else None
    metrics = tuple(name.strip() for name in args.metrics.split(",") if name.strip())

    candidate, final = (work / stage / args.name for stage in ("candidate", "final"))
    export(args.model, candidate, dtype="bf16", told=Told(args.license, args.source), samples=0, force=True, average=args.average, sample=sample)
    check_size(candidate, args.to / args.name)
    if not args.source and not DatasetDescription.load(candidate).is_scenes:
        raise UserError("whose pictures was it trained on? name them for the card with --source, and say in --notes under which terms they are")
    started = time.perf_counter()
    measured = given or measure(candidate, work, args.num, metrics, args.data)
    if not given:
        print(f"scored in {time.perf_counter() - started:.0f} s")
    told = Told(args.license, args.source, notes.read_text() if notes.is_file() else "", measured)
    export(args.model, final, dtype="bf16", told=told, samples=16, force=True, average=args.average, progress=True, sample=sample)
    check_size(final, args.to / args.name)
    check_private(final)
    target = args.to / args.name
    with aside(target, force=True) as place:
        shutil.copytree(final, place, dirs_exist_ok=True)
    for score_ in measured.scores[:1]:
        print(f"{score_.name}: {score_.shown()} {score_.interval()}".rstrip())
    weights = (target / "model.safetensors").stat().st_size
    print(f"packed {target}: {total_bytes(target) / 1e6:.2f} MB, of which {weights / 1e6:.2f} MB weights")


if __name__ == "__main__":
    sys.exit(ending.told(main)())
