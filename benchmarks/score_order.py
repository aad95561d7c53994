"""Do the scores put more damage further away? Real pictures, blurred, noisy, compressed and shifted in colour, against other real pictures.

    python benchmarks/score_order.py --data data/emoji --num 2048 --plot score_order.png

Pictures to be damaged and reference are disjoint halves of the train split. Prints a markdown table; exits 1 where an order is wrong.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from flowt2i.data.dataset import ImageTextDataset
from flowt2i.evaluation.corruptions import CORRUPTIONS, corrupt
from flowt2i.evaluation.frechet import Moments, frechet_distance
from flowt2i.evaluation.kid import kernel_distance
from flowt2i.evaluation.nets import load_net
from flowt2i.evaluation.reference import spread

INKS = {"blur": (38, 84, 124), "noise": (196, 78, 58), "jpeg": (92, 138, 74), "colour": (146, 98, 158)}


def measure(pictures: np.ndarray, real: np.ndarray, net: object) -> dict[str, list[tuple[float, float, float, float]]]:
    """Kind -> (strength, Fréchet distance, kernel distance, its error), the undamaged pictures first, at strength 0."""
    reference = net(real)  # type: ignore[operator]
    moments = Moments.of(reference)

    def scores(images: np.ndarray) -> tuple[float, float, float]:
        features = net(images)  # type: ignore[operator]
        return frechet_distance(Moments.of(features), moments), *kernel_distance(features, reference)

    clean = scores(pictures)
    found = {kind: [(0.0, *clean)] for kind in CORRUPTIONS}
    for kind, strength in tqdm([(kind, s) for kind, (_, strengths) in CORRUPTIONS.items() for s in strengths], desc="scoring", leave=False):
        found[kind].append((strength, *scores(corrupt(pictures, kind, strength))))
    return found


def rises(found: dict[str, list[tuple[float, float, float, float]]]) -> bool:
    """Whether both scores grow with every step of every kind."""
    return all(low[i] < high[i] for steps in found.values() for low, high in zip(steps, steps[1:]) for i in (1, 2))


def table(found: dict[str, list[tuple[float, float, float, float]]], net: str) -> str:
    rows = [f"| damage | strength | Fréchet distance ({net}) | kernel distance x 1000 |", "|---|---|---|---|"]
    for kind, steps in found.items():
        rows += [f"| {kind if strength else 'none'} | {strength:g} | {f:.2f} | {k * 1000:.3f} ± {e * 1000:.3f} |" for strength, f, k, e in steps]
    return "\n".join(dict.fromkeys(rows))  # the undamaged ones once


def plot(found: dict[str, list[tuple[float, float, float, float]]], pictures: np.ndarray, path: Path, net: str) -> None:
    """Pictures of each damage, and both scores over its steps, in Pillow alone."""
    side, gap, left, font, small = 96, 8, 90, ImageFont.load_default(size=17), ImageFont.load_default(size=14)
    sheet = Image.new("RGB", (left + 5 * (side + gap) + 60 + 2 * 430, 4 * (side + gap) + 96), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    draw.text((20, 14), f"real pictures, damaged, against other real pictures ({net}, {len(pictures):,} each)", (40, 42, 46), font=font)
    for row, (kind, (_, strengths)) in enumerate(CORRUPTIONS.items()):
        top = 56 + row * (side + gap)
        draw.text((20, top + side // 2 - 10), kind, INKS[kind], font=font)
        for column, strength in enumerate((0.0, *strengths)):
            image = corrupt(pictures[row : row + 1], kind, strength)[0] if strength else pictures[row]
            sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (left + column * (side + gap), top))
    # the built-in font has no é
    for panel, (which, scale, title) in enumerate(((1, 1, "Frechet distance"), (2, 1000, "kernel distance x 1000"))):
        x0, y0, width, height = left + 5 * (side + gap) + 70 + panel * 430, 90, 340, 4 * (side + gap) - 60
        most = max(step[which] * scale for steps in found.values() for step in steps)
        y = functools.partial(_height, top=y0, height=height, most=most)
        draw.text((x0, y0 - 30), title, (40, 42, 46), font=font)
        every = 10 ** np.floor(np.log10(most)) / (1 if most / 10 ** np.floor(np.log10(most)) >= 3 else 2)
        for tick in np.arange(0, most * 1.001, every):
            draw.line([(x0, y(tick)), (x0 + width, y(tick))], (226, 226, 222), 1)
            draw.text((x0 - 8, y(tick)), f"{tick:g}", (90, 92, 96), font=small, anchor="rm")
        draw.line([(x0, y0), (x0, y0 + height), (x0 + width, y0 + height)], (150, 150, 146), 1)
        for kind, steps in found.items():
            points = [(x0 + 16 + i * (width - 40) / 4, y(step[which] * scale)) for i, step in enumerate(steps)]
            draw.line(points, INKS[kind], 3, joint="curve")
            for point in points:
                draw.circle(point, 4, INKS[kind])
        for i, name in enumerate(("none", "1", "2", "3", "4")):
            draw.text((x0 + 16 + i * (width - 40) / 4, y0 + height + 8), name, (90, 92, 96), font=small, anchor="ma")
        draw.text((x0 + width / 2, y0 + height + 28), "strength", (90, 92, 96), font=small, anchor="ma")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _height(value: float, top: float, height: float, most: float) -> float:
    """Where a value stands on an axis from 0 (at the bottom) to `most`."""
    return top + height * (1 - max(float(value), 0.0) / most)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset of pixels")
    parser.add_argument("--num", type=int, default=2048, help="pictures a side (2,048: 20 minutes on a CPU core)")
    parser.add_argument("--net", default="efficientnet-lite0")
    parser.add_argument("--plot", type=Path, help="write a PNG")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    dataset = ImageTextDataset(args.data)
    rows = spread(len(dataset))
    num = min(args.num, len(rows) // 2)
    take = lambda part: dataset.fetch(part).stored.permute(0, 2, 3, 1).contiguous().numpy()
    pictures, real = take(rows[:num]), take(rows[num : 2 * num])
    found = measure(pictures, real, load_net(args.net))
    print(table(found, args.net))
    if args.plot:
        plot(found, pictures, args.plot, args.net)
    if args.out:
        args.out.write_text(json.dumps({"num": num, "net": args.net, "scores": found}, indent=1) + "\n")
    if not rises(found):
        print("the order is wrong somewhere", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
