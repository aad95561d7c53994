#!/usr/bin/env python3
"""How fast recipes learn: at equal data, equal FLOPs or equal time, the score against images seen, model FLOPs and seconds of training.

    python benchmarks/learning.py --data data/scenes --equal data --budget 120k --recipes seed,quickstart,quickstart@0.25 --seeds 0,1,2
    python benchmarks/learning.py --data data/emoji --equal time --budget 10m --recipes seed,quickstart
    python benchmarks/learning.py --data data/scenes --equal flops --budget 5P --model.width 768 --model.depth 12 --model.heads 12

Recipes are named in benchmarks/recipes.py (`--list`); `@0.25` gives one a quarter of the budget, with a schedule of that length. Settings after the options
hold for all. Every run is a `flowt2i train` of its own, its checkpoints are scored by `flowt2i evaluate`'s metrics. The same command run again goes on with
what was cut and repeats nothing that is finished, and commands that share `--out` share their runs. Writes NAME.json, NAME.md, NAME.png and
NAME-parts.png into benchmarks/results. Method: docs/learning.md.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ending
import learning_report
import learning_runs
import machine
import recipes
from learning_runs import Budget, Scoring
from tqdm import tqdm

from flowt2i.cli import Parser
from flowt2i.config import parse_overrides
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.training.distributed import best_device

RESULTS = Path(__file__).parent / "results"


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset")
    parser.add_argument("--recipes", default="seed,quickstart", help="names with commas between, each with @SHARE of the budget (default seed,quickstart)")
    parser.add_argument("--list", action="store_true", help="print the recipes, and end")
    parser.add_argument("--equal", choices=("data", "flops", "time"), default="data", help="what all runs get alike (default data)")
    parser.add_argument("--budget", help="of it: images (120k), FLOPs of training (125T), or time of training (10m)")
    parser.add_argument("--seeds", default="0", help="seeds of training and prompts, with commas between (default 0)")
    parser.add_argument("--points", type=int, default=10, help="scored checkpoints a run, at even distances (default 10)")
    parser.add_argument("--num", type=int, default=200, help="pictures at each point (default 200)")
    parser.add_argument("--final-num", type=int, default=500, help="pictures at the last one (default 500)")
    parser.add_argument("--loss-images", type=int, default=512, help="held-out images of the validation loss (default 512)")
    parser.add_argument("--reference", choices=("heldout", "train"), default="heldout", help="real pictures of kernel and Fréchet distance (default heldout)")
    parser.add_argument("--baseline", help=f"recipe whose end the others are measured by (default {recipes.BASELINE} where it is among them)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default runs/learning-DATA-EQUAL-BUDGET)")
    parser.add_argument("--results", type=Path, metavar="DIR", default=RESULTS, help="where the results are written (default benchmarks/results)")
    parser.add_argument("--name", help="of the results (default learning-DATA-EQUAL-BUDGET)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on the last line")
    return parser


def run(args: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """All runs, trained and scored; what the results file holds."""
    asked, seeds = recipes.parse(args.recipes), numbers("--seeds", args.seeds)
    baseline = args.baseline or recipes.BASELINE
    if args.baseline and args.baseline not in [recipes.label(*recipe) for recipe in asked]:
        raise UserError(f"--baseline {args.baseline} is not among --recipes")
    for name, least in (("points", 1), ("num", 1), ("final_num", 1), ("loss_images", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    if not args.data or not args.budget:
        raise UserError("give --data DIR and --budget, such as --budget 120k")
    budget, description = Budget.parse(args.equal, args.budget), learning_runs.described(args.data)
    scoring = Scoring(args.num, args.final_num, args.loss_images, args.reference)
    learning_runs.check_scores(description, scoring)
    parse_overrides(more)
    configs = {name: recipes.find(name).config(more) for name, _ in asked}  # before any work, all that can be refused
    for config in configs.values():
        config.model.resolve(description.codec.kind, description.codec.shape)
    title = f"learning-{args.data.resolve().name}-{args.equal}-{budget}"
    out = args.out or Path("runs") / title
    jobs = [(name, share, seed) for seed in seeds for name, share in asked]  # a seed of all recipes before the next
    runs = []
    for name, share, seed in tqdm(jobs, desc="runs", unit="run", leave=False):
        label = recipes.label(name, share)
        folder, of = out / f"{label}-seed{seed}", Budget(budget.equal, budget.amount * share)
        print(f"== {label}, seed {seed}: {folder}", file=sys.stderr)
        plan = learning_runs.open_plan(folder, label, seed, of, args.points, configs[name], args.data)
        learning_runs.train(folder, plan, args.data)
        points = learning_runs.score(folder, plan, args.data, scoring)
        trained = json.loads((folder / "run" / "config.json").read_text())["resolved"]
        runs.append({
            "label": label, "recipe": name, "share": share, "seed": seed, "changes": [*recipes.find(name).changes, *more], "about": recipes.find(name).about,
            "parameters": trained["parameters"]["total"], "flops_per_image": plan.flops_per_image, "steps": plan.steps, "compiled": trained["compiled"],
            "starts": learning_runs.read_starts(folder), "points": points,
        })  # fmt: skip
    runs.sort(key=lambda one: [recipes.label(*recipe) for recipe in asked].index(one["label"]))
    return {"name": args.name or title, **machine.facts(best_device()), **facts_of(args, description, budget), "baseline": baseline, "runs": runs,
            "summary": learning_report.summary(runs, baseline)}  # fmt: skip


def facts_of(args: argparse.Namespace, description: DatasetDescription, budget: Budget) -> dict[str, Any]:
    data = {"name": args.data.resolve().name, "source": "scenes" if description.is_scenes else "", "fingerprint": description.fingerprint}
    data |= {"train": description.train_count, "heldout": description.heldout_count}
    return {"data": data, "equal": args.equal, "budget": budget.amount, "floor_of_the_loss": learning_runs.FLOOR}


def numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UserError(f"{option} {text!r}: give whole numbers with commas between, such as 0,1,2")
    return list(dict.fromkeys(found))


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """JSON, Markdown and plots."""
    path = folder / f"{results['name']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    learning_runs.write_whole(path, json.dumps(results, indent=1))
    text = [learning_report.table(results["summary"], results["baseline"]), "", *(f"- {line}" for line in said(results))]
    learning_runs.write_whole(path.with_suffix(".md"), "\n".join(text))
    unit = {"data": f"{results['budget']:,.0f} images", "flops": f"{results['budget']:.3g} FLOPs", "time": f"{results['budget'] / 60:g} minutes"}
    title = f"{results['data']['name']}, {unit[results['equal']]} each"
    try:
        plots = learning_report.plot(results["runs"], results["baseline"], title, path.with_suffix(".png"))
    except ImportError:
        print("no plots: pip install matplotlib, and run the same command again", file=sys.stderr)
        plots = []
    return [path, path.with_suffix(".md"), *plots]


def said(results: dict[str, Any]) -> list[str]:
    return learning_report.verdicts(results["summary"], results["baseline"])


@ending.told
def main(words: list[str] | None = None) -> int:
    args, more = arguments().parse_known_args(words)
    if args.list:
        print("\n".join(f"{name:30s} {recipe.about}" for name, recipe in recipes.RECIPES.items()))
        return 0
    results = run(args, more)
    written = write(results, args.results)
    print("\n".join([learning_report.table(results["summary"], results["baseline"]), "", *said(results), *map(str, written)]))
    if args.json:
        print(json.dumps({"files": [str(path) for path in written], "summary": results["summary"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
