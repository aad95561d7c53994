"""Does a model know which of two things is where? Asked of the network itself, without drawing.

    python benchmarks/word_order.py --data data/scenes --model runs/quickstart runs/other

At t = 0 the network sees noise only, and puts out what it expects of the caption. For every held-out picture of two things it is asked twice: under
the picture's caption, and under the same one with left and right, above and below exchanged. Who reads the order of the words expects something nearer
to the picture under the first. Half right is chance. No picture is drawn, so it shows the moment at which word order is learned, long before shapes are.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import ending
import torch

from flowt2i.data import scenes
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.evaluation.intervals import wilson
from flowt2i.evaluation.scenes import OPPOSITE
from flowt2i.pipeline import Pipeline


def exchanged(caption: str) -> str:
    """The caption with the opposite relation."""
    return re.sub(r"\b(left|right|above|below)\b", lambda word: OPPOSITE[word[0]], caption)


@torch.no_grad()
def nearer(pipeline: Pipeline, dataset: ImageTextDataset, rows: list[int], captions: list[str]) -> torch.Tensor:
    """[N] bool: whether what is expected under the caption is nearer (mean squared error) to the picture than under the exchanged one."""
    answers = []
    for start in range(0, len(rows), 64):
        some = slice(start, start + 64)
        data = (dataset.fetch(rows[some]).stored.to(pipeline.device).float() / 127.5 - 1 - pipeline.mean) / pipeline.std
        noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(start)).to(pipeline.device)
        errors = []
        for asked in (captions[some], [exchanged(caption) for caption in captions[some]]):
            velocity = pipeline.field(noise, torch.tensor(0.0), *pipeline.encode(asked))
            errors.append((noise + velocity - data).square().flatten(1).mean(1))  # at t = 0 the expected picture is noise + v
        answers.append(errors[0] < errors[1])
    return torch.cat(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared scenes (pixels)")
    parser.add_argument("--model", nargs="+", required=True, help="run folders, checkpoints or exported models")
    parser.add_argument("--num", type=int, default=600, help="held-out pictures of two things, at most")
    args = parser.parse_args()
    dataset = ImageTextDataset(args.data, "heldout")
    captions = dataset.captions()
    rows = [row for row, caption in enumerate(captions) if len(scenes.parse(caption).things) == 2][: args.num]
    if not rows:
        parser.error(f"{args.data} holds out no picture of two things")
    for model in args.model:
        right = nearer(Pipeline.from_pretrained(model), dataset, rows, [captions[row] for row in rows])
        low, high = wilson(int(right.sum()), len(rows))
        print(json.dumps({"model": model, "right": round(float(right.float().mean()), 4), "low": round(low, 4), "high": round(high, 4), "pictures": len(rows)}))


if __name__ == "__main__":
    sys.exit(ending.told(main)())
