#!/usr/bin/env python3
"""Can a model draw a subject in a style in which it has never seen it? On captions `SUBJECT, STYLE` (as those of the emoji data), each held-out one asked once.

    flowt2i prepare EMOJI_TARS --heldout 0.1 --out data/emoji10
    python benchmarks/combinations.py --model runs/emoji --data data/emoji10 --name emoji          # some minutes

Measured (but for the style) in the features of EfficientNet-lite0, of the drawn pictures and, as yardsticks, of real ones in their place:

    Fréchet distance      n drawn pictures against the training pictures; floor: the n held-out pictures themselves against the training
                          pictures. At some hundreds both are far above what 2,048 pictures would have (a bias of about 1/n in both, which
                          draws their ratio towards 1): compare at equal n only
    kernel distance       between the same, with its standard error (no bias at any n)
    style                 how often a small convolutional network, trained on the training pictures, sees the style that was asked for
    subject               how often, of all held-out pictures of the style, the one that shows the subject is nearest (cosine of features less their mean)
    near copies           as in `flowt2i evaluate --metrics memorisation`, and the nearest training pictures shown

Yardsticks for the subject: a real picture of it in another style (where training has one), and its own picture blurred. Writes
RESULTS/combinations-NAME.json, .md and .png (the first held-out captions in their mixed order, not picked: real and drawn) and -copies.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ending
import machine
import numpy as np
import style_judge
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from flowt2i import box
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import memorisation, nets
from flowt2i.evaluation.frechet import Moments, frechet_distance
from flowt2i.evaluation.intervals import tally
from flowt2i.evaluation.kid import kernel_distance
from flowt2i.evaluation.metrics import Context
from flowt2i.evaluation.pictures import features as features_of
from flowt2i.evaluation.reference import real_images, same_data, spread
from flowt2i.grid import grid
from flowt2i.pipeline import Pipeline, save_png
from flowt2i.styles import Parted, parted
from flowt2i.training import checkpoint, start
from flowt2i.training.distributed import World

SHOWN = 24  # held-out captions in the picture
BLUR = 2.0  # pixels at 64, of the blurred yardstick
LEAST = 32  # pictures to compare


def found_first(queries: Tensor, pictures: Tensor, own: Sequence[int], groups: Sequence[str]) -> list[bool]:
    """Whether picture own[k] is the nearest to queries[k] among the pictures [n, d] of its group, by cosine."""
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)
    likeness = unit(queries) @ unit(pictures).T
    of = np.array(groups)
    other = torch.from_numpy(of[np.array(own)][:, None] != of[None, :])
    return (likeness.masked_fill(other, -2).argmax(1) == torch.tensor(own)).tolist()


def blurred(images: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, 3], by a Gaussian of `BLUR` pixels at 64."""
    radius = BLUR * images.shape[1] / 64
    return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))) for image in images])


def styles_seen(known: np.ndarray, shown: list[Parted], pictures: dict[str, np.ndarray], asked: list[Parted], progress: bool, seed: int = 0) -> dict[str, Any]:
    """How often a network trained on the pictures `known` under captions `shown` sees the asked style in each set of pictures; uint8 [n, S, S, 3] all."""
    index = {style: k for k, style in enumerate(sorted({style for _, style in shown}))}
    labels = lambda captions: torch.tensor([index[style] for _, style in captions])
    judge = style_judge.trained(known, labels(shown), len(index), progress, seed)
    hits = {name: style_judge.seen(judge, images) == labels(asked) for name, images in pictures.items()}
    return {name: tally(int(hit.sum()), len(hit)) for name, hit in hits.items()}


def subjects_found(known: Tensor, shown: list[Parted], drawn: Tensor, real: Tensor, soft: Tensor, asked: list[Parted]) -> dict[str, Any]:
    """How often the real picture [m, d] of a caption is the nearest of its style: to the drawn one, to yardsticks in its place (`soft`: blurred), by chance."""
    groups, mean = [style for _, style in asked], known.mean(0)
    first = lambda x, of: tally(sum(found_first(x - mean, real - mean, of, groups)), len(of))
    elsewhere = {subject: row for row, (subject, _) in enumerate(shown)}  # in another style: no caption is in both parts
    everywhere, also = list(range(len(asked))), [k for k, (subject, _) in enumerate(asked) if subject in elsewhere]
    return {
        "chance": sum(1 / groups.count(style) for style in groups) / len(groups),
        "drawn": first(drawn, everywhere),
        "drawn, subject seen in another style": first(drawn[also], also),
        "real, in another style": first(known[torch.tensor([elsewhere[asked[k][0]] for k in also], dtype=torch.int64)], also),
        "real, blurred": first(soft, everywhere),
    }


def measure(context: Context, data: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Scores; the real pictures and the drawn ones, uint8 [N, S, S, 3], in the order of `context.prompts`."""
    pipeline, net = context.need_pipeline("combinations"), context.net()
    train, heldout = (ImageTextDataset(data, split) for split in ("train", "heldout"))
    trained = min(pipeline.config.data.subset or len(train), len(train))
    real = real_images(heldout, pipeline.codec, context.rows)
    shown, asked = [parted(caption) for caption in train.captions()[:trained]], [parted(caption) for caption in context.prompts]
    styles = {style for _, style in shown}
    if len(styles) < 2 or len(styles) > 50 or any(style not in styles for _, style in asked):
        raise UserError(f"the captions of {data} do not end in a few styles (`SUBJECT, STYLE`): there is nothing to compare")
    if both := set(shown) & set(asked):
        raise UserError(f"{len(both)} captions of {data} are held out and trained on, such as {', '.join(min(both))!r}: leave out doubles")

    everything = real_images(train, pipeline.codec, spread(trained))  # mixed: of very many, the kernel distance takes the first
    shown = [shown[row] for row in spread(trained)]
    known = features_of(net, everything, context.world, context.progress, f"features of {len(everything):,} training pictures").double()
    truth, drawn = net(real).double(), context.features().double()
    images = context.images()

    of_train, sides = Moments.of(known), {"drawn": drawn, "floor": truth}
    found: dict[str, Any] = {
        "n": len(asked),
        "frechet": {name: frechet_distance(Moments.of(x), of_train) for name, x in sides.items()},
        "kid": {name: kernel_distance(x, known)._asdict() for name, x in sides.items()},
        "style": styles_seen(everything, shown, {"drawn": images, "real": real}, asked, context.progress, context.seed),
        "subject": subjects_found(known, shown, drawn, truth, net(blurred(real)).double(), asked),
        "protocol": f"{net.name}, {context.asked}, {context.protocol()}",
    }
    return found, real, images


def copies(context: Context, out: Path) -> dict[str, Any]:
    """Near copies of training pictures among the drawn ones, and the closest pairs in a picture."""
    scores = memorisation.metric(context)
    judged = scores.details["memorisation"]
    shown = [name for name in judged if name.endswith("held-out captions")][-1]  # by the net's features, where there are not too many for a CPU
    cells, words = [], []
    for (sample, training), pair in zip(scores.pictures[shown], judged[shown]["pairs"]):
        cells += [sample, training]
        words += [f"drawn: {pair['prompt']}", f"training: {pair['caption']}"]
    save_png(grid(cells, words, columns=4), out)
    return {name: {key: value for key, value in found.items() if key != "pairs"} for name, found in judged.items()}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    share = lambda t: f"{t['accuracy']:.1%} [{100 * t['low']:.1f}, {100 * t['high']:.1f}]"
    frechet, kid, style, subject = (found[name] for name in ("frechet", "kid", "style", "subject"))
    kernel = {name: f"{k['value'] * 1000:.1f} ± {k['error'] * 1000:.1f}" for name, k in kid.items()}
    yardsticks = f"chance {subject['chance']:.1%}, in another style {share(subject['real, in another style'])}, blurred {share(subject['real, blurred'])}"
    rows = [
        ("Fréchet distance", f"{frechet['drawn']:.1f}", f"{frechet['floor']:.1f} (ratio {frechet['drawn'] / frechet['floor']:.2f})"),
        ("kernel distance × 1000", kernel["drawn"], kernel["floor"]),
        ("style seen by a small network", share(style["drawn"]), share(style["real"])),
        ("subject found first in its style", share(subject["drawn"]), yardsticks),
        ("the same, subjects that training shows in another style", share(subject["drawn, subject seen in another style"]), ""),
        *((f"near copies: {name}", share(j["near_copies"]), f"{j['expected']:.1%}") for name, j in found.get("copies", {}).items()),
    ]
    lines = [f"| {found['n']} held-out combinations | drawn | real ones in their place |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", found["protocol"]]) + "\n"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run folder, checkpoint, exported model, name of a packaged model or hub id")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data with a held-out part that training did not see")
    parser.add_argument("--name", help="of the results (default: the model's folder)")
    parser.add_argument("--num", type=int, default=0, help="held-out captions that are asked (default: all, once)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the drawings, and of the network that judges styles: tells what chance does to the scores (default: 0)"
    )
    parser.add_argument("--copies", action=argparse.BooleanOptionalAction, default=True, help="look for near copies too: as many pictures again")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(words)
    if not nets.has_efficientnet():
        raise UserError(f"this needs EfficientNet-lite0: {nets.EFFICIENTNET_INSTALL}")
    folder = start.find(args.model).folder
    pipeline = Pipeline.from_pretrained(folder)
    said = sum(bool(caption.strip()) for caption in ImageTextDataset(args.data, "heldout").captions())
    num = min(args.num or said, said)
    if num < LEAST:
        raise UserError(f"{num} held-out pictures with captions are too few to compare: {LEAST} are the least; prepare with a larger --heldout, or raise --num")
    args.results.mkdir(parents=True, exist_ok=True)
    ours = Path(args.model).exists() and not box.holds(folder)  # neither the package nor the hub's cache is a place for pictures
    kept = checkpoint.home(folder) if ours else None
    context = Context(World(0, 1, pipeline.device), num, pipeline, args.data, seed=args.seed, run=kept, source=folder)
    if not same_data(DatasetDescription.load(args.data), pipeline.description):
        raise UserError(f"{args.data} is not what {args.model} was trained on: it may have seen the pictures that are held out there; give its own data")
    if args.copies:
        memorisation.check(context)
    found, real, drawn = measure(context, args.data)
    file = args.results / f"combinations-{args.name or Path(args.model).name}{f'-seed{args.seed}' if args.seed else ''}"
    about = machine.facts(pipeline.device) | {"model": args.model, "seed": args.seed}
    write = lambda: file.with_suffix(".json").write_text(json.dumps(about | found, indent=1) + "\n")
    write()
    if args.copies:
        found["copies"] = copies(context, file.with_name(f"{file.name}-copies.png"))
        write()
    shown = range(min(SHOWN, len(real)))
    cells = [image for k in shown for image in (real[k], drawn[k])]
    save_png(grid(cells, [f"{whose}: {context.prompts[k]}" for k in shown for whose in ("real", "drawn")], columns=8), file.with_suffix(".png"))
    file.with_suffix(".md").write_text(table(found))
    print(table(found))
    print(f"{file}.json, .md, .png")


if __name__ == "__main__":
    sys.exit(ending.told(main)())
