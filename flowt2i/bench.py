"""How fast this machine trains and samples a preset, and what share of its matrix-product ceiling that is.

    flowt2i bench --config quickstart
    flowt2i bench --config stability --latents --json

Random data of the preset's shapes stand in for a dataset, so what is measured is the step itself: noise and times, forward, backward,
clipping, optimizer, EMA, as in `training.loop`, without the fetch. A whole accumulated step may take minutes on a CPU; a micro-batch and an
update are therefore timed on their own, and the step is `accumulation x micro-batch + update`.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flowt2i import flow
from flowt2i.config import Config
from flowt2i.description import CodecSpec, DatasetDescription, TextSpec
from flowt2i.model import FlowTransformer, count_parameters, swiglu_hidden
from flowt2i.pipeline import Pipeline, build_model
from flowt2i.training import stream
from flowt2i.training.compiling import compile_blocks, will_compile
from flowt2i.training.distributed import accumulation, best_device, peak_memory
from flowt2i.training.ema import EMA
from flowt2i.training.objective import Objective, drop_captions
from flowt2i.training.optim import Optimizer, clip_gradients

VOCABULARY = 1024  # of the stand-in captions; the size hardly matters, an embedding is looked up
FEATURES = 512  # width of the stand-in frozen encoder, T5-small's


def bench(config: Config, text_tokens: int = 16, latents: bool = False, seconds: float = 100) -> dict[str, Any]:
    """Measure a preset on this machine. `seconds` is about how long it may take where the model is small enough for that.

    latents: 8x8x4 latents and 512-wide caption features in place of 64x64 pixels and the built-in encoder.
    Returns images a second in training (effective and micro-batch as configured) and in sampling (guidance, solver and steps as configured),
    the parts of a step of one micro-batch in milliseconds, TFLOP/s of the model and of bare matrix products here, peak memory in GiB.
    Rates are those of the fastest of several runs; their order is what to trust where other programs share the machine.
    """
    started = time.perf_counter()
    device = best_device()
    description = describe(text_tokens, latents)
    batch = config.data.batch_size
    micro, _ = accumulation(batch, config.train.micro_batch, 1)
    config.model.resolve(description.codec.kind, description.codec.shape)  # sizes that do not divide are refused before anything is measured
    with tqdm(total=5, desc="matrix products", unit="part", file=sys.stderr, leave=False) as bar:
        ceilings = matrix_ceilings(config, description, micro, device)
        advance(bar, "counting operations")
        step = BareStep(config, description, device)
        flops = count_flops(step, micro)
        compiled = will_compile(config.train, device)
        advance(bar, f"training, micro-batch {micro}{' (compiling first)' if compiled else ''}")
        if compiled:
            compile_blocks(step.model)
        begun = time.perf_counter()
        parts, update = step.parts(micro), step.update_seconds()
        cost = time.perf_counter() - begun
        memory = peak_memory(device)
        rate = batch / (batch // micro * step.micro_seconds(micro) + update)
        advance(bar, "sampling")
        samples_per_s, sampling = sampling_rate(config, description, step.ema.model if step.ema else step.model, micro, seconds / 8)
        advance(bar, "other micro-batches")
        rates = {micro: rate}
        for other in [size for size in (micro // 2, micro * 2, micro // 4) if size and size <= batch and batch % size == 0]:
            if time.perf_counter() - started + 1.2 * cost * max(1, other / micro) > seconds:
                break
            bar.set_description(f"training, micro-batch {other}")
            rates[other] = batch / (batch // other * step.micro_seconds(other) + update)
        ceilings = {name: max(value, again) for (name, value), again in zip(ceilings.items(), matrix_ceilings(config, description, micro, device).values())}
        advance(bar, "done")

    ceiling = max(value for name, value in ceilings.items() if name.startswith(config.train.precision))
    model_tflops = rate * flops / 1e12
    fastest = max(rates, key=rates.__getitem__)
    result: dict[str, Any] = {
        "preset": config.preset, "device": device_name(device), "threads": torch.get_num_threads(), "precision": config.train.precision, "compiled": compiled,
        "parameters": count_parameters(step.model)["total"], "batch": batch, "micro_batch": micro, "text_tokens": text_tokens,
        "train_images_per_s": round(rate, 2), "sample_images_per_s": round(samples_per_s, 3), "sampling": sampling,
        "milliseconds": {name: round(1000 * value, 2) for name, value in parts.items()},
        "gflop_per_image": round(flops / 1e9, 3), "model_tflops": round(model_tflops, 4), "ceiling_tflops": round(ceiling, 4),
        "share_of_ceiling": round(model_tflops / ceiling, 4), "ceilings": {name: round(value, 4) for name, value in ceilings.items()},
        "micro_batches": {str(size): round(value, 2) for size, value in sorted(rates.items())}, "fastest_micro_batch": fastest,
        "peak_memory_gib": round(memory, 2), "peers": {}, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    return result | {"verdict": verdict(result)}


def advance(bar: Any, text: str) -> None:
    bar.update()
    bar.set_description(text)


def verdict(result: dict[str, Any]) -> str:
    """The result in one sentence."""
    parts = result["milliseconds"]
    slowest = max(parts, key=parts.__getitem__)
    fastest = result["fastest_micro_batch"]
    gain = result["micro_batches"][str(fastest)] / result["train_images_per_s"] - 1
    advice = f"; --train.micro_batch {fastest} would be {gain:.0%} faster" if gain > 0.03 else ""
    how = f"{result['precision']}{', compiled' if result['compiled'] else ''}, micro-batch {result['micro_batch']}, {result['peak_memory_gib']:.1f} GiB"
    training = f"training {result['train_images_per_s']:.4g} images/s ({how})"
    share = f"{result['model_tflops']:.3g} TFLOP/s or {result['share_of_ceiling']:.0%} of the {result['ceiling_tflops']:.3g} of bare matrix products here"
    settings = f"{result['sampling']['steps']} {result['sampling']['solver']} steps, guidance {result['sampling']['guidance']:g}"
    sampling = f"sampling {result['sample_images_per_s']:.3g} images/s ({settings})"
    model = f"{result['preset']} ({result['parameters'] / 1e6:.1f}M parameters)"
    return f"{model} on {result['device']}: {training}, {share}, most time in {slowest}; {sampling}{advice}"


def describe(text_tokens: int, latents: bool) -> DatasetDescription:
    """A description of stand-in data: captions of `text_tokens` tokens, all of them real."""
    codec = CodecSpec(kind="vae", id="stand-in", shape=(4, 8, 8)) if latents else CodecSpec(kind="pixels")
    channels = codec.shape[0]
    text = TextSpec(kind="hf" if latents else "builtin", dim=FEATURES if latents else 0, vocab_size=VOCABULARY, max_tokens=text_tokens, null_tokens=(1,))
    return DatasetDescription(codec=codec, text=text, latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels, train_count=1, heldout_count=0,
                              heldout_fraction=0, longest_caption=text_tokens)  # fmt: skip


class BareStep:
    """Model, optimizer and EMA of a training, fed with random data."""

    def __init__(self, config: Config, description: DatasetDescription, device: torch.device):
        self.config, self.description, self.device = config, description, device
        torch.manual_seed(config.train.seed)
        self.model: FlowTransformer = build_model(config, description).to(device)
        self.ema = EMA(self.model, config.train.ema) if config.train.ema else None
        self.optimizer = Optimizer(config.optim, self.model)
        self.objective = Objective(self.model, config.flow, config.train.precision)

    def inputs(self, images: int) -> tuple[Tensor, ...]:
        """Noise, times and captions of a micro-batch, as `Objective` takes them."""
        config, text = self.config, self.description.text
        draw = stream.draw(config.train.seed, 0, images, self.description.codec.shape, config.flow.caption_dropout, False, self.device)
        f = config.flow
        t = flow.times(draw.uniform, draw.choice, f.times, f.logit_mean, f.logit_std, f.uniform_share, f.time_shift)
        captions = self.captions(images)
        mask = torch.ones(images, text.max_tokens, dtype=torch.bool, device=self.device)
        captions, mask = drop_captions(captions, mask, draw.dropped, captions[0, :1])
        return draw.noise.flip(0), draw.noise, t, captions, mask

    def captions(self, images: int) -> Tensor:
        """Token ids [B, T], or features [B, T, D] of a frozen encoder in the type in which training holds them."""
        text = self.description.text
        if text.dim:
            return torch.randn(images, text.max_tokens, text.dim, device=self.device, dtype=torch.bfloat16)
        return torch.randint(2, text.vocab_size, (images, text.max_tokens), device=self.device)

    def loss(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.objective(*inputs).losses.mean()

    def clip(self) -> float:
        return clip_gradients(self.model, self.config.optim.clip).item()  # .item(): training looks whether the norm is finite

    def micro_step(self, images: int) -> None:
        self.loss(self.inputs(images)).backward()

    def update(self) -> None:
        self.clip()
        self.optimizer.step(1e-6)
        if self.ema:
            self.ema.update()

    def micro_seconds(self, images: int) -> float:
        """Seconds a micro-batch takes, compiled for its own size as in a training, which only ever sees one."""
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            return fastest_of(lambda: self.micro_step(images), self.device)

    def update_seconds(self) -> float:
        """Seconds of clipping, optimizer and EMA: once a step, however many micro-batches it has."""
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return fastest_of(self.update, self.device)

    def parts(self, images: int) -> dict[str, float]:
        """Seconds of each part of a step of one micro-batch, waiting for the device after each: the median of three after a warm-up."""
        rounds: list[dict[str, float]] = []
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            for _ in range(4):
                marks = [clock(self.device)]
                inputs = self.inputs(images)
                marks.append(clock(self.device))
                loss = self.loss(inputs)
                marks.append(clock(self.device))
                loss.backward()
                marks.append(clock(self.device))
                self.clip()
                self.optimizer.step(1e-6)
                self.optimizer.zero_grad()
                marks.append(clock(self.device))
                if self.ema:
                    self.ema.update()
                marks.append(clock(self.device))
                rounds.append({name: b - a for name, a, b in zip(("noise", "forward", "backward", "optimizer", "ema"), marks, marks[1:])})
        return {name: statistics.median(r[name] for r in rounds[1:]) for name in rounds[0]}


def count_flops(step: BareStep, images: int) -> float:
    """Operations of an image's forward and backward pass (a multiply-add is two), counted by PyTorch over matrix products and attention."""
    few = min(images, 4)
    with FlopCounterMode(display=False) as counter:
        step.micro_step(few)
    step.optimizer.zero_grad()
    return counter.get_total_flops() / few


def matrix_ceilings(config: Config, description: DatasetDescription, micro: int, device: torch.device) -> dict[str, float]:
    """TFLOP/s of bare matrix products: "fp32 NxNxN" and "bf16 NxNxN" at a large size, and in the preset's precision the model's own sizes."""
    large = 8192 if device.type == "cuda" else 2048
    model = config.model.resolve(description.codec.kind, description.codec.shape)
    rows = micro * (description.codec.shape[1] // model.patch) * (description.codec.shape[2] // model.patch)
    hidden = 2 * swiglu_hidden(model.width, model.mlp_ratio) if model.block == "modern" else int(model.width * model.mlp_ratio)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    sizes = [("fp32", large, large, large), ("bf16", large, large, large)]
    sizes += [(config.train.precision, rows, model.width, 3 * model.width), (config.train.precision, rows, model.width, hidden)]
    return {f"{name} {n}x{k}x{m}": matrix_rate(n, k, m, types[name], device) for name, n, k, m in sizes}


def matrix_rate(n: int, k: int, m: int, dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of `[n, k] @ [k, m]`, the fastest of several."""
    a, b = torch.randn(n, k, device=device).to(dtype), torch.randn(k, m, device=device).to(dtype)
    return 2 * n * k * m / fastest_of(lambda: a @ b, device, least=5) / 1e12


def sampling_rate(config: Config, description: DatasetDescription, model: FlowTransformer, images: int, seconds: float) -> tuple[float, dict[str, Any]]:
    """Images a second of `Pipeline.sample` with the preset's solver, steps and guidance; and these settings.

    Where all steps would take more than `seconds`, fewer are timed, and the rate is that of the steps alone. A latent's decoding and
    the frozen text encoder are left out.
    """
    images = min(images, 64)
    pipeline = StandInPipeline(model.eval(), config, description)
    wanted = pipeline.settings()  # written times say how many steps there are
    draw = lambda steps: pipeline.sample(["stand-in"], num=images, steps=steps).seconds
    draw(1)
    steps = max(1, min(wanted["steps"], int(seconds / draw(1))))
    each = draw(steps) / steps
    model.train()
    told = {name: wanted[name] for name in ("steps", "solver", "guidance")}
    return images / (each * wanted["steps"]), told | {"batch": images, "timed_steps": steps}


class StandInPipeline(Pipeline):
    """A pipeline whose captions are random features or ids, and which leaves latents undecoded."""

    def __init__(self, model: FlowTransformer, config: Config, description: DatasetDescription):
        super().__init__(model, config, description, tokenizer=None)  # type: ignore[arg-type]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        text = self.description.text
        mask = torch.ones(len(captions), text.max_tokens, dtype=torch.bool, device=self.device)
        if text.dim:
            return torch.randn(*mask.shape, text.dim, device=self.device), mask
        return self.model.encode_captions(torch.full(mask.shape, 2, device=self.device), mask), mask

    def to_images(self, z: Tensor) -> Any:
        return z[:, :3].clamp(-1, 1).permute(0, 2, 3, 1).float().cpu().numpy()


def clock(device: torch.device) -> float:
    """Seconds now, all work on the device done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def fastest_of(work: Callable[[], Any], device: torch.device, least: int = 3, seconds: float = 1.5) -> float:
    """Seconds of the fastest of at least `least` runs within about `seconds`, after one to warm up: what else the machine does only slows it."""
    work()
    begun = clock(device)
    times: list[float] = []
    while len(times) < least or clock(device) - begun < seconds:
        a = clock(device)
        work()
        times.append(clock(device) - a)
    return min(times)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} {platform.machine()} CPU cores" if device.type == "cpu" else device.type
