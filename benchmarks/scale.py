#!/usr/bin/env python3
"""How the cost of a training step grows with width, depth, image tokens and batch: seconds and memory, beside the counted operations.

    python benchmarks/scale.py --out benchmarks/results/scale-cpu.json --plot docs/images/scale-cpu.png
    python benchmarks/scale.py --paths --out benchmarks/results/scale-paths-cpu.json       # latents and pixels, with and without checkpointing
    python benchmarks/scale.py --fits-only --out benchmarks/results/scale-fits.json

One quantity is varied at a time round a base model; every point is a process of its own, so that its peak of memory is its own, and the base is
measured anew on each axis: how far these differ is the noise. Latents of 4 channels with patches of 1, features of a frozen encoder for captions as long as
the emoji data's, bf16 (fp32 where the device has no units for it; what fits: bf16), AdamW, EMA, eager (compiled takes less memory, and other time).

Beside what was measured stands what `flowt2i.bench.footprint` computes. From the same computation comes the table of the largest micro-batch that fits on
cards of 8, 12, 24 and 80 GB: computed, not measured. Run it on an idle machine: three minutes of measuring on two cores, which are written down before
what fits is computed.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from flowt2i import model as model_module
from flowt2i import precision
from flowt2i.bench.captions import EMOJI_T5
from flowt2i.bench.ceiling import matrix_ceilings
from flowt2i.bench.footprint import Footprint, footprint
from flowt2i.bench.step import FEATURES, BareStep, describe
from flowt2i.bench.timing import device_name, machine
from flowt2i.config import Config, resolve
from flowt2i.data.finish import write_text
from flowt2i.description import CodecSpec, DatasetDescription
from flowt2i.flops import training_flop
from flowt2i.memory import is_out_of_memory
from flowt2i.model import count_parameters
from flowt2i.training.distributed import best_device, peak_memory

Point = dict[str, int]  # width, depth, tokens, batch; pixels: patches of 8 pixels instead of cells of a latent; checkpointing: of activations
BASE: dict[str, Point] = {"cpu": {"width": 384, "depth": 6, "tokens": 64, "batch": 16}, "cuda": {"width": 768, "depth": 12, "tokens": 64, "batch": 96}}
AXES: dict[str, dict[str, list[int]]] = {
    "cpu": {"width": [192, 384, 768], "depth": [3, 6, 12], "tokens": [64, 256, 1024], "batch": [4, 16, 64]},
    "cuda": {"width": [384, 768, 1152, 1536], "depth": [6, 12, 24], "tokens": [64, 256, 1024], "batch": [24, 96, 192, 384]},
}
PATHS = {"cpu": {"width": 384, "depth": 6, "batch": 4}, "cuda": {"width": 768, "depth": 12, "batch": 24}}
MODELS = {"seed size": (768, 12), "24 x 1024": (1024, 24), "28 x 1152": (1152, 28)}  # of the table of what fits
CARDS = (8, 12, 24, 80)  # GB
CONTEXT_GIB = 0.6  # what CUDA itself takes of a card
DEPTHS = (2, 3)  # that are looked at for what fits: deep models would need the memory that is computed


def prepare(point: Point) -> tuple[Config, DatasetDescription]:
    side = round(point["tokens"] ** 0.5)
    words = ["--model.width", point["width"], "--model.depth", point["depth"], "--model.heads", max(1, point["width"] // 64)]
    words += ["--train.checkpoint_activations", bool(point.get("checkpointing"))]
    words += ["--train.precision", point.get("precision", precision.resolved("auto", best_device()))]
    config = resolve("stability", list(map(str, words)))
    description = describe(True, max(EMOJI_T5))
    codec = description.codec.model_copy(update={"shape": (4, side, side)})
    if point.get("pixels"):
        codec = CodecSpec(kind="pixels", image_size=8 * side, shape=(3, 8 * side, 8 * side))
        description = description.model_copy(update={"latent_mean": (0.0,) * 3, "latent_std": (1.0,) * 3})
    return config, description.model_copy(update={"codec": codec})


def measure(point: Point) -> dict[str, Any]:
    """Seconds of a step, its peak of memory, and what both are computed to be. Asked of a process of its own."""
    device = best_device()
    config, description = prepare(point)
    with fused_attention() if device.type == "cuda" else contextlib.nullcontext():
        computed = footprint(BareStep(config, description, EMOJI_T5, torch.device("cpu"))).bytes(point["batch"])
    before = reset_peak(device)
    step = BareStep(config, description, EMOJI_T5, device)
    lengths = [length for length, count in EMOJI_T5.items() for _ in range(count)]
    flop = training_flop(step.model.config, description.codec.shape, lengths, FEATURES)["total"]
    row = point | {"parameters": count_parameters(step.model)["total"], "tflop": flop * point["batch"] / 1e12, "computed_gib": computed / 2**30}
    try:
        row["seconds"] = step.step_seconds(point["batch"], 1, seconds=4)
        row["measured_gib"] = max(0, peak(device) - before) / 2**30  # the system may take pages back meanwhile
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return row


def reset_peak(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here."""
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> int:
    """The most that tensors took on a GPU, or this process in main memory, in bytes."""
    if device.type != "cuda":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return int(peak_memory(device) * 2**30)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """The attention that a GPU runs, on the CPU: it keeps no scores for the backward pass."""
    written_out = model_module.attend
    model_module.attend = lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    try:
        yield
    finally:
        model_module.attend = written_out


def deep_footprint(config: Config, description: DatasetDescription) -> tuple[Footprint, int]:
    """Memory of a training with a GPU's attention, and the number of parameters: from two shallow models, for all blocks are alike."""
    found = []
    for depth in DEPTHS:
        model = config.model.model_copy(update={"depth": depth})
        with fused_attention():
            step = BareStep(config.model_copy(update={"model": model}), description, EMOJI_T5, torch.device("cpu"))
            found.append((*map(float, footprint(step)), count_parameters(step.model)["total"]))
    first, second = found
    state, fixed, slope, parameters = (a + (b - a) * (config.model.depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]) for a, b in zip(first, second))
    return Footprint(round(state), fixed, slope), round(parameters)


def fits(tokens: list[int]) -> list[dict[str, Any]]:
    """The largest micro-batch, computed, of each model and number of tokens on each card; 0: the model itself is too large."""
    cases = [(name, *MODELS[name], count) for name in MODELS for count in tokens]
    with apart() as processes:
        return list(tqdm(processes.map(fits_on_cards, *zip(*cases)), total=len(cases), desc="what fits", unit="case", leave=False))


def fits_on_cards(name: str, width: int, depth: int, tokens: int) -> dict[str, Any]:
    """One line of `fits`."""
    made, _ = deep_footprint(*prepare({"width": width, "depth": depth, "tokens": tokens, "batch": 1, "precision": "bf16"}))
    row = {"model": name, "tokens": tokens, "state_gib": round(made.state / 2**30, 2), "mib_an_image": round(made.slope / 2**20, 1)}
    return row | {f"{card} GB": made.largest((card - CONTEXT_GIB) * 2**30) for card in CARDS}


def apart() -> ProcessPoolExecutor:
    """A process for each case, one after another: what one leaves behind in memory would add up over all."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def in_its_own_process(point: Point) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--point", json.dumps(point)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed: too little memory?"])[-1]
        print(f"{point}: {last}", file=sys.stderr)
        return dict(point)
    return json.loads(done.stdout.splitlines()[-1])


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (cost, memory) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name, rows in result["axes"].items():
        rows = sorted((row for row in rows if "seconds" in row), key=lambda row: row[name])
        cost.plot(
            [row["tflop"] for row in rows], [row["seconds"] for row in rows], "o-", label=f"{name} {', '.join(str(row[name]) for row in rows)}", markersize=4
        )
        memory.plot([row["computed_gib"] for row in rows], [row["measured_gib"] for row in rows], "o-", label=name, markersize=4)
    ends = cost.get_xlim()
    cost.plot(ends, [end / result["ceiling_tflops"] for end in ends], "--", color="0.6", label=f"bare matrix products, {result['ceiling_tflops']:.3g} TFLOP/s")
    cost.set(xscale="log", yscale="log", xlabel="counted operations of a step, TFLOP", ylabel="seconds a step")
    both = [row[key] for rows in result["axes"].values() for row in rows if "seconds" in row for key in ("computed_gib", "measured_gib")]
    memory.plot([min(both), max(both)], [min(both), max(both)], "--", color="0.6", label="equal")
    memory.set(xscale="log", yscale="log", xlabel="computed memory, GiB", ylabel="measured peak, GiB")
    for panel in (cost, memory):
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    base = result["base"]
    about = f"round {base['depth']} x {base['width']}, {base['tokens']} tokens, batch {base['batch']}; {result.get('precision', 'bf16')}, eager"
    figure.suptitle(f"{result['device']}: {about}", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scale.json"), help="results (default scale.json)")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--base", help="another base model, as JSON: width, depth, tokens, batch")
    parser.add_argument("--axes", help="other points, as JSON: {quantity: [values]}")
    parser.add_argument("--paths", action="store_true", help="measure both paths, with and without checkpointing, and nothing else")
    parser.add_argument("--fits-only", action="store_true", help="only compute the table of what fits")
    parser.add_argument("--no-fits", action="store_true", help="leave that table out")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(json.loads(args.point))))
        return
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -c constraints.txt -e '.[dev]'")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # before the measuring, not after it
    device = best_device()
    kind = "cuda" if device.type == "cuda" else "cpu"
    base, axes = json.loads(args.base) if args.base else BASE[kind], json.loads(args.axes) if args.axes else AXES[kind]
    result: dict[str, Any] = {
        "machine": machine(),
        "device": device_name(device),
        "base": base,
        "command": " ".join(["python", "benchmarks/scale.py", *sys.argv[1:]]),
    }
    if args.paths:
        cases = [PATHS[kind] | {"tokens": n, "pixels": p, "checkpointing": c} for n in (64, 256, 1024) for p in (0, 1) for c in (0, 1)]
        with tqdm(total=len(cases), unit="point", leave=False) as bar:
            result = {name: value for name, value in result.items() if name != "base"} | {"paths": [_told(bar, case) for case in cases]}
    elif not args.fits_only:
        config, description = prepare(base)
        resolved = config.model.resolve("vae", description.codec.shape)
        computes = precision.resolved(config.train.precision, device)
        ceilings = matrix_ceilings(computes, resolved, base["tokens"] * base["batch"], device)
        result["ceiling_tflops"] = max(value for name, value in ceilings.items() if name.startswith(computes))
        result["precision"], result["axes"] = computes, {}
        with tqdm(total=sum(map(len, axes.values())), unit="point", leave=False) as bar:
            for axis, values in axes.items():
                result["axes"][axis] = [_told(bar, base | {axis: value}) for value in values]
                write_text(args.out, json.dumps(result, indent=1) + "\n")
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    if args.plot and "axes" in result:
        plot(result, args.plot)
    if not args.no_fits and not args.paths:
        result["fits"] = fits([64, 256, 1024])
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps({"out": str(args.out), "plot": str(args.plot) if args.plot else None}))


def _told(bar: Any, point: Point) -> dict[str, Any]:
    bar.set_description(", ".join(f"{name} {value}" for name, value in point.items()))
    row = in_its_own_process(point)
    bar.update()
    return row


if __name__ == "__main__":
    main()
