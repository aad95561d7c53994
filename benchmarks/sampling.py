#!/usr/bin/env python3
"""Quality against evaluations, for solvers, schedules and guidance: a table, and a plot of each.

    python benchmarks/sampling.py --model runs/quickstart --name scenes
    python benchmarks/sampling.py --model runs/emoji --data data/emoji --name emoji --guide "smaller model=runs/emoji-small"
    python benchmarks/sampling.py --model runs/quickstart --name scenes --groups guidance --estimate     # how long it would take

What is measured stands in `sampling_settings.py`. Every setting draws the same prompts from the same seeds. On the built-in scenes quality is the share
of pictures that show all the prompt says, by the exact checker, and its paired difference to 50 even Euler steps (Newcombe's 95% interval). On other data it
is the kernel distance (an unbiased estimate, of `--num` pictures, with its standard error) and, where a setting tells much, the Fréchet distance of 2,048
pictures: those of `flowt2i evaluate --metrics frechet,kid --reference train`, the same captions, seeds, pictures and reference. `distance` is the root mean
square difference (pixels in [0, 1]) of the first pictures to those of 100 midpoint steps from the same noise.
An evaluation is one captioned picture through a network, guidance's counted. `dopri5` draws one by one, so of a quarter of the pictures.

Results go to RESULTS/sampling-NAME.json (and .md, the table) after each setting, so the same command goes on where it was stopped; plots to
IMAGES/sampling-GROUP-NAME.png. What another model drew, or what was measured on other prompts or another reference, is never taken over.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import ending
import machine
import numpy as np
import sampling_plot
from sampling_settings import DEFAULT, FRECHET, PLAIN, Settings, cost, groups, label, named, same_flow
from tqdm import tqdm

from flowt2i import Pipeline
from flowt2i.commands.common import newest_run
from flowt2i.commands.evaluate_options import trained_on
from flowt2i.data import scenes
from flowt2i.evaluation.frechet import LEAST, Moments, frechet_distance
from flowt2i.evaluation.intervals import paired_difference, wilson
from flowt2i.evaluation.kid import kernel_distance
from flowt2i.evaluation.metrics import Context
from flowt2i.evaluation.pictures import Drawing, features
from flowt2i.evaluation.scenes import FIRST_SEED, verdicts
from flowt2i.training import checkpoint
from flowt2i.training.distributed import World

FAR = 64  # pictures of the distance to 100 midpoint steps
TRIED = 64  # pictures that are drawn to see how fast this machine is
Row = dict[str, Any]


def benchmark_prompts(pipeline: Pipeline, count: int) -> list[str]:
    """Scenes' own prompts, or the captions that came with the data, again and again."""
    if pipeline.description.is_scenes:
        return scenes.prompts(0, count, heldout=False)
    known = list(pipeline.description.prompts) or ["a picture"]
    return [known[i % len(known)] for i in range(count)]


def distances(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Root mean square difference of uint8 pictures [N, H, W, 3], of values in [0, 1]: [N]."""
    return np.sqrt(np.square((images.astype(np.float32) - reference) / 255).mean((1, 2, 3)))


class Measure(Protocol):
    """What quality is, on some data."""

    prompts: list[str]
    protocol: dict[str, Any]  # what has to be equal for two numbers to be comparable, and what they are to be seen beside

    def count(self, settings: Settings) -> int: ...  # pictures

    def of(self, images: np.ndarray) -> Row: ...  # uint8 [N, H, W, 3], of the first N prompts


class Following:
    """On scenes: whether a picture shows all that its prompt says."""

    def __init__(self, num: int):
        self.num, self.prompts = num, scenes.prompts(0, num, heldout=False)
        self.protocol = {"score": "scenes", "num": num, "prompts": "those of `flowt2i evaluate`, seed 0"}

    def count(self, settings: Settings) -> int:
        return _fewer(settings, self.num)

    def of(self, images: np.ndarray) -> Row:
        return {"hits": "".join(str(int(holds["all"])) for holds in verdicts(images, self.prompts))}


class Distances:
    """On other data: how far the pictures are from real ones."""

    def __init__(self, context: Context, few: int, many: int):
        """many: pictures of a Fréchet distance (0: none is taken), few: of the other settings; `context.num` is the larger."""
        self.few, self.many, self.context, self.prompts = few, many, context, context.prompts
        self.net, self.reference = context.net(), context.reference_of()
        self.moments = Moments.of(self.reference.features)
        first, rest = self.reference.parted(context.num)
        floor = kernel_distance(first, rest)
        self.protocol = {
            "score": f"distance on {self.net.name}", "num": few, "frechet_num": many, "prompts": context.asked,
            "reference": self.reference.identity.hash, "reference_of": f"{self.reference.identity.count} pictures, {context.real}",
            "floor": {"kid": floor.value, "kid_error": floor.error, "of": len(first)},
        }  # fmt: skip
        if len(first) >= LEAST:
            self.protocol["floor"]["frechet"] = frechet_distance(Moments.of(first), Moments.of(rest))

    def count(self, settings: Settings) -> int:
        return self.many if settings in FRECHET and self.many else _fewer(settings, self.few)

    def of(self, images: np.ndarray) -> Row:
        found = features(self.net, images, self.context.world, progress=False)
        kid = kernel_distance(found, self.reference.features)
        frechet = {"frechet": frechet_distance(Moments.of(found), self.moments)} if len(images) >= LEAST else {}
        return {"kid": kid.value, "kid_error": kid.error, **frechet}


def _fewer(settings: Settings, num: int) -> int:
    return min(num, max(3, num // 4)) if settings["solver"] == "dopri5" else num


def measure_for(pipeline: Pipeline, args: argparse.Namespace) -> Measure:
    if pipeline.description.is_scenes:
        return Following(args.num or 300)
    few = args.num or 192
    context = Context(World(0, 1, pipeline.device), max(few, args.frechet_num), pipeline, args.data or trained_on(pipeline), real=args.reference)
    return Distances(context, few, args.frechet_num)


def guides_of(pipeline: Pipeline, given: list[str]) -> dict[str, Path]:
    """Weaker models for autoguidance: the oldest checkpoint that the run still has, and those given as NAME=PATH (or PATH)."""
    run = Path(pipeline.name)
    steps = checkpoint.list_steps(run)
    found = {f"step {steps[0]:,} of {steps[-1]:,}": checkpoint.folder(run, steps[0])} if len(steps) > 1 else {}
    for word in given:
        name, _, path = word.rpartition("=")
        found[name or Path(path).name] = Path(path)
    return found


class Bench:
    """Draws and measures, and keeps what it measured in a file."""

    def __init__(self, pipeline: Pipeline, measure: Measure, file: Path):
        self.pipeline, self.measure, self.file = pipeline, measure, file
        kept = json.loads(file.read_text())["rows"] if file.exists() else []
        self.known: dict[str, Row] = {row["key"]: row for row in kept}

    def key(self, settings: Settings) -> str:
        """Of all that a row depends on: weights (a guide's too), settings, seed, prompts, and what quality is."""
        count = self.measure.count(settings)
        drawing = Drawing(self.pipeline, self.measure.prompts[:count], 0, settings)
        told = [drawing.fingerprint(), drawing.prompts, self.measure.protocol["score"], self.measure.protocol.get("reference")]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def row(self, settings: Settings, progress: Callable[[int], Any]) -> Row:
        """Known, or measured now."""
        key = self.key(settings)
        if key not in self.known:
            count = self.measure.count(settings)
            drawn = self.pipeline.sample(self.measure.prompts[:count], seed=FIRST_SEED, progress=progress, **settings)  # as `evaluation.pictures` draws
            told = {name: value for name, value in named(settings).items() if value != PLAIN.get(name)}
            row = {"label": label(settings), "key": key, "settings": told, "num": count, "evaluations": drawn.evaluations, **self.measure.of(drawn.images)}
            if same_flow(settings):
                row["distance"] = round(float(distances(drawn.images[:FAR], self.far[: min(FAR, count)]).mean()), 5)
            self.known[key] = row
        return self.known[key]

    @functools.cached_property
    def far(self) -> np.ndarray:
        """What 100 midpoint steps draw."""
        return self.pipeline.sample(self.measure.prompts[:FAR], seed=FIRST_SEED, **PLAIN | {"solver": "midpoint", "steps": 100}).images

    def seconds(self, settings: list[Settings]) -> list[float]:
        """About what each takes here: of an evaluation, of measuring whatever number of pictures, and of measuring one more, as they are tried."""
        prompts, few = (self.measure.prompts * TRIED)[:TRIED], DEFAULT | {"steps": 2}
        self.pipeline.sample(prompts, **few)
        drawn = self.pipeline.sample(prompts, **few)
        marks = [time.perf_counter()]
        for part in (drawn.images[: TRIED // 4], drawn.images):
            self.measure.of(part)
            marks.append(time.perf_counter())
        least, most = marks[1] - marks[0], marks[2] - marks[1]
        an_evaluation, a_picture = drawn.seconds / (TRIED * drawn.evaluations), max(0.0, most - least) / (TRIED - TRIED // 4)
        at_all = max(0.0, most - TRIED * a_picture)
        return [at_all + self.measure.count(s) * (cost(s) * an_evaluation + a_picture) for s in settings]

    def run(self, wanted: list[Settings], protocol: dict[str, Any], estimate: bool = False) -> list[Row]:
        """A row for each; [] where only the time it takes was asked for."""
        new = [s for s in wanted if self.key(s) not in self.known]
        work = self.seconds(new) if new else []
        pictures = sum(map(self.measure.count, new))
        print(f"{len(new)} of {len(wanted)} settings to measure, {pictures:,} pictures: about {sum(work) / 60:.0f} min on this machine", flush=True)
        if estimate:
            return []
        with tqdm(total=sum(work), bar_format="{l_bar}{bar}| {elapsed}, about {remaining} left", leave=False) as bar:
            for settings, seconds in zip(new, work):
                bar.set_description(label(settings))
                each = seconds / self.measure.count(settings)
                self.row(settings, lambda n, each=each: bar.update(n * each))
                self.save(protocol)
        return finished([self.row(s, lambda n: None) for s in wanted])

    def save(self, protocol: dict[str, Any]) -> None:
        """Whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_name(f".{self.file.name}")
        rows = ",\n".join(json.dumps(row) for row in self.known.values())
        aside.write_text(json.dumps(protocol, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]}}\n')
        aside.replace(self.file)


def finished(rows: list[Row]) -> list[Row]:
    """With what follows from the hits of a row and of the first, 50 even Euler steps: shares, and the paired difference."""
    out = []
    for row in rows:
        more: Row = {}
        if "hits" in row:
            hits, plain = ([h == "1" for h in r["hits"][: row["num"]]] for r in (row, rows[0]))
            low, high = wilson(sum(hits), len(hits))
            more = {"right": sum(hits) / len(hits), "low": low, "high": high, "less": paired_difference(plain, hits)}
        out.append(row | more)
    return out


def table(rows: list[Row]) -> str:
    """Markdown."""
    of_scenes = "right" in rows[0]
    columns = ["right", "less 50 Euler steps"] if of_scenes else ["kernel distance × 1000", "Fréchet distance"]
    lines = [f"| setting | evaluations | {' | '.join(columns)} | pictures | distance |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["evaluations"], r["label"])):
        if of_scenes:
            less = row["less"]
            told = [
                f"{row['right']:.1%}",
                f"{100 * less['difference']:+.1f} [{100 * less['low']:+.1f}, {100 * less['high']:+.1f}]" if row is not rows[0] else "",
            ]
        else:
            told = [f"{1000 * row['kid']:.1f} ± {1000 * row['kid_error']:.1f}", f"{row['frechet']:.1f}" if "frechet" in row else ""]
        far = f"{row['distance']:.4f}" if "distance" in row else ""
        lines.append(f"| {row['label']} | {row['evaluations']} | {told[0]} | {told[1]} | {row['num']:,} | {far} |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="run folder, or another model (default: the newest run)")
    parser.add_argument("--data", type=Path, help="its dataset (default: the one it was trained on, where it still is); scenes need none")
    parser.add_argument("--name", help="of results and plots (default: the model's folder)")
    parser.add_argument("--groups", default="solvers,schedules,guidance", help="what to measure, with commas between (default: all three)")
    parser.add_argument("--num", type=int, help="pictures a setting (default 300 on scenes, else 192)")
    parser.add_argument("--frechet-num", type=int, default=LEAST, help=f"pictures of a Fréchet distance, of {len(FRECHET)} settings (default {LEAST}; 0: none)")
    parser.add_argument("--reference", default="train", help="real pictures: train (default), heldout, or a folder")
    parser.add_argument(
        "--guide", action="append", default=[], metavar="NAME=MODEL", help="a weaker model for autoguidance; beside the run's oldest checkpoint"
    )
    parser.add_argument("--estimate", action="store_true", help="only say how long it would take")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()
    args.groups = args.groups.split(",")
    if unknown := set(args.groups) - set(groups({})):
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(groups({}))}")
    if 0 < args.frechet_num < LEAST:
        parser.error(f"a Fréchet distance needs {LEAST} pictures or more (--frechet-num 0: none)")
    return args


def main() -> None:
    args = arguments()
    pipeline = Pipeline.from_pretrained(args.model or newest_run(), device=args.device)
    name = args.name or Path(pipeline.name).name
    panels = {group: p for group, p in groups(guides_of(pipeline, args.guide)).items() if group in args.groups}
    listed = [PLAIN, *(s for p in panels.values() for lines in p.values() for points in lines.values() for s in points)]
    wanted = [s for i, s in enumerate(listed) if s not in listed[:i]]
    measure = measure_for(pipeline, args)
    parameters = sum(parameter.numel() for parameter in pipeline.model.parameters())
    protocol = {"model": pipeline.told() | {"parameters": parameters}, **machine.facts(pipeline.device), "protocol": measure.protocol}
    bench = Bench(pipeline, measure, args.results / f"sampling-{name}.json")
    rows = bench.run(wanted, protocol, args.estimate)
    if not rows:
        return
    (args.results / f"sampling-{name}.md").write_text(table(rows))
    print(table(rows))
    found = dict(zip(map(bench.key, wanted), rows))
    title = f"{name}: {parameters / 1e6:.1f}M parameters, {pipeline.told().get('step', 0):,} training steps"
    plots = []
    for group, lines in panels.items():
        drawn = {panel: {line: [found[bench.key(s)] for s in points] for line, points in of.items()} for panel, of in lines.items()}
        plots.append(sampling_plot.plot(drawn, rows[0], args.images / f"sampling-{group}-{name}.png", f"{group.capitalize()} on {title}"))
    print("\n".join(map(str, plots)))
    if args.json:
        print(json.dumps({"plots": [str(p) for p in plots], "rows": [{k: v for k, v in row.items() if k != "hits"} for row in rows]}))


if __name__ == "__main__":
    sys.exit(ending.told(main)())
