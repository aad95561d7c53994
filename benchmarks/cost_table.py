#!/usr/bin/env python3
"""What 64, 256 and 1,024 image tokens cost on the pixel and the latent path, and what fits on 24 and 80 GB: computed, as a table in Markdown.

    python benchmarks/cost_table.py --out docs/cost.md

Operations by formula (`flowt2i.flops`); memory by counting what autograd keeps of small forward passes (`flowt2i.bench.footprint`), with the attention that a
GPU runs, with and without `train.checkpoint_activations`. Nothing is timed, so it may run beside other work: two minutes on a core, up to 5 GiB of memory.
`python benchmarks/scale.py` measures seconds and peaks of memory, `python benchmarks/attention.py --image-tokens N` the kernels.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ending import told
from scale import CONTEXT_GIB, apart, deep_footprint
from tqdm import tqdm

from flowt2i.bench.captions import EMOJI_T5
from flowt2i.bench.step import FEATURES, describe
from flowt2i.config import resolve
from flowt2i.data.finish import write_text
from flowt2i.description import CodecSpec
from flowt2i.flops import training_flop

MODELS = {"preset": (768, 12), "large": (1024, 24)}  # width, depth
CARDS = (24, 80)  # GB
TOKENS = (64, 256, 1024)


class Case(NamedTuple):
    """One line of the table."""

    path: str  # "pixels", patches of 8, or "latents" of 4 channels and an eighth of the side, patches of 1
    tokens: int
    width: int
    depth: int

    @property
    def side(self) -> int:
        """Pixels of the picture, the same on both paths."""
        return 8 * round(self.tokens**0.5)


def compute(case: Case) -> dict[str, Any]:
    """Operations, bytes and the largest micro-batches of a case."""
    latents, side = case.path == "latents", round(case.tokens**0.5)
    codec = CodecSpec(kind="vae", id="stand-in", image_size=case.side, shape=(4, side, side)) if latents else CodecSpec(
        kind="pixels", image_size=case.side, shape=(3, case.side, case.side)
    )  # fmt: skip
    description = describe(latents, max(EMOJI_T5)).model_copy(update={"codec": codec})
    words = ["--model.width", case.width, "--model.depth", case.depth, "--model.heads", case.width // 64]
    made = {}
    for again in (False, True):
        config = resolve("stability", [*map(str, words), "--train.checkpoint_activations", str(again).lower(), "--train.precision", "bf16"])
        made[again], parameters = deep_footprint(config, description)
    model = config.model.resolve(codec.kind, codec.shape)
    lengths = [length for length, count in EMOJI_T5.items() for _ in range(count)]
    total = training_flop(model, codec.shape, lengths, FEATURES if latents else 0)["total"]
    keys = case.tokens + sum(lengths) / len(lengths)
    scores = 3 * case.depth * 4 * case.tokens * keys * case.width  # scores and sums over values, forward and twice backward
    row: dict[str, Any] = case._asdict() | {"side": case.side, "parameters": parameters}
    row |= {"gflop": total / 1e9, "attention": scores / total}
    row |= {"state_gib": made[False].state / 2**30, "mib": made[False].slope / 2**20, "mib_again": made[True].slope / 2**20}
    return row | {f"{card}{'_again' * again}": made[again].largest((card - CONTEXT_GIB) * 2**30) for card in CARDS for again in (False, True)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what an image costs, then what fits."""
    lines = [
        "| model | path | tokens | picture | GFLOP an image | of it scores and values | MiB an image | with checkpointing |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {_name(row)} | {row['path']} | {row['tokens']:,} | {row['side']}×{row['side']} | {row['gflop']:,.0f} | {row['attention']:.0%} | "
        f"{row['mib']:,.1f} | {row['mib_again']:,.1f} |" for row in rows
    ]  # fmt: skip
    lines += ["", f"| model | path | tokens | weights and optimizer | {' | '.join(f'{card} GB | with checkpointing' for card in CARDS)} |"]
    lines += ["|---|---|---:|---:|" + "---:|" * 2 * len(CARDS)]
    for row in rows:
        fits = " | ".join(_images(row[f"{card}{again}"]) for card in CARDS for again in ("", "_again"))
        lines += [f"| {_name(row)} | {row['path']} | {row['tokens']:,} | {row['state_gib']:.1f} GiB | {fits} |"]
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    return f"{row['depth']} × {row['width']} ({row['parameters'] / 1e6:.0f}M)"


def _images(count: int) -> str:
    return f"{count:,}" if count else "does not fit"


@told
def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cost.md"), help="where to write the table (default cost.md)")
    parser.add_argument("--models", help='others, as JSON: {"name": [width, depth]}')
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="image tokens, squares of whole numbers (default 64 256 1024)")
    args = parser.parse_args(words)
    models = json.loads(args.models) if args.models else MODELS
    cases = [Case(path, tokens, *size) for size in models.values() for path in ("pixels", "latents") for tokens in args.tokens]
    with apart() as processes:
        rows = list(tqdm(processes.map(compute, cases), total=len(cases), desc="counting", unit="case", leave=False))
    said = (
        "# What sizes cost, and what fits\n\n"
        "64, 256 and 1,024 image tokens are pictures of 64, 128 and 256 pixels, with patches of 8 pixels or with a VAE of factor 8. Look up the model and the "
        "tokens, and take for `--train.micro_batch` a quarter less than the second table says: no line of it was tried on a card, and peaks measured on a CPU "
        "lie up to 29% over what is computed, most at 1,024 tokens ([speed.md](speed.md), where both paths are measured, with checkpointing and without). A "
        "VAE or a text encoder on the same card is not counted.\n\n"
        "Computed, not measured: `python benchmarks/cost_table.py --out docs/cost.md`. Preset `stability`, bf16, AdamW, average kept, blocks not compiled, "
        "captions as long as those of the emoji data. An image costs its forward and backward pass; checkpointing (`--train.checkpoint_activations true`) adds "
        "about a third of the operations, which is not counted. MiB an image is what autograd keeps; the second table is the largest micro-batch when a tenth "
        "of the card stays free for what is not counted."
    )
    write_text(args.out, f"{said}\n\n{table(rows)}\n")
    print(json.dumps({"out": str(args.out), "rows": rows}))


if __name__ == "__main__":
    raise SystemExit(main())
