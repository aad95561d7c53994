"""How fast this machine trains and samples a preset, and what share of its matrix-product ceiling that is.

    flowt2i bench --config quickstart
    flowt2i bench --config stability --json

Without a dataset the built-in scenes are prepared in a temporary folder. The bare step is measured on random images under captions as long as those of
the data: noise and times, forward, backward, clipping, optimizer, EMA, as in `training.loop`. A whole accumulated step may take minutes on a
CPU; a micro-batch and an update are therefore timed on their own, and the step is `accumulation x micro-batch + update`. Then a real training shows what
the loop adds.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flowt2i import precision
from flowt2i.bench.ceiling import matrix_ceilings
from flowt2i.bench.data import generated
from flowt2i.bench.loop import loop_rate
from flowt2i.bench.micro_batches import largest, rates
from flowt2i.bench.sampling import sampling_rates
from flowt2i.bench.step import BareStep, describe
from flowt2i.bench.timing import Budget, device_name, machine
from flowt2i.bench.verdict import verdict
from flowt2i.config import Config
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.errors import UserError
from flowt2i.flops import training_flop
from flowt2i.model import count_parameters
from flowt2i.training.compiling import compile_training, will_compile
from flowt2i.training.distributed import accumulation, best_device, peak_memory

SHARES = {"data": 4, "ceiling": 5, "step": 35, "sampling": 14, "loop": 30, "micro-batches": 12}  # of the time, about: for the bar


def bench(config: Config, data: Path | None = None, latents: bool = False, text_tokens: int = 0, seconds: float = 80) -> dict[str, Any]:
    """Measure a preset on this machine. `seconds` is about how long it may take where the model is small enough for that.

    data: a prepared dataset, else scenes are prepared (latents: with stand-ins for the VAE and T5). text_tokens: every caption so long, and no dataset:
    then there is no loop to measure.
    Rates of the step are those of the fastest of several runs; their order is what to trust where other programs share the machine. The loop and the bare
    step that it is compared with are means over the same number of seconds, one after the other.
    UserError where nothing fits into memory, or the data cannot be used.
    """
    given = ImageTextDataset(data) if data else None
    codec = given.description.codec if given else describe(latents, 1).codec
    if config.match.weight:
        raise UserError("a step with match.weight is not timed here: leave it out")
    config.model.resolve(codec.kind, codec.shape)  # what cannot be is refused before anything is measured
    with tempfile.TemporaryDirectory(prefix="flowt2i-bench-") as folder, tqdm(total=sum(SHARES.values()), file=sys.stderr, leave=False) as bar:
        return _bench(config, given, Path(folder), latents, text_tokens, Budget(seconds), bar)


def _bench(
    config: Config, dataset: ImageTextDataset | None, folder: Path, latents: bool, text_tokens: int, budget: Budget, bar: Any
) -> dict[str, Any]:  # fmt: skip
    device = best_device()
    batch = config.data.batch_size
    micro, _ = accumulation(batch, config.train.micro_batch, 1)

    bar.set_description("data")
    if text_tokens:
        description, lengths = describe(latents, text_tokens), np.array([text_tokens])
    else:
        dataset = dataset or ImageTextDataset(generated(folder, latents))
        description, lengths = dataset.description, dataset.token_lengths()
    model = config.model.resolve(description.codec.kind, description.codec.shape)
    _advance(bar, "data", "matrix products")

    rows = micro * (description.codec.shape[1] // model.patch) * (description.codec.shape[2] // model.patch)
    computes = precision.resolved(config.train.precision, device)
    ceilings = matrix_ceilings(computes, model, rows, device, budget.share(0.05))
    compiled = will_compile(config.train, device)
    _advance(bar, "ceiling", f"training, micro-batch {micro}{' (compiling first)' if compiled else ''}")

    step = BareStep(config, description, lengths, device, compiled)
    fits, how = largest(step, batch)
    asked, micro = micro, min(micro, fits)
    if micro < asked:
        bar.write(f"out of memory with a micro-batch of {asked}: measured at {micro}", file=sys.stderr)
    if compiled:
        compile_training(step.objective)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = budget.spent
    parts, update = step.parts(micro, dataset), step.update_seconds()
    micro_seconds = step.micro_seconds(micro)
    cost = budget.spent - began
    memory = peak_memory(device)
    _advance(bar, "step", "sampling")

    sampling = sampling_rates(step.ema.model if step.ema else step.model, config, description, min(micro, 64), budget.share(0.14))
    _advance(bar, "sampling", "a real training")

    whole_step = batch // micro * micro_seconds + update
    loop, why = _loop(config, dataset, step, micro, whole_step, compiled, budget)
    _advance(bar, "loop", "other micro-batches")

    micro_batches = {micro: batch / whole_step} | rates(step, batch, micro, fits, update, cost, budget, bar)
    again = matrix_ceilings(computes, model, rows, device, budget.share(0.03))
    ceilings = {name: max(value, again.get(name, 0.0)) for name, value in ceilings.items()}
    _advance(bar, "micro-batches", "done")

    flop = training_flop(model, description.codec.shape, lengths.tolist(), description.text.dim)
    rate = batch / whole_step
    ceiling = max(value for name, value in ceilings.items() if name.startswith(computes))
    model_tflops = rate * flop["total"] / 1e12
    result: dict[str, Any] = {
        "preset": config.preset, "device": device_name(device), "machine": machine(), "precision": computes, "compiled": compiled,
        "parameters": count_parameters(step.model)["total"], "batch": batch, "micro_batch": micro, "text_tokens": round(float(lengths.mean()), 2),
        "train_images_per_s": round(rate, 2), "sample_images_per_s": sampling["images_per_s"], "sampling": sampling,
        "milliseconds": {name: round(1000 * value, 3) for name, value in parts.items()}, "loop": loop, "loop_why": why,
        "gflop_per_image": round(flop["total"] / 1e9, 3), "gflop_by_part": {name: round(value / 1e9, 4) for name, value in flop.items() if name != "total"},
        "model_tflops": round(model_tflops, 4), "ceiling_tflops": round(ceiling, 4),
        "share_of_ceiling": round(model_tflops / ceiling, 4), "ceilings": {name: round(value, 4) for name, value in ceilings.items()},
        "micro_batches": {str(size): round(value, 2) for size, value in sorted(micro_batches.items())},
        "fastest_micro_batch": max(micro_batches, key=micro_batches.__getitem__), "largest_micro_batch": fits, "largest_how": how,
        "peak_memory_gib": round(memory, 2), "peers": {}, "seconds": round(budget.spent, 1),
    }  # fmt: skip
    return result | {"verdict": verdict(result)}


def _loop(
    config: Config, dataset: ImageTextDataset | None, step: BareStep, micro: int, step_seconds: float, compiled: bool, budget: Budget
) -> tuple[dict[str, Any] | None, str]:  # fmt: skip
    """What a real training reaches beside the bare step, or why it was not measured. Where a whole step is too long here, one micro-batch stands for it."""
    if dataset is None:
        return None, "--text-tokens leaves no dataset to train on"
    seconds = budget.share(0.1)
    batch, short = config.data.batch_size, step_seconds
    if 3 * step_seconds > seconds:
        batch, short = micro, step_seconds * micro / batch
    if 3 * short > 2 * seconds:
        return None, f"a micro-batch takes {short:.2g} s here: give it more time with --seconds"
    config = config.model_copy(deep=True)
    config.data.batch_size, config.train.micro_batch = batch, micro
    bare = step.step_seconds(micro, batch // micro, seconds / 2)
    try:
        loop = loop_rate(config, dataset.folder, compiled, seconds)
    except UserError as error:
        return None, str(error)
    bare = (bare + step.step_seconds(micro, batch // micro, seconds / 2)) / 2
    stall = loop["checkpoint_s"]
    share = stall / (config.train.checkpoint_every * step_seconds + stall)
    return loop | {"of_bare_step": round(loop["images_per_s"] * bare / batch, 4), "checkpoint_share": round(share, 5)}, ""


def _advance(bar: Any, done: str, now: str) -> None:
    bar.update(SHARES[done])
    bar.set_description(now)
