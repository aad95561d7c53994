"""Quality against evaluations as a picture: panels side by side on one scale, few lines each, named where they end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Okabe & Ito's colours, apart for people of any colour vision (and markers tell them apart in grey); the first is what the others are seen against
INKS = ("#4d4d4d", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
TICKS = (4, 8, 16, 32, 64, 100)
Row = dict[str, Any]
Ends = tuple[float, float, float]  # a value, and the ends of its bar
Score = Callable[[Row, Row], Ends | None]  # of a row, beside the one that all are compared with


@dataclass
class Line:
    name: str
    rows: list[Row]
    style: int  # of INKS and MARKS


def plot(panels: dict[str, dict[str, list[Row]]], plain: Row, path: Path, title: str) -> Path:
    """panels: panel -> line -> rows. plain: the row that all are compared with, drawn as a dashed line. Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scenes = "right" in plain
    lines = {panel: [Line(name, rows, style) for style, (name, rows) in enumerate(of.items())] for panel, of in panels.items()}
    drawn: list[tuple[str, list[Line], Score]] = [(panel, of, right if scenes else kernel) for panel, of in lines.items()]
    if found := with_frechet(lines):
        drawn.append((f"Fréchet distance, {plain['num']:,} pictures", found, frechet))
    across = 2 if len(drawn) == 4 else len(drawn)
    width, height = 4.6 * across, 4.1 * -(-len(drawn) // across) + 0.3
    figure, axes = pyplot.subplots(-(-len(drawn) // across), across, figsize=(width, height), squeeze=False, layout="constrained")
    shared = axes.flat[: len(lines)]
    reach = [row["evaluations"] for _, of, _ in drawn for line in of for row in line.rows]
    for axis, (name, of, score) in zip(axes.flat, drawn):
        _panel(axis, of, score, plain, (min(reach) * 0.8, max(reach) * 2.8))
        axis.set_title(name, fontsize=11, loc="left")
        axis.set_ylabel("lower is better" if score is frechet else "")
    lowest, highest = (edge(axis.get_ylim()[i] for axis in shared) for i, edge in enumerate((min, max)))
    for axis in shared:
        axis.set_ylim(lowest, highest)
        axis.set_ylabel(("pictures that show all the prompt says (%)" if scenes else "kernel distance × 1000 (lower is better)") if axis in axes[:, 0] else "")
    for axis, (_, of, score) in zip(axes.flat, drawn):
        _name_lines(axis, of, score, plain)
    bars = "bars: 95% of the paired difference to 50 even Euler steps (dashed)" if scenes else "bars: 95%; dashed: 50 even Euler steps"
    figure.suptitle(f"{title}\n", fontsize=12, x=0.01, ha="left")
    figure.text(0.01, 1 - 0.36 / height, f"the same prompts and noise for all; {bars}", fontsize=9, color="0.35", ha="left", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def right(row: Row, plain: Row) -> Ends:
    """Percent, and the ends of its bar: the paired interval of its difference to `plain`, put on it; `plain` itself has none."""
    less, value = row["less"], 100 * row["right"]
    if row["key"] == plain["key"]:
        return value, value, value
    return value, value + 100 * (less["low"] - less["difference"]), value + 100 * (less["high"] - less["difference"])


def kernel(row: Row, plain: Row) -> Ends:
    return 1000 * row["kid"], 1000 * (row["kid"] - 1.96 * row["kid_error"]), 1000 * (row["kid"] + 1.96 * row["kid_error"])


def frechet(row: Row, plain: Row) -> Ends | None:
    return (row["frechet"],) * 3 if "frechet" in row else None


def with_frechet(panels: dict[str, list[Line]]) -> list[Line]:
    """The lines that have such a distance anywhere, each row once, all in styles of their own; of a name that two panels use the second gets its panel's."""
    found: list[Line] = []
    seen: set[str] = set()
    for panel, lines in panels.items():
        for line in lines:
            new = [row for row in line.rows if "frechet" in row and row["key"] not in seen]
            if new:
                name = f"{panel}, {line.name}" if any(other.name == line.name for other in found) else line.name
                style = line.style if all(other.style != line.style for other in found) else len(INKS) - 1 - len(found)
                found.append(Line(name, new, style))
                seen |= {row["key"] for row in new}
    return found


def _panel(axis: Any, lines: list[Line], score: Score, plain: Row, reach: tuple[float, float]) -> None:
    if level := score(plain, plain):
        axis.axhline(level[0], color="0.55", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    for k, line in enumerate(lines):
        points = [(row["evaluations"], *ends) for row in sorted(line.rows, key=lambda r: r["evaluations"]) if (ends := score(row, plain))]
        x, y, low, high = np.array(points, float).T
        x *= 1 + 0.025 * (k - (len(lines) - 1) / 2)  # beside each other, so that no bar hides another
        axis.errorbar(x, y, yerr=[y - low, high - y], color=INKS[line.style], marker=MARKS[line.style], markersize=5, linewidth=1.5, elinewidth=0.8)
    ticks = [tick for tick in TICKS if reach[0] <= tick <= reach[1]]
    axis.set(xscale="log", xlim=reach, xlabel="evaluations a picture, guidance's included", xticks=ticks, xticklabels=map(str, ticks))
    axis.minorticks_off()
    axis.tick_params(labelsize=9)
    axis.grid(axis="y", color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _name_lines(axis: Any, lines: list[Line], score: Score, plain: Row) -> None:
    """Each line's name to the right of where it ends, moved up or down where names would touch."""
    low, high = axis.get_ylim()
    gap = 0.06 * (high - low)
    ends = []
    for line in lines:
        last = max((row for row in line.rows if score(row, plain)), key=lambda r: r["evaluations"])
        ends.append((score(last, plain)[0], last["evaluations"]))  # type: ignore[index]
    for line, (value, evaluations), height in zip(lines, ends, _apart([value for value, _ in ends], gap)):
        x = max(other[1] for other in ends if abs(other[0] - value) < 2 * gap)  # names of neighbours stand in one column
        ink = INKS[line.style]
        arrow = {"arrowstyle": "-", "color": ink, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if abs(height - value) > 0.3 * gap or x != evaluations else None
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axis.annotate(
            line.name, (evaluations, value), xytext=(x * 1.18, height), fontsize=9, color=ink, va="center", arrowprops=arrow, bbox=behind, annotation_clip=False
        )


def _apart(values: list[float], gap: float) -> list[float]:
    """The values, moved as little as needed to be `gap` apart, in their order: neighbours that touch share a middle."""
    order = sorted(range(len(values)), key=values.__getitem__)
    clusters: list[list[int]] = [[i] for i in order]
    place = lambda cluster: sum(values[i] for i in cluster) / len(cluster)
    k = 0
    while k + 1 < len(clusters):
        a, b = clusters[k], clusters[k + 1]
        if place(b) - place(a) < gap * (len(a) + len(b)) / 2:
            clusters[k : k + 2] = [a + b]
            k = max(k - 1, 0)
        else:
            k += 1
    placed = {i: place(c) + gap * (n - (len(c) - 1) / 2) for c in clusters for n, i in enumerate(c)}
    return [placed[i] for i in range(len(values))]
