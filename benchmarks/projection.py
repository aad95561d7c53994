#!/usr/bin/env python3
"""What the presets `stability` and `full_scale` would take on GPUs that nobody has lent us yet: a projection, as a table in Markdown.

    python benchmarks/projection.py                                  # 2 x RTX 3090, one H100, eight
    python benchmarks/projection.py --text-tokens 40 --shares 0.45   # shorter captions; one share of the cards' matrix units
    python benchmarks/projection.py --measured benchmarks/results/bench-stability-cpu.json

Operations by formula (`flowt2i.flops`), over the makers' dense bf16 rates times the share of them that a training uses. That share is the unknown:
`flowt2i bench` measures it on the machine at hand, and this script takes a low, a middle and a high one. `--measured` adds the machine of a result of
`flowt2i bench --config stability --json`, at the rate that was measured there, and the share of its bare products that it reached as one more column: of a
data sheet's rate, which no product reaches, that is a bound. Preparation (VAE and T5 over all pictures), evaluations and pauses are not in it.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from ending import told

from flowt2i.bench.captions import LONGEST
from flowt2i.bench.step import FEATURES, describe
from flowt2i.config import resolve
from flowt2i.errors import UserError
from flowt2i.flops import training_flop
from flowt2i.human import duration

# Dense bf16 products with fp32 sums, TFLOP/s of one card: NVIDIA, GA102 white paper (2021), app. A; H100 data sheet, SXM.
MACHINES = {"2 × RTX 3090": (2, 71.0), "1 × H100": (1, 989.4), "8 × H100": (8, 989.4)}
PRESETS = ("stability", "full_scale")
SHARES = (0.2, 0.35, 0.45)


class Measured(NamedTuple):
    """A machine that `flowt2i bench` measured."""

    device: str
    date: str
    tflops: float  # of the model, TFLOP/s
    share: float  # of its bare products


def measured_by(file: Path) -> Measured:
    """A result of `flowt2i bench --json`. UserError where it is none, or of another model than the presets'."""
    try:
        found = json.loads(file.read_text())
        measured = Measured(found["device"], found["machine"]["date"], float(found["model_tflops"]), float(found["share_of_ceiling"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--measured {file}: no result of `flowt2i bench --config stability --json` ({type(error).__name__})") from None
    if found.get("preset") not in PRESETS:
        raise UserError(f"--measured {file}: measured the preset {found.get('preset')}, not {' or '.join(PRESETS)}, whose sizes reach other shares")
    return measured


def project(preset: str, text_tokens: int, shares: list[float]) -> dict[str, Any]:
    """Images, operations, and of each machine the seconds at each share."""
    config, description = resolve(preset), describe(True, text_tokens)
    model = config.model.resolve(description.codec.kind, description.codec.shape)
    images = config.train.steps * config.data.batch_size
    flop = training_flop(model, description.codec.shape, [text_tokens], FEATURES)["total"]
    took = {name: [images * flop / (cards * rate * 1e12 * share) for share in shares] for name, (cards, rate) in MACHINES.items()}
    return {"preset": preset, "images": images, "flop_per_image": flop, "seconds": took}


@told
def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-tokens", type=int, default=LONGEST, help=f"of every caption (default {LONGEST}, the longest: text-to-image-2M has long ones)")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the cards' matrix units that are used (default 0.2 0.35 0.45)")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="result of `flowt2i bench --config stability --json`: its machine and its share besides")
    args = parser.parse_args(words)
    if args.text_tokens < 1 or not all(0 < share <= 1 for share in args.shares):
        raise UserError("--text-tokens is 1 or more, --shares over 0 and up to 1")
    measured = measured_by(args.measured) if args.measured else None
    shares, heads = list(args.shares), [f"at {share:.0%} of its matrix units" for share in args.shares]
    if measured:
        shares.append(measured.share)
        heads.append(f"at {measured.share:.0%}, what the measured machine reached of its bare products")
    print("| preset | images | GFLOP an image | machine | " + " | ".join(heads) + " |")
    print("|---|---|---|---|" + "---|" * len(heads))
    for found in (project(preset, args.text_tokens, shares) for preset in PRESETS):
        head = f"| `{found['preset']}` | {found['images'] / 1e6:.1f}M | {found['flop_per_image'] / 1e9:.0f} |"
        for machine, seconds in found["seconds"].items():
            print(f"{head} {machine} | " + " | ".join(map(duration, seconds)) + " |")
        if measured:
            seconds = found["images"] * found["flop_per_image"] / (measured.tflops * 1e12)
            name = f"{measured.device}: {measured.tflops:.3g} TFLOP/s measured on {measured.date}"
            print(f"{head} {name} | " + " | ".join(["–"] * len(args.shares) + [duration(seconds)]) + " |")


if __name__ == "__main__":
    raise SystemExit(main())
