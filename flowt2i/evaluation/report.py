"""What `flowt2i evaluate --out DIR` leaves: report.json, and report.html that shows the same with the pictures.

`Report` is what was measured, all of it plain numbers and texts; `Pictures` are the images that go with it; `html` is a pure function of both.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowt2i import __version__
from flowt2i.errors import UserError
from flowt2i.evaluation import page
from flowt2i.evaluation.charts import Series, line_chart, percent, short
from flowt2i.evaluation.intervals import wilson
from flowt2i.files import whole
from flowt2i.score import Score


@dataclass
class Point:
    x: float
    value: float
    low: float
    high: float
    evaluations: int  # passes of the net a picture


@dataclass
class Report:
    """Everything that was measured; report.json is exactly this."""

    model: str
    settings: dict[str, Any]
    protocol: str
    scores: list[Score] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)  # prompt, seed
    curves: dict[str, Any] = field(default_factory=dict)  # measure, n, evaluations: [Point], guidance: [Point]
    training: dict[str, Any] = field(default_factory=dict)  # loss, validation, score: [[images, value]]; steps; reference; standing
    memorisation: dict[str, Any] = field(default_factory=dict)  # by kind of feature: what `memorisation.judge` says, and the closest pairs
    comparison: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    made: str = ""
    version: str = __version__
    format: int = 1


@dataclass
class Pictures:
    """Images uint8 [H, W, 3] of a report."""

    samples: list[np.ndarray] = field(default_factory=list)
    compared: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)  # by kind of feature


def write(report: Report, pictures: Pictures, out: Path) -> list[Path]:
    """report.json and report.html in `out`. UserError where it cannot be written."""
    report.made = report.made or time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    files = {out / "report.json": json.dumps(finite(asdict(report)), indent=1, allow_nan=False) + "\n", out / "report.html": html(report, pictures)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            with whole(path) as aside:
                aside.write_text(text, "utf-8", errors="replace")  # captions may hold halves of characters, which no encoding has
    except OSError as error:
        raise UserError(f"cannot write the report into {out} ({error.strerror}): give another --out") from error
    return list(files)


def finite(value: Any) -> Any:
    """Numbers, texts, lists and objects as JSON knows them: null where a number is not finite."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the page --------------------------------------------------------------------------------------------------------


def html(report: Report, pictures: Pictures) -> str:
    """The report as one HTML file."""
    parts = [_headline(report), _comparison(report, pictures), _samples(report, pictures), _scores(report), _training(report), _curves(report)]
    parts += [_memorisation(report, pictures), _how(report)]
    return page.page(report.model, f"flowt2i {report.version}, {report.made}", [part for part in parts if part])


def _headline(report: Report) -> str:
    """The first score of each group."""
    first: dict[str, Score] = {}
    for score in report.scores:
        first.setdefault(score.group, score)
    tiles = [(f"{s.group}, {s.part}" if s.part != s.group else s.name, s.shown(), f"{s.interval()}{f' n = {s.n:,}' if s.n else ''}") for s in first.values()]
    standing = report.training.get("standing")
    return (page.cards(tiles) if tiles else "") + (page.paragraph(standing[0].upper() + standing[1:] + ".") if standing else "")


def _samples(report: Report, pictures: Pictures) -> str:
    if not pictures.samples:
        return ""
    note = f"The first {len(pictures.samples)} of the prompts that were scored, with their seeds: not picked."
    return page.section("Samples", page.paragraph(note), page.samples(pictures.samples, [s["prompt"] for s in report.samples]))


def _scores(report: Report) -> str:
    if not report.scores:
        return ""
    blocks = []
    for group in dict.fromkeys(s.group for s in report.scores):
        scores = [s for s in report.scores if s.group == group]
        rows = []
        for s in scores:
            bar = page.meter(s.value, s.low, s.high) if s.share and s.low is not None and s.high is not None else ""
            rows.append([s.part, s.shown(), s.interval().replace(" ", "\N{NO-BREAK SPACE}"), f"{s.n:,}" if s.n else "", bar])
        table = page.table(["", "value", "95% interval", "n", ""], rows, numbers=(1, 3), raw=(4,))
        blocks += [f"<h3>{page.escape(group)}</h3>", page.code(scores[0].protocol), table]
    return page.section("Scores", *blocks)


def _training(report: Report) -> str:
    found = report.training
    shown = []
    for what, title, label in (
        ("score", "Prompt following while training", "all right"),
        ("kid", "Kernel distance while training", "kernel distance"),
        ("validation", "Validation loss", "loss"),
        ("loss", "Training loss", "loss"),
    ):
        is_share = what == "score"
        lines = [Series("our runs of the preset", *_xy(r[what]), style="r") for r in found.get("reference", []) if r.get(what)]
        own = found.get(what)
        if own:
            x, y = _xy(own)
            n = found.get("score_prompts") if is_share else None
            band = [wilson(round(value * n), n) if math.isfinite(value) else (value, value) for value in y] if n else []
            lines.append(Series("this run", x, y, [low for low, _ in band], [high for _, high in band]))
            svg = _chart(
                lines, x_label=f"images seen ({found['batch_size']} a step)", y_label=label, y_format=percent if is_share else short,
                from_zero=is_share, y_log=not is_share, name=title,
            )  # fmt: skip
            shown.append((title, svg, lines))
    if not shown:
        return ""
    note = "" if found.get("reference") else f"There are no reference curves for this data and preset ({found['preset']})."
    return page.section("Training", page.paragraph(note) if note else "", page.charts(shown))


def _curves(report: Report) -> str:
    found, shown = report.curves, []
    titles = {"evaluations": ("Against the number of steps", "solver steps", True), "guidance": ("Against guidance", "guidance scale", False)}
    for which, (title, label, log) in titles.items():
        points = found.get(which)
        if points:
            line = Series(found["measure"], [p.x for p in points], [p.value for p in points], [p.low for p in points], [p.high for p in points])
            form = percent if found["share"] else short
            svg = _chart([line], x_label=label, y_label=found["measure"], x_log=log, y_format=form, from_zero=found["share"], name=title)
            shown.append((title, svg, [line]))
    if not shown:
        return ""
    note = f"{found['measure']}, of {found['n']} prompts at each point, the same prompts and noise throughout; bands are 95% intervals."
    cost_note = " A step takes one pass of the net with Euler and guidance 1, two where it is guided; Heun takes twice as many."
    return page.section("What sampling costs and gains", page.paragraph(note[0].upper() + note[1:] + cost_note), page.charts(shown))


def _memorisation(report: Report, pictures: Pictures) -> str:
    blocks = []
    for name, found in report.memorisation.items():
        share = found["near_copies"]
        text = (
            f"{share['accuracy']:.1%} [{share['low']:.1%}, {share['high']:.1%}] of {share['n']:,} samples are near copies, within {found['threshold']:.3g} "
            f"of a training picture, as {found['expected']:.1%} (at most {found['expected_high']:.1%}) of {found['heldout_n']:,} held-out pictures are. "
            f"So: {found['verdict']}. Median distance {found['median']:.3g}, of held-out pictures {found['heldout_median']:.3g}; z = {found['z']:+.1f}."
        )
        blocks.append(f"<h3>{page.escape(name)}</h3>" + page.paragraph(text))
        shown = pictures.pairs.get(name, [])
        captions = [f"{pair['distance']:.3g}{' (near copy)' if pair['near_copy'] else ''} · {pair['caption']}" for pair in found.get("pairs", [])]
        blocks.append(page.pairs(shown, captions) if shown else "")
    lead = page.paragraph(
        "The samples nearest to a training picture: sample left, training picture right; below, their distance and the training caption. "
        "z compares all distances: it is far below 0 for copies, but for blurred or flat pictures too, which lie near everything: alone it tells nothing."
    )
    return page.section("Does it repeat its training pictures?", lead, *blocks) if blocks else ""


def _comparison(report: Report, pictures: Pictures) -> str:
    found = report.comparison
    if not found:
        return ""
    lead = f"A: {found['a']}. B: {found['b']}. The same {found['n']:,} prompts, and for each the same noise; in the pictures A left, B right."
    rows = []
    for name, row in found["scores"].items():
        d, p = row["difference"], row["difference"].get("p")
        plain, signed = ("{:.1%}", "{:+.1%}") if row["share"] else ("{:.4g}", "{:+.4g}")
        interval = f"[{signed.format(d['low'])}, {signed.format(d['high'])}]".replace(" ", "\N{NO-BREAK SPACE}")
        clear = p < 0.05 if p is not None else not d["low"] <= 0 <= d["high"]
        verdict = f"{'B' if d['difference'] > 0 else 'A'} has more" if clear else ""
        values = [plain.format(row["a"]), plain.format(row["b"]), signed.format(d["difference"])]
        rows.append([name.replace("_", " "), *values, interval, f"{d['n']:,}", "" if p is None else f"{p:.2g}", verdict])
    table = page.table(["", "A", "B", "B - A", "95% interval", "n", "p", ""], rows, numbers=(1, 2, 3, 5, 6))
    grid = page.pairs(pictures.compared, [s["prompt"] for s in report.samples[: len(pictures.compared)]]) if pictures.compared else ""
    return page.section("A against B", page.paragraph(lead), table, page.paragraph(found["method"]), grid)


def _how(report: Report) -> str:
    notes = "".join(page.paragraph(note) for note in report.notes)
    return page.section("How this was made", page.code(report.protocol), notes)


def _chart(lines: Sequence[Series], **options: Any) -> str:
    """A chart, or what there is to say where no point is finite."""
    try:
        return line_chart(lines, **options)
    except ValueError:
        return page.paragraph("No value is finite: the training diverged, or the settings are beyond what the model stands.")


def _xy(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]
