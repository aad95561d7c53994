"""Line charts as inline SVG: pure functions from numbers to text, coloured by the page's own light or dark style (see `page.STYLE`)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 420, 270  # of the drawing; the page scales it, text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 40  # margins for the axes


@dataclass
class Series:
    """A line through points; `low` and `high` draw a band (or error bars at few points) round it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default_factory=tuple)
    high: Sequence[float] = field(default_factory=tuple)
    style: str = "a"  # a, b: this run and another; r: a reference behind them


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def short(value: float) -> str:
    """120000 -> 120k, 0.050 -> 0.05."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, x_log: bool = False, y_format: Callable[[float], str] = short,
    from_zero: bool = False, y_log: bool = False, name: str = "chart",
) -> str:  # fmt: skip
    """One `<svg>` of all series; points that are not finite are left out. ValueError where nothing is left to draw."""
    xs = [x for s in series for x in s.x if math.isfinite(x)]
    ys = [y for s in series for y in (*s.y, *s.low, *s.high) if math.isfinite(y)]
    if not xs or not ys:
        raise ValueError("a chart needs at least one finite point")
    scale: Callable[[float], float] = (lambda v: math.log2(max(v, 1e-9))) if x_log else (lambda v: v)
    x_ticks = sorted(set(xs)) if x_log else ticks(min(xs), max(xs), 5)
    y_log = y_log and min(ys) > 0
    rise: Callable[[float], float] = math.log10 if y_log else (lambda v: v)
    y_ticks = log_ticks(min(ys), max(ys)) if y_log else ticks(0.0 if from_zero else min(ys), max(ys), 5)
    x_low, x_high = min(map(scale, (*xs, *x_ticks))), max(map(scale, (*xs, *x_ticks)))
    y_low, y_high = (rise(edge(0.0 if from_zero else ys[0], *ys, *y_ticks)) for edge in (min, max))
    px = lambda x: LEFT + 8 + (scale(x) - x_low) / max(x_high - x_low, 1e-12) * (WIDTH - LEFT - RIGHT - 16)
    py = lambda y: HEIGHT - BOTTOM - (rise(y) - y_low) / max(y_high - y_low, 1e-12) * (HEIGHT - TOP - BOTTOM)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{y_format(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text class="tick" x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(y_label)}</text>')
    for line in sorted(series, key=lambda s: s.style != "r"):  # references lie behind
        parts += _drawn(line, px, py, y_format)
    return "".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """Names of the series beside their colours, each name once."""
    named = {line.name: line.style for line in series if line.name}
    items = "".join(f'<span><i class="key {style}"></i>{escape(name)}</span>' for name, style in named.items())
    return f'<p class="legend">{items}</p>' if len(named) > 1 else ""


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from under `low` to above `high`."""
    span = high - low if high > low else abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(k for k in (1, 2, 5, 10) if span / (step * k) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from under `low` to above `high`; only the powers where these would be many."""
    lowest, highest = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [round(k * 10.0**power, 12) for power in range(lowest, highest + 1) for k in ((1, 2, 5) if highest - lowest <= 3 else (1,))]
    under, above = [v for v in found if v <= low * (1 + 1e-9)], [v for v in found if v >= high * (1 - 1e-9)]
    return [v for v in found if (under[-1] if under else low) <= v <= (above[0] if above else high)]


def _drawn(line: Series, px: Callable[[float], float], py: Callable[[float], float], y_format: Callable[[float], str]) -> list[str]:
    kept = [k for k in range(len(line.x)) if math.isfinite(line.x[k]) and math.isfinite(line.y[k])]
    kept.sort(key=lambda k: line.x[k])
    band = len(line.low) == len(line.high) == len(line.x)
    out = []
    if band and len(kept) > 1:
        edge = [f"{px(line.x[k]):.1f},{py(line.high[k]):.1f}" for k in kept] + [f"{px(line.x[k]):.1f},{py(line.low[k]):.1f}" for k in reversed(kept)]
        out.append(f'<polygon class="band {line.style}" points="{" ".join(edge)}"/>')
    elif band and kept:
        x = px(line.x[kept[0]])
        out.append(f'<line class="bar {line.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{py(line.low[kept[0]]):.1f}" y2="{py(line.high[kept[0]]):.1f}"/>')
    if len(kept) > 1:
        points = " ".join(f"{px(line.x[k]):.1f},{py(line.y[k]):.1f}" for k in kept)
        out.append(f'<polyline class="line {line.style}" points="{points}"/>')
    if len(kept) <= 40:
        for k in kept:
            interval = f" [{y_format(line.low[k])}, {y_format(line.high[k])}]" if band else ""
            said = escape(f"{line.name}: {y_format(line.y[k])}{interval} at {short(line.x[k])}")
            out.append(f'<circle class="dot {line.style}" cx="{px(line.x[k]):.1f}" cy="{py(line.y[k]):.1f}" r="3"><title>{said}</title></circle>')
    return out
