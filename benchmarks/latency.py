#!/usr/bin/env python3
"""How long pictures take: one and many, eager and compiled, in bf16 and fp32, by the default of `quickstart` and by 50 Euler steps; and what comes before.

    python benchmarks/latency.py --model runs/quickstart --name scenes                  # some ten minutes on two cores with a 4M model
    python benchmarks/latency.py --model runs/quickstart --batches 1 --repeats 21       # one picture alone

The ways of drawing take turns within each repeat, so what else happens on the machine meets all of them alike. Told are the median over the repeats and the
median of each repeat's ratio to the model as it comes: eager, in the precision that it draws in here. A compiled network is compiled anew for each number of
pictures, as in a process that draws that many; on a GPU it runs as CUDA graphs. Its first drawing, with the compilation, is told apart, and so are the encoding
of the captions (a part of every drawing) and, in fresh processes, what a first picture takes from the start of Python.
Results go to RESULTS/latency-NAME.json and .md. Run it on an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ending
import machine
import torch
from sampling import benchmark_prompts
from sampling_settings import DEFAULT, PLAIN, Settings, label
from tqdm import tqdm

from flowt2i import Pipeline, precision
from flowt2i.bench.timing import clock
from flowt2i.commands.common import newest_run
from flowt2i.training.compiling import has_compiler

# A fresh process: what it takes to import, to load, and to draw a first and a second picture. Arguments: model, device, 1 to compile.
START = """
import json, sys, time
marks = [time.perf_counter()]
from flowt2i.pipeline import Pipeline
marks.append(time.perf_counter())
pipeline = Pipeline.from_pretrained(sys.argv[1], device=sys.argv[2])
if sys.argv[3] == "1":
    pipeline.compile()
marks.append(time.perf_counter())
for _ in range(2):
    pipeline.sample("a picture", **json.loads(sys.argv[4]))
    marks.append(time.perf_counter())
print(json.dumps(dict(zip(("import", "load", "first picture", "second picture"), (b - a for a, b in zip(marks, marks[1:]))))))
"""


@dataclass
class Way:
    """One way to run the network."""

    name: str
    pipeline: Pipeline


def ways(model: Path, device: str | None) -> list[Way]:
    """The model as it comes first; then compiled, where that can be, and eager in the other precision."""
    own = Pipeline.from_pretrained(model, device=device)
    computes = own.computes
    found = [Way(f"eager {computes}", own)]
    if has_compiler():
        found.append(Way(f"compiled {computes}", Pipeline.from_pretrained(model, device=device).compile()))
    other = Pipeline.from_pretrained(model, device=device)
    other.computes = "fp32" if computes == "bf16" else "bf16"
    if other.computes == "bf16" and not precision.has_bf16(own.device.type):  # emulated: that would take many times as long
        return found
    return [*found, Way(f"eager {other.computes}", other)]


def drawings(those: list[Way], batches: list[int], samplers: dict[str, Settings], repeats: int) -> list[dict[str, Any]]:
    """A row for each number of pictures, sampler and way: seconds of a drawing, median, and ratio to the first way."""
    rows = []
    with tqdm(total=len(batches) * len(samplers) * repeats, desc="drawing", leave=False) as bar:
        for batch in batches:
            prompts = benchmark_prompts(those[0].pipeline, batch)
            draw = lambda way, settings, prompts=prompts: way.pipeline.sample(prompts, batch_size=len(prompts), **settings)
            torch.compiler.reset()
            first = {way.name: draw(way, DEFAULT).seconds for way in those}  # warms up, and compiles
            for name, settings in samplers.items():
                seconds: dict[str, list[float]] = {way.name: [] for way in those}
                for _ in range(repeats):
                    for way in those:
                        drawn = draw(way, settings)
                        seconds[way.name].append(drawn.seconds)
                    bar.update()
                own = seconds[those[0].name]
                for way in those:
                    took = seconds[way.name]
                    ratio = statistics.median(b / a for a, b in zip(own, took))
                    rows.append({"pictures": batch, "sampler": name, "evaluations": drawn.evaluations, "way": way.name, "seconds": took,
                                 "median": statistics.median(took), "ratio": ratio, "first_drawing": first[way.name]})  # fmt: skip
    return rows


def encodings(pipeline: Pipeline, batches: list[int], repeats: int) -> dict[str, float]:
    """Median seconds of encoding the captions of so many pictures, the empty caption of each too, as a drawing does once."""
    found = {}
    for batch in batches:
        captions, times = [*benchmark_prompts(pipeline, batch), *[""] * batch], []
        with torch.inference_mode(), precision.autocast(pipeline.computes, pipeline.device):
            pipeline.encode(captions)
            for _ in range(repeats):
                begun = clock(pipeline.device)
                pipeline.encode(captions)
                times.append(clock(pipeline.device) - begun)
        found[str(batch)] = statistics.median(times)
    return found


def starts(model: Path, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of the parts of a fresh process; compiled with nothing kept from before (once), and with what that left on the disk."""
    with tempfile.TemporaryDirectory() as kept:

        def start(compiled: bool) -> dict[str, float]:
            words = [sys.executable, "-c", START, str(model), device, str(int(compiled)), json.dumps(DEFAULT)]
            done = subprocess.run(words, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": kept}, capture_output=True, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1])

        kinds = {"eager": [False] * (repeats + 1)}  # the first one reads files into memory
        if has_compiler():
            kinds |= {"compiled, the first time": [True], "compiled, again": [True] * repeats}
        taken = {kind: [start(compiled) for compiled in runs] for kind, runs in kinds.items()}
    taken["eager"] = taken["eager"][1:]
    return {kind: {part: statistics.median(run[part] for run in runs) for part in runs[0]} for kind, runs in taken.items()}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| pictures | sampler | evaluations | way | seconds, median | a picture | times the first way | with the first drawing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["drawings"]:
        each = 1000 * row["median"] / row["pictures"]
        told = f"| {row['pictures']} | {row['sampler']} | {row['evaluations']} | {row['way']} | {row['median']:.3f} | {each:.1f} ms | {row['ratio']:.2f} |"
        lines.append(f"{told} {row['first_drawing']:.2f} s |")
    lines += ["", "| captions of | encoded in |", "|---|---|", *(f"| {n} pictures | {1000 * s:.1f} ms |" for n, s in found["encoding"].items())]
    if found["starts"]:
        parts = list(found["starts"]["eager"])
        lines += ["", f"| fresh process | {' | '.join(parts)} |", f"|---|{'---|' * len(parts)}"]
        lines += [f"| {kind} | {' | '.join(f'{took[part]:.2f} s' for part in parts)} |" for kind, took in found["starts"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the newest run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="numbers of pictures (default 1 16 64)")
    parser.add_argument("--repeats", type=int, default=7, help="drawings of each kind (default 7)")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of each kind (default 3; 0: none)")
    parser.add_argument("--name", help="of the results (default: the model's folder)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()
    model = args.model or newest_run()
    those = ways(model, args.device)
    own = those[0].pipeline
    found = {"model": own.told(), **machine.facts(own.device), "encoding": encodings(own, args.batches, args.repeats)}
    found["starts"] = starts(model, str(own.device), args.starts) if args.starts else {}
    found["drawings"] = drawings(those, args.batches, {label(s): s for s in (DEFAULT, PLAIN)}, args.repeats)
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / f"latency-{args.name or model.name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(found))
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    sys.exit(ending.told(main)())
