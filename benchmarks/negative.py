#!/usr/bin/env python3
"""What a negative prompt keeps away, and at what cost: on the built-in scenes, where a checker can tell.

    python benchmarks/negative.py --model runs/quickstart --name scenes          # 280 pictures of each kind and number of steps: a minute

A prompt leaves its background open ("a large red circle"); the negative prompt names one ("a large red circle on a navy background"). Told are the share of
pictures that show that background, and the share that show all the prompt says, guided away from the empty caption and from the negative prompt, with the same
seeds, and the paired difference (95%). Quality alone would say nothing of a negative prompt: it changes what is asked for.
Results go to RESULTS/negative-NAME.json and .md.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ending
import machine
from sampling_settings import BASE
from tqdm import tqdm

from flowt2i import Pipeline
from flowt2i.commands.common import newest_run
from flowt2i.data import scenes
from flowt2i.data.scenes_check import check
from flowt2i.data.scenes_looks import BACKGROUNDS
from flowt2i.errors import UserError
from flowt2i.evaluation.compare import of_shares
from flowt2i.evaluation.scenes import FIRST_SEED

STEPS = (4, 8, 16)  # of Euler at shift 5, guided all the way: 8, 16 and 32 evaluations


def asked(count: int) -> list[str]:
    """The first `count` of the score's prompts that have one object and leave the background open."""
    parsed = ((prompt, scenes.parse(prompt)) for prompt in scenes.prompts(0, 50 * count))
    found = [prompt for prompt, scene in parsed if scene.background is None and len(scene.things) == 1 and scene.things[0].count == 1]
    return found[:count]


def measure(pipeline: Pipeline, num: int) -> list[dict[str, Any]]:
    """For each number of steps: shares and paired differences over `num` pictures of each background's prompt. a: the empty caption, b: the negative prompt."""
    rows = []
    pairs = list(zip(asked(len(BACKGROUNDS)), BACKGROUNDS))
    with tqdm(total=2 * num * len(pairs) * sum(STEPS), desc="drawing", unit="step", leave=False) as bar:
        for steps in STEPS:
            hits: dict[str, dict[str, list[bool]]] = {"avoided": {"a": [], "b": []}, "right": {"a": [], "b": []}}
            for prompt, background in pairs:
                avoided = f"{prompt.rstrip('.')} on a {background} background"
                for side, negative in (("a", None), ("b", avoided)):
                    drawn = pipeline.sample(prompt, num=num, seed=FIRST_SEED, negative=negative, **BASE | {"steps": steps})
                    hits["avoided"][side] += [bool(check(image, avoided).background) for image in drawn.images]
                    hits["right"][side] += [bool(check(image, prompt).all) for image in drawn.images]
                    bar.update(num * steps)
            rows.append({"steps": steps, "evaluations": drawn.evaluations} | {what: of_shares(h["a"], h["b"]) for what, h in hits.items()})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| evaluations | | away from the empty caption | away from the negative prompt | difference |", "|---|---|---|---|---|"]
    for row in rows:
        for what, words in (("avoided", "shows the background that is to be avoided"), ("right", "shows all the prompt says")):
            share, d = row[what], row[what]["difference"]
            told = f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
            lines.append(f"| {row['evaluations']} | {words} | {share['a']:.1%} | {share['b']:.1%} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model of scenes (default: the newest run)")
    parser.add_argument("--num", type=int, default=40, help=f"pictures of each of {len(BACKGROUNDS)} prompts (default 40)")
    parser.add_argument("--name", help="of the results (default: the model's folder)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device")
    args = parser.parse_args()
    model = args.model or newest_run()
    pipeline = Pipeline.from_pretrained(model, device=args.device)
    if not pipeline.description.is_scenes:
        raise UserError("only scenes have a checker that tells a background: give a model of the built-in scenes")
    found = {"model": pipeline.told(), **machine.facts(pipeline.device), "pictures": args.num * len(BACKGROUNDS), "rows": measure(pipeline, args.num)}
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / f"negative-{args.name or model.name}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(found["rows"]))
    print(table(found["rows"]))


if __name__ == "__main__":
    sys.exit(ending.told(main)())
