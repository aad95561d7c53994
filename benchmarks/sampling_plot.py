"""Quality against evaluations as a picture: panels side by side on one scale, few lines each, named where they end."""

from pathlib import Path
from typing import Any

import numpy as np

# Okabe & Ito's colours, apart for people of any colour vision (and markers tell them apart in grey); the first is what the others are seen against
INKS = ("#4d4d4d", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v", "P")
TICKS = (8, 16, 32, 64, 100)
Row = dict[str, Any]


def plot(panels: dict[str, dict[str, list[Row]]], plain: Row, path: Path, title: str) -> Path:
    """panels: panel -> line -> rows. plain: the row that all are compared with, drawn as a dashed line. Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scenes = "right" in plain
    score = right if scenes else kernel
    drawn = [(name, lines, score) for name, lines in panels.items()]
    if not scenes and any("frechet" in row for _, lines, _ in drawn for rows in lines.values() for row in rows):
        drawn.append((f"Fréchet distance, {plain['num']:,} pictures", with_frechet(panels), frechet))
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 4.4), squeeze=False, layout="constrained")
    shared = axes[0][: len(panels)]
    for axis, (name, lines, of) in zip(axes[0], drawn):
        _panel(axis, lines, of, plain)
        axis.set_title(name, fontsize=11, loc="left")
    lowest, highest = (edge(axis.get_ylim()[i] for axis in shared) for i, edge in enumerate((min, max)))
    for axis in shared:
        axis.set_ylim(lowest, highest)
    axes[0][0].set_ylabel("pictures that show all the prompt says (%)" if scenes else "kernel distance × 1000 (lower is better)")
    for axis, (_, lines, of) in zip(axes[0], drawn):
        _name_lines(axis, lines, of)
    if scenes:
        bars = f"{plain['num']} prompts, the same for all; bars: 95% of the paired difference to 50 even Euler steps (dashed)"
    else:
        bars = "bars: 95%; dashed: 50 even Euler steps"
    figure.suptitle(f"{title}\n", fontsize=12, x=0.01, ha="left")
    figure.text(0.01, 0.925, bars, fontsize=9, color="0.35", ha="left", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def right(row: Row, plain: Row) -> tuple[float, float, float] | None:
    """Percent, and the ends of its bar: the paired interval of its difference to `plain`, put on it; `plain` itself has none."""
    less, value = row["less"], 100 * row["right"]
    if row["key"] == plain["key"]:
        return value, value, value
    return value, value + 100 * (less["low"] - less["difference"]), value + 100 * (less["high"] - less["difference"])


def kernel(row: Row, plain: Row) -> tuple[float, float, float] | None:
    return 1000 * row["kid"], 1000 * (row["kid"] - 1.96 * row["kid_error"]), 1000 * (row["kid"] + 1.96 * row["kid_error"])


def frechet(row: Row, plain: Row) -> tuple[float, float, float] | None:
    return (row["frechet"],) * 3 if "frechet" in row else None


def with_frechet(panels: dict[str, dict[str, list[Row]]]) -> dict[str, list[Row]]:
    """The lines that have such a distance anywhere, each row once; a name that two panels use gets the panel's."""
    found: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for panel, lines in panels.items():
        for name, rows in lines.items():
            new = [row for row in rows if "frechet" in row and row["key"] not in seen]
            if new:
                found[f"{panel}, {name}" if name in found else name] = new
                seen |= {row["key"] for row in new}
    return found


def _panel(axis: Any, lines: dict[str, list[Row]], of: Any, plain: Row) -> None:
    level = of(plain, plain)
    if level:
        axis.axhline(level[0], color="0.55", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    for (_, rows), ink, mark in zip(lines.items(), INKS, MARKS):
        points = [(row["evaluations"], *of(row, plain)) for row in sorted(rows, key=lambda r: r["evaluations"]) if of(row, plain)]
        x, y, low, high = np.array(points, float).T
        axis.errorbar(x, y, yerr=[y - low, high - y], color=ink, marker=mark, markersize=5, linewidth=1.5, elinewidth=0.8, alpha=0.95)
    axis.set(xscale="log", xlim=(5.2, 260), xlabel="evaluations a picture, guidance's included", xticks=TICKS, xticklabels=map(str, TICKS))
    axis.minorticks_off()
    axis.tick_params(labelsize=9)
    axis.grid(axis="y", color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _name_lines(axis: Any, lines: dict[str, list[Row]], of: Any) -> None:
    """Each line's name to the right of where it ends, moved up or down where names would touch."""
    low, high = axis.get_ylim()
    ends = []
    for (name, rows), ink in zip(lines.items(), INKS):
        last = max((row for row in rows if of(row, row)), key=lambda r: r["evaluations"])
        ends.append([of(last, last)[0], last["evaluations"], name, ink])
    gap = 0.055 * (high - low)
    heights = _apart([end[0] for end in ends], gap)
    most = max(end[1] for end in ends)
    for (value, evaluations, name, ink), height in zip(ends, heights):
        near = [end for end in ends if abs(end[0] - value) < 2 * gap]
        x = max(end[1] for end in near) if len(near) > 1 else evaluations  # names that were moved stand in one column
        moved = abs(height - value) > 0.3 * gap or x != evaluations
        arrow = {"arrowstyle": "-", "color": ink, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if moved else None
        axis.annotate(name, (evaluations, value), xytext=(min(x, most) * 1.16, height), fontsize=9, color=ink, va="center", arrowprops=arrow)


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
