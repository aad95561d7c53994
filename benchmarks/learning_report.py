"""What trainings of several recipes say together: curves over seeds, at what share of the compute one reaches another's end, a table, plots. Pure but for the
plots. A run is `{"label", "seed", "parameters", "points": […]}` with points as `learning_runs.score` gives them.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowt2i.evaluation.intervals import Z95, tally

AXES = {"images": "images seen", "flops": "model FLOPs of training", "seconds": "seconds of training"}
KINDS = {"all": "all right", "one_object": "one object", "several_alike": "two to four alike", "two_objects": "two in a relation"}
BINS = {"mean": "loss, t < 0.8"} | {f"t{start}": f"loss, t {start.replace('-', ' to ')}" for start in ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8")}
TITLES = {f"scenes/{part}": title for part, title in KINDS.items()}
TITLES |= {"kid/value": "kernel distance", "frechet/value": "Fréchet distance"} | {f"loss/{part}": title for part, title in BINS.items()}

Run = dict[str, Any]


class Measure(NamedTuple):
    """One number of a point."""

    group: str  # scenes, kid, frechet, loss
    part: str

    @property
    def title(self) -> str:
        return TITLES[f"{self.group}/{self.part}"]

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return self.group == "scenes"

    def there(self, runs: Sequence[Run]) -> bool:
        return all(self.group in p and self.part in p[self.group] for run in runs for p in run["points"])


class Line(NamedTuple):
    """A recipe's course, the mean of its seeds, and its band: their least and largest, or where there is one seed its 95% interval."""

    x: dict[str, list[float]]
    y: list[float]
    low: list[float]
    high: list[float]


class Reached(NamedTuple):
    """Where a course comes up to a target for good: at `at`, or (`before`) at its first point already."""

    at: float
    before: bool = False


def measures(runs: Sequence[Run]) -> list[Measure]:
    """What all points have, the one that a comparison is about first."""
    asked = [Measure(*name.split("/")) for name in TITLES]
    return [measure for measure in asked if measure.there(runs)]


def value(point: dict[str, Any], measure: Measure) -> tuple[float, float, float]:
    """A number with its 95% interval (of a loss, the number thrice: its noise is fixed)."""
    found = point[measure.group][measure.part]
    if measure.group == "scenes":
        return found["accuracy"], found["low"], found["high"]
    error = Z95 * (point[measure.group].get("error") or 0.0) if measure.group == "kid" else 0.0
    return found, found - error, found + error


def line(runs: Sequence[Run], measure: Measure) -> Line:
    """The course of a recipe: point k is the mean of its seeds' k-th points."""
    columns = list(zip(*(run["points"] for run in runs), strict=True))
    x = {axis: [statistics.fmean(point[axis] for point in column) for column in columns] for axis in AXES}
    values = [[value(point, measure) for point in column] for column in columns]
    y = [statistics.fmean(v[0] for v in column) for column in values]
    if len(runs) == 1:
        return Line(x, y, [column[0][1] for column in values], [column[0][2] for column in values])
    return Line(x, y, [min(v[0] for v in column) for column in values], [max(v[0] for v in column) for column in values])


def reached(xs: Sequence[float], ys: Sequence[float], target: float, higher: bool = True) -> Reached | None:
    """Where a course passes `target` and never falls back: between its last point that is worse and the next, by a straight line. None: it ends worse.

    The last point that is worse, not the first that is better: noise in the score cannot make it come early.
    """
    worse = [i for i, y in enumerate(ys) if (y < target if higher else y > target)]
    if not worse:
        return Reached(xs[0], before=True)
    i = worse[-1]
    if i == len(ys) - 1:
        return None
    return Reached(xs[i] + (target - ys[i]) / (ys[i + 1] - ys[i]) * (xs[i + 1] - xs[i]))


def shares(runs: Sequence[Run], baseline: Sequence[Run], measure: Measure) -> dict[str, Any]:
    """By axis, at what share of the baseline's whole a recipe reaches the baseline's last score: of the mean course, and of each seed's own."""
    end = line(baseline, measure)
    found: dict[str, Any] = {"target": end.y[-1]}
    for axis in AXES:
        whole = end.x[axis][-1]
        of = lambda course, axis=axis, whole=whole: as_share(reached(course.x[axis], course.y, end.y[-1], measure.higher), whole)
        found[axis] = of(line(runs, measure)) | {"seeds": [of(line([run], measure))["share"] for run in runs]}
    return found


def as_share(found: Reached | None, whole: float) -> dict[str, Any]:
    return {"share": None, "before": False} if found is None else {"share": found.at / whole, "before": found.before}


def share_text(share: dict[str, Any]) -> str:
    """ "0.21 (0.18 to 0.25)", "≤ 0.10", or "not reached"."""
    if share["share"] is None:
        return "not reached"
    own = [s for s in share["seeds"] if s is not None]
    lacking = len(share["seeds"]) - len(own)
    text = ("≤ " if share["before"] else "") + f"{share['share']:.2f}"
    if len(share["seeds"]) == 1 or not own:
        return text
    return f"{text} ({min(own):.2f} to {max(own):.2f}" + (f", {lacking} of {len(share['seeds'])} seeds not)" if lacking else ")")


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each recipe, in the order in which they were asked for."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["label"], []).append(run)
    return found


def summary(runs: Sequence[Run], baseline: str) -> dict[str, Any]:
    """Of each recipe: cost and last scores over its seeds, and where it reaches the baseline's end by the main measure and by the loss."""
    groups, asked = by_label(runs), measures(runs)
    told = list(dict.fromkeys([asked[0], next(m for m in asked if (m.group, m.part) == ("loss", "mean"))]))
    found: dict[str, Any] = {}
    for name, group in groups.items():
        last = [run["points"][-1] for run in group]
        entry: dict[str, Any] = {"seeds": [run["seed"] for run in group], "parameters": group[0]["parameters"]}
        entry |= {axis: statistics.fmean(point[axis] for point in last) for axis in AXES}
        for measure in asked:
            entry[f"{measure.group}/{measure.part}"] = over_seeds(last, measure)
        if baseline in groups and name != baseline:
            entry["reaches_baseline"] = {f"{m.group}/{m.part}": shares(group, groups[baseline], m) for m in told}
        found[name] = entry
    return found


def over_seeds(points: Sequence[dict[str, Any]], measure: Measure) -> dict[str, Any]:
    """Of scenes the share of all seeds' pictures with Wilson's interval (each seed has prompts of its own); else mean, least and largest."""
    if measure.group == "scenes":
        found = [point["scenes"][measure.part] for point in points]
        return tally(sum(round(f["accuracy"] * f["n"]) for f in found), sum(f["n"] for f in found))
    numbers = [value(point, measure)[0] for point in points]
    return {"mean": statistics.fmean(numbers), "least": min(numbers), "largest": max(numbers)}


def table(found: dict[str, Any], baseline: str) -> str:
    """Markdown."""
    first = next(iter(found.values()))
    keys = [key for key in first if key.startswith(("scenes/", "kid/", "frechet/")) or key == "loss/mean"]
    told = next((entry["reaches_baseline"] for entry in found.values() if "reaches_baseline" in entry), None)
    main = next(iter(told)) if told else ""
    head = ["recipe", "seeds", "parameters", "images", "PFLOP", "minutes", *(TITLES[key] + (" × 1000" if key == "kid/value" else "") for key in keys)]
    head += [f"end of `{baseline}` ({TITLES[main]}) at: images", "FLOPs", "seconds"] if told else []
    rows = []
    for name, entry in found.items():
        row = [f"`{name}`", ", ".join(map(str, entry["seeds"])), f"{entry['parameters'] / 1e6:.2f}M", f"{entry['images']:,.0f}", f"{entry['flops'] / 1e15:.3g}"]
        row += [f"{entry['seconds'] / 60:.1f}", *(cell(key, entry[key]) for key in keys)]
        row += [share_text(entry["reaches_baseline"][main][axis]) if "reaches_baseline" in entry else "1" for axis in AXES] if told else []
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def cell(key: str, entry: dict[str, Any]) -> str:
    if key.startswith("scenes/"):
        return f"{entry['accuracy']:.1%} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    scale, digits = (1000, 1) if key.startswith("kid/") else (1, 2 if key.startswith("frechet/") else 4)
    spread = f" ({scale * entry['least']:.{digits}f} to {scale * entry['largest']:.{digits}f})" if entry["least"] != entry["largest"] else ""
    return f"{scale * entry['mean']:.{digits}f}{spread}"


def verdicts(found: dict[str, Any], baseline: str) -> list[str]:
    """A line for each recipe and measure: "quickstart reaches seed's final score (all right, 12.0%) at 0.21 of its FLOPs, …"."""
    lines = []
    for name, entry in found.items():
        for key, share in entry.get("reaches_baseline", {}).items():
            what, target = TITLES[key], f"{share['target']:.1%}" if key.startswith("scenes/") else f"{share['target']:.4g}"
            if share["flops"]["share"] is None:
                lines.append(f"{name} does not reach {baseline}'s final score ({what}, {target})")
                continue
            of = f"{share_text(share['flops'])} of its FLOPs, {share_text(share['images'])} of its images, {share_text(share['seconds'])} of its seconds"
            lines.append(f"{name} reaches {baseline}'s final score ({what}, {target}) at {of}")
    return lines


# ---- plots ------------------------------------------------------------------------------------------------------------


def plot(runs: Sequence[Run], baseline: str, title: str, path: Path) -> list[Path]:
    """`path` (.png): the main measure over images, FLOPs and seconds; beside it `…-parts.png`: every measure over FLOPs."""
    asked = measures(runs)
    return [
        _figure(runs, baseline, [(asked[0], axis) for axis in AXES], 3, f"{title}: {asked[0].title}", path),
        _figure(runs, baseline, [(measure, "flops") for measure in asked], 4, title, path.with_name(f"{path.stem}-parts.png")),
    ]


def _figure(runs: Sequence[Run], baseline: str, panels: Sequence[tuple[Measure, str]], columns: int, title: str, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows + 0.8), squeeze=False, layout="constrained")
    groups, colours = by_label(runs), pyplot.colormaps["tab10"]
    for number, (measure, axis) in enumerate(panels):
        panel = axes[number // columns][number % columns]
        for i, (name, group) in enumerate(groups.items()):
            course = line(group, measure)
            panel.plot(course.x[axis], course.y, "o-", color=colours(i % 10), markersize=3, linewidth=1.4, label=name if number == 0 else None)
            if len(course.y) > 1:
                panel.fill_between(course.x[axis], course.low, course.high, color=colours(i % 10), alpha=0.15, linewidth=0)
            if name == baseline:
                panel.axhline(course.y[-1], color=colours(i % 10), linewidth=0.8, linestyle="--")
        _dress(panel, measure, axis, PercentFormatter(1.0, decimals=0))
    for empty in axes.flat[len(panels) :]:
        empty.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=min(6, len(groups)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _dress(panel: Any, measure: Measure, axis: str, percent: Callable[..., Any]) -> None:
    panel.set(xlabel=AXES[axis], ylabel=measure.title)
    panel.set_xlim(left=0)
    if measure.group == "scenes":
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(percent)
    elif measure.group == "loss":
        panel.set_yscale("log")
        from matplotlib.ticker import LogLocator, ScalarFormatter

        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter("")
    panel.spines[["top", "right"]].set_visible(False)
