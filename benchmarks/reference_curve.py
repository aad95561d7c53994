#!/usr/bin/env python3
"""Make the curves that later runs of a preset are held against ("am I on track?"): train runs of it on the built-in scenes, and write what they drew.

    flowt2i prepare scenes --out data/scenes
    python benchmarks/reference_curve.py --train runs/reference --preset quickstart --data data/scenes --seeds 3 4 5 --steps 3900

trains one run for each seed under runs/reference, one after the other, evaluated at --evaluations even distances, and writes
flowt2i/evaluation/reference_curves/PRESET.json (--out: another file). Run it on an idle machine; before its first step each training says how long it will
take. Stopped, the same command goes on. Finished runs are taken in by their folders, alone or besides; one that was evaluated once gives one point:

    python benchmarks/reference_curve.py runs/quickstart runs/quickstart-seed1

All runs are of one preset with the same flow settings, their pictures drawn alike. What is kept of each: training loss (means of 60 stretches of log.jsonl),
validation loss and score (eval.jsonl), against images seen. A later run's score is held against them where its pictures are drawn as theirs were, or in a way
that was measured to score the same: --alike names its settings, --because where that is written down.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import ending
import learning_runs
from pydantic import ValidationError

from flowt2i.config import PRESETS, Config, SampleConfig, load_config
from flowt2i.description import DatasetDescription
from flowt2i.evaluation import on_track
from flowt2i.training import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="finished run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the curves go (default: the package's own of the preset)")
    parser.add_argument("--alike", nargs="+", default=[], metavar="NAME=VALUE", help="ways to draw that score the same, such as steps=8 shift=5")
    parser.add_argument("--because", default="", metavar="TEXT", help="where that was measured")
    training = parser.add_argument_group("runs that are trained first")
    training.add_argument("--train", type=Path, metavar="DIR", help="folder of the runs (PRESET-seedN), and the word to train them")
    training.add_argument("--preset", default="quickstart", choices=PRESETS, help="(default quickstart)")
    training.add_argument("--data", type=Path, metavar="DIR", help="prepared scenes")
    training.add_argument("--seeds", nargs="+", type=int, default=[3], metavar="N", help="one run each (default 3)")
    training.add_argument("--steps", type=int, default=3900, help="of each (default 3900: what 11.5 minutes give on the machine of README.md)")
    training.add_argument("--evaluations", type=int, default=13, help="on the way (default 13)")
    training.add_argument("--prompts", type=int, default=256, help="of each evaluation's score (default 256)")
    training.add_argument("--settings", default="", metavar="WORDS", help='other settings of theirs, such as "--train.compile off --track.tensorboard true"')
    args = parser.parse_args()
    if bool(args.alike) != bool(args.because):
        parser.error("--alike says what scores the same, --because where that was measured: give both or neither")
    if args.train and (args.data is None or not 1 <= args.evaluations <= args.steps):
        parser.error("--train needs --data, and 1 to --steps evaluations")
    runs = [*args.runs, *(train(args, seed) for seed in args.seeds if args.train)]
    if not runs:
        parser.error("give finished runs, or --train DIR --data DIR")
    reference = collect(runs, args.alike, args.because)
    out = args.out or Path(on_track.__file__).parent / "reference_curves" / f"{reference['preset']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text(reference))
    print(f"wrote {out}: {len(runs)} runs, {sum(len(run.get('validation', [])) for run in reference['runs'])} evaluations")


def train(args: argparse.Namespace, seed: int) -> Path:
    """A run of this seed, evaluated on its way: begun, gone on with, or complete already."""
    run = args.train / f"{args.preset}-seed{seed}"
    ours = {"seed": seed, "steps": args.steps, "eval_every": args.steps // args.evaluations, "eval_share": 1, "score_prompts": args.prompts}
    words = ["--config", args.preset, "--data", str(args.data), "--out", str(run)]
    learning_runs.train_apart([*words, *(word for name, value in ours.items() for word in (f"--train.{name}", str(value))), *shlex.split(args.settings)])
    return run


def collect(runs: list[Path], alike: list[str], because: str) -> dict[str, Any]:
    """The curves of finished runs, and what has to be equal for others to be held against them. SystemExit where they differ in that themselves."""
    others, words = [other_way(alike)] if alike else [], ["--alike", *alike, "--because", shlex.quote(because)] if alike else []
    configs = [load_config(run / "config.json") for run in runs]
    first, description = configs[0], DatasetDescription.load(checkpoint.find(runs[0]))
    for run, config in zip(runs, configs):
        described = DatasetDescription.load(checkpoint.find(run))
        if kind(config) != kind(first) or not described.is_scenes or described.codec != description.codec:
            raise SystemExit(f"{run} is of another preset, flow, sampler or data than {runs[0]}")
    reference = {
        "preset": first.preset, "codec": description.codec.kind, "image_size": description.codec.image_size, "flow": first.flow.model_dump(),
        "samples": [on_track.drawn_with(sample) for sample in (first.sample, *others)], "prediction": first.model.prediction,
        "network": {name: getattr(first.model, name) for name in on_track.NETWORK},
    }  # fmt: skip
    if others:
        reference["samples_alike"] = because
    return reference | {
        "made_by": " ".join(["python benchmarks/reference_curve.py", *(run.name for run in runs), *words]),
        "runs": [
            {"seed": config.train.seed, "batch_size": config.data.batch_size, "score_prompts": config.train.score_prompts}
            | {what: points for what, points in on_track.curve_of(run).items() if points}
            for run, config in zip(runs, configs)
        ],
    }


def kind(config: Config) -> tuple[Any, ...]:
    """What all runs of one file have in common."""
    return config.preset, config.flow, config.model.prediction, on_track.drawn_with(config.sample)


def other_way(words: list[str]) -> SampleConfig:
    """A way to draw pictures, from NAME=VALUE of sampling settings."""
    try:
        return SampleConfig(**dict(word.split("=", 1) for word in words))
    except (ValueError, ValidationError) as error:
        raise SystemExit(f"--alike {' '.join(words)}: give settings of `sample` such as steps=8 shift=5 ({str(error).splitlines()[-1].strip()})") from error


def text(reference: dict[str, Any]) -> str:
    """JSON with a line for each curve."""
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items() if key != "runs"]
    runs = ["  {" + ",\n   ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in run.items()) + "}" for run in reference["runs"]]
    return "{\n" + ",\n".join([*head, ' "runs": [\n' + ",\n".join(runs) + "\n ]"]) + "\n}\n"


if __name__ == "__main__":
    sys.exit(ending.told(main)())
