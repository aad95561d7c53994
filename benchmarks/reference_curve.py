#!/usr/bin/env python3
"""Make the curves that later runs of a preset are held against, from finished runs of it on the built-in scenes.

    flowt2i train --config quickstart --data data/scenes --out runs/reference --train.steps 3900 --train.eval_every 300 --train.score_prompts 256
    python benchmarks/reference_curve.py runs/reference runs/quickstart runs/quickstart-seed1 runs/quickstart-seed2

All runs must be of one preset with the same flow settings, their pictures drawn alike. Writes flowt2i/evaluation/reference_curves/PRESET.json (`--out`
another file): training loss (means of 60 stretches of log.jsonl), validation loss and score (eval.jsonl) against images seen. A run with one
evaluation gives one point.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from flowt2i.config import load_config
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import on_track
from flowt2i.training import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    configs = [load_config(run / "config.json") for run in args.runs]
    first = configs[0]
    description = DatasetDescription.load(checkpoint.find(args.runs[0]))
    for run, config in zip(args.runs, configs):
        described = DatasetDescription.load(checkpoint.find(run))
        same = (config.preset, config.flow, config.model.prediction) == (first.preset, first.flow, first.model.prediction)
        same = same and on_track.drawn_with(config.sample) == on_track.drawn_with(first.sample)
        if not same or not described.is_scenes or described.codec != description.codec:
            raise SystemExit(f"{run} is of another preset, flow, sampler or data than {args.runs[0]}")
    runs = [
        {"seed": config.train.seed, "batch_size": config.data.batch_size, "score_prompts": config.train.score_prompts}
        | {what: points for what, points in on_track.curve_of(run).items() if points}
        for run, config in zip(args.runs, configs)
    ]
    reference = {
        "preset": first.preset, "codec": description.codec.kind, "image_size": description.codec.image_size, "flow": first.flow.model_dump(),
        "samples": [on_track.drawn_with(first.sample)], "prediction": first.model.prediction,
        "made_by": "python benchmarks/reference_curve.py " + " ".join(run.name for run in args.runs), "runs": runs,
    }  # fmt: skip
    out = args.out or Path(on_track.__file__).parent / "reference_curves" / f"{first.preset}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text(reference))
    print(f"wrote {out}: {len(runs)} runs, {sum(len(run['validation']) for run in runs)} evaluations")


def text(reference: dict[str, Any]) -> str:
    """JSON with a line for each curve."""
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items() if key != "runs"]
    runs = ["  {" + ",\n   ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in run.items()) + "}" for run in reference["runs"]]
    return "{\n" + ",\n".join([*head, ' "runs": [\n' + ",\n".join(runs) + "\n ]"]) + "\n}\n"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
