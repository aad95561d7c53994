#!/usr/bin/env python3
"""How near `flowt2i prepare` comes to what the JPEG decoder alone can do, and the hours that two million pictures would take.

    python benchmarks/prepare.py --out benchmarks/results/prepare-cpu.json         # 20,000 pictures of 512 x 512: under a minute on two cores

Writes tars of JPEG and JSON (`--side` pixels, captions as long as text-to-image-2M's, contents of the built-in scenes under camera noise, so that a file
has about as many bytes as a photograph), decodes every file in as many processes as there are cores in the draft mode that `prepare` uses, and does nothing
with it; then prepares the same tars with the pixel codec. Told are images a second of both, by turns, and their ratio. Run it on an idle machine.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from ending import told
from PIL import Image

from flowt2i.data import scenes
from flowt2i.data.finish import write_text
from flowt2i.errors import UserError
from flowt2i.human import duration

DIFFERENT = 200  # pictures that are encoded; the tars repeat them under captions of their own
SHARD = 5_000
ALL = 2_000_000  # pairs of text-to-image-2M


def files(side: int) -> list[bytes]:
    """JPEG files, quality 90."""
    dice, found = np.random.default_rng(0), []
    for prompt in scenes.prompts(0, DIFFERENT):
        clean = Image.fromarray(scenes.render(scenes.parse(prompt), 64)).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(clean, np.float32) + dice.normal(0, 6, (side, side, 3))
        held = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(held, "JPEG", quality=90)
        found.append(held.getvalue())
    return found


def write_tars(folder: Path, pictures: list[bytes], count: int) -> None:
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for key in range(first, min(first + SHARD, count)):
                prompt = f"Picture {key}. " + "A sentence that says what can be seen in it, and another one. " * 4
                for suffix, data in (("jpg", pictures[key % len(pictures)]), ("json", json.dumps({"prompt": prompt}).encode())):
                    member = tarfile.TarInfo(f"{key:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def decode(data: bytes, image_size: int) -> None:
    """One file as `prepare` decodes it (data/images.py), up to the RGB pixels before they are resized."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        image.draft(None, (2 * image_size, 2 * image_size))
        image.convert("RGB")


def decode_share(pictures: list[bytes], count: int, image_size: int, together: Any) -> None:
    together.wait()  # until every process is there: starting them is not decoding
    for key in range(count):
        decode(pictures[key % len(pictures)], image_size)
    together.wait()  # until every process is done: ending them is not decoding either


def decoder_alone(pictures: list[bytes], count: int, image_size: int, cores: int) -> float:
    """Images a second of all cores."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(cores + 1, timeout=3600)  # a process that died is an error in the end, no wait for ever
    workers = [context.Process(target=decode_share, args=(pictures, count // cores, image_size, together)) for _ in range(cores)]
    for worker in workers:
        worker.start()
    together.wait()
    begun = time.perf_counter()
    together.wait()
    seconds = time.perf_counter() - begun
    for worker in workers:
        worker.join()
    return count // cores * cores / seconds


def prepared(folder: Path, out: Path, image_size: int) -> dict[str, Any]:
    """The report of one preparation, and `wall_s` of the whole command, start of Python and of its workers included."""
    begun = time.perf_counter()
    words = ["prepare", str(folder), "--out", str(out), "--image-size", str(image_size), "--json"]
    done = subprocess.run([sys.executable, "-m", "flowt2i", *words], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed: too little memory?"])[-1]
        raise UserError(f"flowt2i prepare failed: {last}")
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report | {"wall_s": time.perf_counter() - begun}


@told
def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="pictures (default 20000)")
    parser.add_argument("--side", type=int, default=512, help="pixels of their sides (default 512, as most of text-to-image-2M)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels that they are prepared to (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median counts (default 3)")
    parser.add_argument("--out", type=Path, help="where to write the result, as JSON")
    args = parser.parse_args(words)
    if min(args.count, args.rounds) < 1 or args.side < 64 or args.image_size < 8:
        raise UserError("--count and --rounds are 1 or more, --side 64 or more, --image-size 8 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if args.count < cores:
        raise UserError(f"--count is {cores} or more here: a picture for each core")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # before the measuring, not after it
    pictures = files(args.side)
    alone, reports = [], []
    with tempfile.TemporaryDirectory(prefix="flowt2i-prepare-") as scratch:
        tars = Path(scratch) / "tars"
        tars.mkdir()
        write_tars(tars, pictures, args.count)
        for turn in range(args.rounds):
            alone.append(decoder_alone(pictures, args.count, args.image_size, cores))
            reports.append(prepared(tars, Path(scratch) / f"data{turn}", args.image_size))
            print(
                f"decoder alone {alone[-1]:,.0f} images/s, prepare {reports[-1]['images_per_s']:,.0f} (command {reports[-1]['wall_s']:.1f} s)", file=sys.stderr
            )
    decoder, rate = statistics.median(alone), statistics.median(report["images_per_s"] for report in reports)
    result = machine.facts(torch.device("cpu")) | {
        "count": args.count, "side": args.side, "image_size": args.image_size, "kib_a_file": round(statistics.fmean(map(len, pictures)) / 1024, 1),
        "decoder_images_per_s": round(decoder, 1), "prepare_images_per_s": rate, "of_decoder": round(rate / decoder, 3),
        "wall_s": [round(report["wall_s"], 2) for report in reports], "two_million": duration(ALL / rate),
    }  # fmt: skip
    if args.out:
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    raise SystemExit(main())
