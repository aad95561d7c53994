#!/usr/bin/env python3
"""How many samples a second one process fetches from a prepared dataset.

    python benchmarks/loader.py [DATA] [--batch 64] [--seconds 2] [--json]

Without DATA two made-up datasets are timed: 20,000 samples of 64 x 64 pixels, and of 4 x 8 x 8 VAE moments (as from a 64 pixel VAE).
Indices are random, as in training; the files are in the page cache after the first pass. Prints samples a second.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from flowt2i.data.dataset import ImageTextDataset
from flowt2i.data.units import make_batch, part_path, write_part
from flowt2i.description import CodecSpec, DatasetDescription, TextSpec

SAMPLES, PART = 20_000, 1000


def made_up(folder: Path, codec: CodecSpec) -> Path:
    """A dataset of random samples with captions of 4 to 40 tokens."""
    random = np.random.default_rng(0)
    shape = codec.shape if codec.kind == "pixels" else (2 * codec.shape[0], *codec.shape[1:])
    for number in range(SAMPLES // PART):
        raw = random.integers(0, 256, (PART, *shape), dtype=np.uint8)
        stored = raw if codec.kind == "pixels" else raw.astype(np.float16)
        keys = [f"{number * PART + i:08d}" for i in range(PART)]
        tokens = [random.integers(2, 4000, n).tolist() for n in random.integers(4, 41, PART)]
        write_part(part_path(folder, "train", number), make_batch(codec, keys, keys, tokens, keys, stored))
    channels = codec.shape[0]
    description = DatasetDescription(
        codec=codec,
        text=TextSpec(kind="builtin", vocab_size=4096, null_tokens=(1,)),
        latent_mean=(0.0,) * channels,
        latent_std=(1.0,) * channels,
        train_count=SAMPLES,
        heldout_count=0,
        heldout_fraction=0,
    )
    description.save(folder)
    return folder


def rate(folder: Path, batch: int, seconds: float) -> float:
    """Samples a second in batches of random indices, after one pass over the data."""
    dataset = ImageTextDataset(folder)
    random = np.random.default_rng(0)
    for start in range(0, len(dataset), batch):
        dataset.fetch(np.arange(start, min(start + batch, len(dataset))))
    batches = [random.integers(0, len(dataset), batch) for _ in range(256)]
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        dataset.fetch(batches[done % len(batches)])
        done += 1
    return done * batch / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"batch": args.batch}
    with tempfile.TemporaryDirectory() as temporary:
        if args.data:
            folders = {str(args.data): args.data}
        else:
            vae = CodecSpec(kind="vae", id="vae", fingerprint="none", image_size=64, shape=(4, 8, 8))
            folders = {
                "pixels 64x64": made_up(Path(temporary, "pixels"), CodecSpec(kind="pixels")),
                "latents 4x8x8": made_up(Path(temporary, "latents"), vae),
            }
        for name, folder in folders.items():
            result[name] = round(rate(folder, args.batch, args.seconds))
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<20} {value:>10,}" + ("" if name == "batch" else " samples/s") if isinstance(value, int) else f"{name}: {value}")


if __name__ == "__main__":
    main()
