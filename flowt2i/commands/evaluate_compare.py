"""`flowt2i evaluate --compare A B`: two models on the same prompts and noise."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from flowt2i.commands.evaluate_options import build_context
from flowt2i.errors import UserError

if TYPE_CHECKING:
    from flowt2i.training.distributed import World


def compare(args: argparse.Namespace, world: "World") -> int:
    """Draw, measure, print, and with --out write the report."""
    from flowt2i.evaluation import scenes
    from flowt2i.evaluation.assemble import set_side_by_side
    from flowt2i.evaluation.report import write

    contexts = []
    for model in args.compare:
        args.model = model
        contexts.append(build_context(args, world, ["scenes"]))
    for context in contexts:
        is_scenes = context.need_pipeline("comparison").description.is_scenes
        check_options(args, is_scenes)
        if is_scenes:
            scenes.check(context, "comparison")
    report, pictures = set_side_by_side(contexts[0], contexts[1], tuple(args.compare))
    if not world.main:
        return 0
    found: dict[str, Any] = dict(report.comparison)
    if args.out:
        found["report"] = [str(path) for path in write(report, pictures, args.out)]
    print(json.dumps(found) if args.json else text(found))
    return 0


def check_options(args: argparse.Namespace, is_scenes: bool) -> None:
    """UserError for options that say nothing of a model of this kind of data."""
    if is_scenes and args.clip:
        raise UserError("models of scenes are compared by the exact checker: leave out --clip")
    if not is_scenes and args.heldout_pairs:
        raise UserError("--heldout-pairs is about models of scenes: leave it out")


def text(found: dict[str, Any]) -> str:
    """The rows of a comparison for people."""
    lines = [f"A: {found['a']}", f"B: {found['b']}", f"{found['n']} prompts, the same noise for both; A, B, and B - A with its paired 95% interval"]
    for name, row in found["scores"].items():
        d = row["difference"]
        plain, signed = ("{:6.1%}", "{:+.1%}") if row["share"] else ("{:6.2f}", "{:+.2f}")
        p = f"   p={d['p']:.2g}" if "p" in d else ""
        values = f"{plain.format(row['a'])} {plain.format(row['b'])}   {signed.format(d['difference'])}"
        lines.append(f"  {name:22s} {values} [{signed.format(d['low'])}, {signed.format(d['high'])}]   n={d['n']}{p}")
    return "\n".join([*lines, *found.get("report", [])])
