#!/usr/bin/env python3
"""What size of model a compute budget is worth, and which rates and batch a size wants: the fit behind `flowt2i train --size`.

    python benchmarks/size_fit.py --data data/scenes --sizes 96,128,192,256 --budgets 10T,20T,40T
    python benchmarks/size_fit.py --data data/scenes --budgets 10T,20T,40T --sweep lr=0.5,1,2,4@20k --sweep depth=0.5,1,2@20T --write lr

Trains the recipe at each width for each budget of model FLOPs, with what the rule of flowt2i/sizes.py sets for that width, and takes the held-out loss of its
end (t < 0.8). A parabola in the logarithm of the size gives each budget's best size, power laws go through these: loss against FLOPs, size against FLOPs.
`--sweep LAW=FACTORS@BUDGET` trains each width with one law of the rule multiplied, and refits that law through each width's best factor: lr (both rates) and
batch_size with BUDGET images, for what rate is best depends on how long it lasts; depth with BUDGET FLOPs, and best at equal size, for it costs them. Runs are
resumed and never repeated, as in learning.py. Writes NAME.json and NAME.png into benchmarks/results; `--write LAWS` besides puts the exponents that were
refitted of these into flowt2i/sizes.json. Method: docs/learning.md.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ending
import learning_runs
import machine
import recipes
from learning import RESULTS, numbers
from learning_runs import Budget, Equal, Scoring
from size_laws import PowerLaw, lowest, lowest_across, power_law, slope_error
from tqdm import tqdm

from flowt2i import sizes
from flowt2i.cli import Parser
from flowt2i.config import Config
from flowt2i.errors import UserError, nearest
from flowt2i.training.distributed import best_device

LEAST_SIZES = 4
SWEPT = {"lr": ("lr", "muon_lr"), "batch_size": ("batch_size",), "depth": ("depth",)}  # what is multiplied together
LAWS = [law for laws in SWEPT.values() for law in laws]
SWEPT_EQUAL: dict[str, Equal] = {"lr": "data", "batch_size": "data", "depth": "flops"}  # what its trainings have in common


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", required=True, help="prepared dataset")
    parser.add_argument("--recipe", default="quickstart", help="recipe of benchmarks/recipes.py, but for its size (default quickstart)")
    parser.add_argument("--sizes", default="96,128,192,256", help=f"widths, at least {LEAST_SIZES} (default 96,128,192,256)")
    parser.add_argument("--budgets", required=True, help="FLOPs of training, with commas between, such as 20T,40T,80T")
    parser.add_argument("--seeds", default="0", help="seeds, with commas between; losses are their mean (default 0)")
    parser.add_argument("--sweep", action="append", default=[], metavar="LAW=FACTORS@BUDGET",
                        help="such as lr=0.5,1,2@20k or batch_size=0.5,1,2@20k (images), depth=0.5,1,2@20T (FLOPs); may be repeated")  # fmt: skip
    parser.add_argument("--loss-images", type=int, default=1024, help="held-out images of the loss (default 1024)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default runs/size-fit-DATA)")
    parser.add_argument("--results", type=Path, metavar="DIR", default=RESULTS, help="where the results are written (default benchmarks/results)")
    parser.add_argument("--name", help="of the results (default size-fit-DATA)")
    parser.add_argument("--write", default="", metavar="LAWS", help="put what was found of these swept laws into flowt2i/sizes.json, such as lr or lr,depth")
    parser.add_argument("--json", action="store_true", help="print the fit as one JSON object on the last line")
    return parser


def run(args: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """All trainings and the fit through them."""
    recipe, widths, seeds = recipes.find(args.recipe), sorted(numbers("--sizes", args.sizes)), numbers("--seeds", args.seeds)
    if len(widths) < LEAST_SIZES or any(width not in sizes.WIDTHS for width in widths):
        raise UserError(f"--sizes {args.sizes!r}: give {LEAST_SIZES} widths or more, multiples of 32 from {sizes.WIDTHS[0]}")
    budgets = sorted({parse_budget("--budgets", "flops", word.strip()) for word in args.budgets.split(",")}, key=lambda budget: budget.amount)
    parsed = [parse_sweep(word) for word in args.sweep]
    sweeps = dict(parsed)
    if len(sweeps) < len(parsed):
        raise UserError("--sweep: each law once, with all its factors")
    for law in written(args):
        if law not in sweeps:
            raise UserError(f"--write {law}: it is not swept; give --sweep {law}=… besides")
    description = learning_runs.described(args.data)
    jobs: list[tuple[int, Budget, dict[str, float]]] = [(width, budget, {}) for budget in budgets for width in widths]
    jobs += [(width, budget, {name: factor} if factor != 1 else {}) for name, (factors, budget) in sweeps.items() for factor in factors for width in widths]
    jobs = [job for i, job in enumerate(jobs) if job not in jobs[:i]]  # the rule itself, swept for several laws or in the plain part too
    scaled = recipe.config([])
    configs = [recipe.config([*as_words(sizes.settings(width, scaled, laws(factors))), *more]) for width, _, factors in jobs]
    for config in configs:
        config.model.resolve(description.codec.kind, description.codec.shape)
    out = args.out or Path("runs") / f"size-fit-{args.data.resolve().name}"
    points = []
    for (width, budget, factors), config in zip(tqdm(jobs, desc="sizes", unit="size", leave=False), configs):
        label = "-".join([f"width{width}", str(budget), *(f"{name}{factor:g}" for name, factor in factors.items())])
        found = [trained(out / f"{label}-seed{seed}", label, seed, budget, config, args) for seed in seeds]
        mean = {key: statistics.fmean(one[key] for one in found) for key in ("parameters", "flops", "images", "seconds", "loss")}
        values = {law: value for law, value in sizes.values(config).items() if law in LAWS}
        points.append(
            {"width": width, "equal": budget.equal, "budget": budget.amount, "factors": factors, "values": values}
            | mean
            | {"losses": [one["loss"] for one in found]}
        )
    name = args.name or f"size-fit-{args.data.resolve().name}"
    settings = {"recipe": args.recipe, "more": more, "seeds": seeds, "data": args.data.resolve().name, "fingerprint": description.fingerprint}
    return {
        "name": name,
        **machine.facts(best_device()),
        **settings,
        "points": points,
        "scaled_width": scaled.model.width,
        "fit": fit(points),
        "swept": {key: refit(key, points, budget, scaled) for key, (_, budget) in sweeps.items()},
    }


def written(args: argparse.Namespace) -> list[str]:
    return [law.strip() for law in args.write.split(",") if law.strip()]


def parse_budget(option: str, equal: Equal, text: str) -> Budget:
    try:
        return Budget.parse(equal, text)
    except UserError as error:
        raise UserError(f"{option}: {text!r} is no number of {'images, such as 20k' if equal == 'data' else 'FLOPs, such as 20T'}") from error


def parse_sweep(text: str) -> tuple[str, tuple[list[float], Budget]]:
    """`lr=0.5,1,2@20k` -> ("lr", ([0.5, 1, 2], 20,000 images))."""
    name, equals, values = text.partition("=")
    values, at, amount = values.partition("@")
    if name not in SWEPT:
        raise UserError(f"--sweep {text!r}: no law {name!r}{nearest(name, SWEPT)}")
    equal = SWEPT_EQUAL[name]
    example = f"{name}=0.5,1,2@{'20k' if equal == 'data' else '20T'}"
    try:
        factors = sorted({1.0, *(float(word) for word in values.split(","))})
    except ValueError:
        factors = []
    if not equals or len(factors) < 3 or not all(0 < factor < math.inf for factor in factors):
        raise UserError(f"--sweep {text!r}: give two factors or more beside 1, such as {example}")
    if not at:
        raise UserError(f"--sweep {text!r}: say how long each trains, in {'images' if equal == 'data' else 'FLOPs'}, such as {example}")
    return name, (factors, parse_budget(f"--sweep {name}", equal, amount))


def laws(factors: dict[str, float]) -> dict[str, float]:
    """Factors of what is swept -> factors of the laws that belong to it."""
    return {law: factor for name, factor in factors.items() for law in SWEPT[name]}


def as_words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", f"{value:g}")]


def trained(folder: Path, label: str, seed: int, budget: Budget, config: Any, args: argparse.Namespace) -> dict[str, float]:
    """One training, and the loss at its end."""
    print(f"== {label}, seed {seed}: {folder}", file=sys.stderr)
    plan = learning_runs.open_plan(folder, label, seed, budget, 1, config, args.data)
    learning_runs.train(folder, plan, args.data)
    point = learning_runs.score(folder, plan, args.data, Scoring(1, 1, args.loss_images, "heldout", draws=False))[-1]
    facts = json.loads((folder / "run" / "config.json").read_text())["resolved"]
    return {"parameters": facts["parameters"]["total"], "loss": point["loss"]["mean"]} | {key: point[key] for key in ("flops", "images", "seconds")}


# ---- the fit ----------------------------------------------------------------------------------------------------------


def fit(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each budget its best size; over budgets (two or more) the laws of loss and of size against FLOPs."""
    plain = at_equal_flops(points)
    best = []
    for budget in sorted({point["budget"] for point in plain}):
        same = [point for point in plain if point["budget"] == budget]
        vertex = lowest([point["parameters"] for point in same], [point["loss"] for point in same])
        best.append({"flops": budget, "parameters": vertex.at, "loss": vertex.value, "inside": vertex.inside, "curve": vertex.curve})
    found: dict[str, Any] = {"best": best}
    if len(best) > 1:
        flops = [one["flops"] for one in best]
        found["loss_law"] = power_law(flops, [one["loss"] for one in best], with_floor=True)._asdict()
        found["size_law"] = power_law(flops, [one["parameters"] for one in best])._asdict()
    return found


def at_equal_flops(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the plain rule at the budgets of FLOPs."""
    return [point for point in points if not point["factors"] and point["equal"] == "flops"]


def of_sweep(name: str, points: list[dict[str, Any]], width: int, equal: Equal, budget: float) -> list[dict[str, Any]]:
    """What was measured of a swept law at one width: by factor, the rule's own among them."""
    same = [p for p in points if (p["width"], p["equal"], p["budget"]) == (width, equal, budget) and set(p["factors"]) <= {name}]
    return sorted(same, key=lambda point: point["factors"].get(name, 1.0))


def refit(name: str, points: list[dict[str, Any]], budget: Budget, preset: Config) -> dict[str, Any]:
    """A swept law: each width's best factor, and the power law through what these give: its value at the preset's width, and the exponent of the width.

    Factors are those that were trained, which rounding sets apart from those that were asked for (a depth of 5 halved is 2).
    """
    widths = sorted({point["width"] for point in points})
    by_width = [of_sweep(name, points, width, budget.equal, budget.amount) for width in widths]
    rules = [next(point for point in same if not point["factors"]) for same in by_width]
    factors = [[point["values"][name] / rule["values"][name] for point in same] for same, rule in zip(by_width, rules)]
    if name == "depth":  # at equal size: a deeper network of a width is a larger one, and which size is best is another question
        everything = [(point["parameters"], factor, point["loss"]) for some, same in zip(factors, by_width) for factor, point in zip(some, same)]
        found = lowest_across(*zip(*everything), at=[rule["parameters"] for rule in rules])
    else:
        found = [lowest(factor, [point["loss"] for point in same]) for factor, same in zip(factors, by_width)]
    best = [{"width": width, "factor": vertex.at, "loss": vertex.value, "inside": vertex.inside} for width, vertex in zip(widths, found)]
    refitted: dict[str, Any] = {}
    for law in SWEPT[name]:
        ratios, values = [width / preset.model.width for width in widths], [rule["values"][law] * vertex.at for rule, vertex in zip(rules, found)]
        through = power_law(ratios, values)
        refitted[law] = {"at": through.scale, "exponent": through.exponent, "error": slope_error(ratios, values)}
    return {"equal": budget.equal, "budget": budget.amount, "best": best, "laws": refitted}


def write_constants(results: dict[str, Any], names: list[str], path: Path) -> None:
    """The constants of the dial, with the refitted exponents of the swept laws `names`, and where they are from.

    Levels are the presets' own: the best rate of a sweep is that of trainings as short as the sweep's. UserError for a law whose best factor lies at the edge
    of what was swept.
    """
    by = f"benchmarks/size_fit.py, {results['name']}, {results['date'][:10]}, commit {results['commit']}"
    found = dict(sizes.constants())
    found["laws"] = {law: dict(value) for law, value in found["laws"].items()}
    for name in names:
        edge = [str(one["width"]) for one in results["swept"][name]["best"] if not one["inside"]]
        if edge:
            raise UserError(
                f"--write {name}: the best factor is the least or the largest one at width {', '.join(edge)}: sweep more factors (sizes.json is as it was)"
            )
        for law, value in results["swept"][name]["laws"].items():
            *_, least = found["laws"][law]["from"].partition("; least: ")
            found["laws"][law] |= {"exponent": value["exponent"], "error": value["error"], "from": by + (f"; least: {least}" if least else "")}
    learning_runs.write_whole(path, json.dumps(found, indent=2))


# ---- what is shown ----------------------------------------------------------------------------------------------------


def said(results: dict[str, Any]) -> list[str]:
    lines = []
    for one in results["fit"]["best"]:
        edge = "" if one["inside"] else " (no lowest point between the sizes: the best of them)"
        lines.append(f"{one['flops']:.3g} FLOPs: best size {one['parameters'] / 1e6:.2f}M parameters, loss {one['loss']:.4f}{edge}")
    if "loss_law" in results["fit"]:
        loss, size = (PowerLaw(**results["fit"][name]) for name in ("loss_law", "size_law"))
        lines.append(f"loss = {loss.floor:.4f} + {loss.scale:.4g} FLOPs^{loss.exponent:.3f}; best size = {size.scale:.4g} FLOPs^{size.exponent:.3f}")
    for swept in results["swept"].values():
        for law, value in swept["laws"].items():
            factors = ", ".join(f"{one['width']}: {one['factor']:.2f}{'' if one['inside'] else ' (edge)'}" for one in swept["best"])
            law_of = f"{law} = {value['at']:.4g} (width / {results['scaled_width']})^({value['exponent']:.3f} ± {value['error']:.3f})"
            lines.append(f"{law_of} (best factor by width: {factors})")
    return lines


def plot(results: dict[str, Any], path: Path) -> Path:
    """Loss against size at each budget; loss and best size against FLOPs; loss against the factor of each sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    points, found = results["points"], results["fit"]
    count = 3 + len(results["swept"])
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.8 * columns, 3.9 * rows + 0.2), squeeze=False, layout="constrained")
    panels, colours = list(axes.flat), pyplot.colormaps["viridis"]
    for i, one in enumerate(found["best"]):
        same = [p for p in at_equal_flops(points) if p["budget"] == one["flops"]]
        colour = colours(i / max(1, len(found["best"]) - 1) * 0.85)
        xs = np.geomspace(min(p["parameters"] for p in same), max(p["parameters"] for p in same), 100)
        panels[0].plot([p["parameters"] for p in same], [p["loss"] for p in same], "o", color=colour, markersize=5, label=f"{one['flops']:.2g} FLOPs")
        panels[0].plot(xs, np.polynomial.polynomial.polyval(np.log(xs), one["curve"]), color=colour, linewidth=1)
        panels[0].plot([one["parameters"]], [one["loss"]], "*" if one["inside"] else "x", color=colour, markersize=11)
    panels[0].set(xscale="log", xlabel="parameters", ylabel="held-out loss, t < 0.8", title="equal compute")
    panels[0].legend(fontsize=8, frameon=False)
    flops = [one["flops"] for one in found["best"]]
    plain = at_equal_flops(points)
    panels[1].plot([p["budget"] for p in plain], [p["loss"] for p in plain], "o", color="0.75", markersize=4, label="all sizes")
    for panel, key, law in ((panels[1], "loss", "loss_law"), (panels[2], "parameters", "size_law")):
        panel.plot(flops, [one[key] for one in found["best"]], "*", color="C0", markersize=11, label="best size")
        if law in found:
            xs, through = np.geomspace(flops[0], flops[-1], 50), PowerLaw(**found[law])
            text = f"{through.floor:.3g} + " if through.floor else ""
            panel.plot(xs, [through(x) for x in xs], color="C0", linewidth=1, label=f"{text}{through.scale:.3g} C^{through.exponent:.3f}")
        panel.set(xscale="log", yscale="log", xlabel="model FLOPs of training, C")
        panel.legend(fontsize=8, frameon=False)
    panels[1].set(ylabel="held-out loss, t < 0.8", title="loss against compute")
    best = [one["parameters"] for one in found["best"]]
    panels[2].set(ylabel="parameters", title="best size against compute", ylim=(min(best) / 2, max(best) * 2))
    for panel, (name, swept) in zip(panels[3:], results["swept"].items()):
        across = name == "depth"  # against the size: see refit
        for i, one in enumerate(swept["best"]):
            same = of_sweep(name, points, one["width"], swept["equal"], swept["budget"])
            xs = [p["parameters"] if across else p["factors"].get(name, 1.0) for p in same]
            colour = colours(i / max(1, len(swept["best"]) - 1) * 0.85)
            panel.plot(xs, [p["loss"] for p in same], "o-", color=colour, markersize=4, linewidth=1, label=f"width {one['width']}")
        each = f"{swept['budget']:,.0f} images" if swept["equal"] == "data" else f"{swept['budget']:.2g} FLOPs"
        given = ", ".join(f"{factor:g}" for factor in sorted({p["factors"].get(name, 1.0) for p in points}))
        along = f"parameters ({name} {given} times the rule's)" if across else f"{name} over the rule's"
        panel.set(xscale="log", xlabel=along, ylabel="held-out loss, t < 0.8", title=f"{name}, {each}")
        panel.legend(fontsize=8, frameon=False)
    for panel in panels[:count]:
        panel.spines[["top", "right"]].set_visible(False)
        for axis in (panel.xaxis, panel.yaxis):
            if axis.get_scale() == "log":
                plain_ticks(axis)
    for panel in panels[count:]:
        panel.set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def plain_ticks(axis: Any) -> None:
    """Few ticks with short numbers on a logarithmic axis, however short it is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    short: Callable[[float, int], str] = lambda value, _: f"{value / 1e6:g}M" if 1e5 <= value < 1e10 else f"{value:.3g}"
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(short))
    for text in axis.get_ticklabels():
        text.set_fontsize(8)


@ending.told
def main(words: list[str] | None = None) -> int:
    args, more = arguments().parse_known_args(words)
    results = run(args, more)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{results['name']}.json"
    learning_runs.write_whole(path, json.dumps(results, indent=1))
    files = [path]
    try:
        files.append(plot(results, path.with_suffix(".png")))
    except ImportError:
        print("no plot: pip install matplotlib, and run the same command again", file=sys.stderr)
    print("\n".join([*said(results), *map(str, files)]))
    if written(args):
        write_constants(results, written(args), sizes.CONSTANTS)
        print(sizes.CONSTANTS)
    if args.json:
        print(json.dumps({"files": [str(file) for file in files], "fit": results["fit"], "swept": results["swept"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
