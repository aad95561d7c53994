#!/usr/bin/env python3
"""Which block learns better a second: `seed` or `modern`, side by side on a core each, for equal time.

    python benchmarks/blocks.py --data data/emoji --minutes 6

Both are trained by AdamW with the seed's schedule and learning rate at width 256 x 6 blocks, on pixels, with the same times, batch and dropout, so that the
block and its positions alone differ. Prints parameters, images seen, and validation loss by time bin of the averaged weights. Run on two idle cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SIZE = ["--model.width", "256", "--model.depth", "6", "--model.heads", "4", "--model.time_width", "256", "--model.text_width", "256", "--model.text_depth", "2"]
COMMON = [*SIZE, "--data.batch_size", "64", "--train.micro_batch", "0", "--train.ema", "0.998", "--train.eval_every", "0", "--flow.floor", "0.2", "--json"]
BLOCKS = {
    "seed": ["--model.block", "seed", "--model.positions", "learned", "--model.mlp_ratio", "3"],
    "modern": ["--model.block", "modern", "--model.mlp_ratio", "3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp(prefix="blocks-")))
    args = parser.parse_args()
    processes = {}
    for core, (name, words) in enumerate(BLOCKS.items()):
        command = [sys.executable, "-m", "flowt2i.cli", "train", "--config", "hparam_tuning", "--data", str(args.data), "--out", str(args.out / name)]
        command = ["taskset", "-c", str(core), *command, *COMMON, *words, "--train.minutes", str(args.minutes), "--train.compile", "on"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(args.out / f"cache-{name}")}
        processes[name] = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for name, process in processes.items():
        summary = json.loads(process.communicate()[0].splitlines()[-1])
        parameters = json.loads((args.out / name / "config.json").read_text())["resolved"]["parameters"]["total"]
        facts = {"block": name, "parameters_m": round(parameters / 1e6, 2), "images_seen": summary["images_seen"], "seconds": summary["seconds"]}
        print(json.dumps(facts | {key: round(value, 4) for key, value in summary["validation_ema"].items()}), flush=True)


if __name__ == "__main__":
    main()
