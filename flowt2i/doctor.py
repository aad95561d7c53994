"""What a machine has and lacks for training, and what a run will take: each finding a line, each fault with what to do.

    flowt2i doctor
    flowt2i doctor --config stability --data data/mine --out runs/mine

With a configuration and data, three steps of one micro-batch are really trained in a temporary folder beside the run, a checkpoint is written
and read back, a picture drawn from it; memory, hours and disk follow from these.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flowt2i import __version__, shapes
from flowt2i.codec import codec_from_spec
from flowt2i.config import Config
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.human import duration, size
from flowt2i.precision import has_bf16
from flowt2i.text import load_encoder, load_tokenizer
from flowt2i.training import checkpoint, dryrun, pace
from flowt2i.training.compiling import has_compiler, will_compile
from flowt2i.training.distributed import accumulation, best_device
from flowt2i.training.tracking import read_log

# As pyproject.toml asks for; below torch 2.10, gradio 6.20 and Pillow 12.3 there are published security advisories.
FLOORS = {
    "torch": "2.10", "numpy": "2.0", "pillow": "12.3", "pydantic": "2.10", "safetensors": "0.5", "tokenizers": "0.22", "pyarrow": "20",
    "transformers": "5.0", "diffusers": "0.35", "datasets": "4.0",
}  # fmt: skip
OPTIONAL = {"gradio": ("6.20", "demo"), "wandb": ("0.20", "track"), "tensorboard": ("2.18", "track")}  # name: (floor, extra)
SHOWN = ("torch", "pillow")  # the others only where something is wrong with them
ESCAPE = "\033"
SIGNS = {"good": "✓", "fault": "✗", "note": "!"}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    what: str
    mark: Literal["good", "fault", "note"]
    found: str
    advice: str = ""


def examine(config: Config | None, data: Path | None, run: Path, codec: str | None = None, text: str | None = None) -> dict[str, Any]:
    """All findings, `ok` (nothing would stop a run), and with configuration and data `expected` (seconds, memory, disk)."""
    with offline(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings = [*versions(), *machine(config.train.precision if config else "auto"), disk(run)]
        expected: dict[str, Any] | None = None
        sound = True
        if data:
            of_data = list(dataset(data, codec, text))
            findings += of_data
            sound = all(f.mark != "fault" for f in of_data)
        findings.append(network(config))
        if config and data and sound:
            tried, expected = trial(config, data, run, codec, text)
            findings += tried
        elif not (config and data) and (config or data):
            findings.append(Finding("training", "note", "not tried", "give --config and --data both: a real step, checkpoint and picture, and hours to expect"))
    result = {"ok": all(f.mark != "fault" for f in findings), "version": __version__, "findings": [asdict(f) for f in findings]}
    return result | ({"expected": expected} if expected else {})


def report(result: dict[str, Any]) -> str:
    """The findings as a table and a verdict; in colour on a terminal."""
    width = max(len(f["what"]) for f in result["findings"])
    colours = {"good": "32", "fault": "31", "note": "33"} if sys.stdout.isatty() and "NO_COLOR" not in os.environ else {}
    lines = [f"flowt2i {result['version']}", ""]
    for f in result["findings"]:
        sign, colour = SIGNS[f["mark"]], colours.get(f["mark"])
        lines.append(f"  {f'{ESCAPE}[{colour}m{sign}{ESCAPE}[0m' if colour else sign} {f['what']:<{width}}  {f['found']}")
        if f["advice"]:
            lines.append(f"    {'':<{width}}  → {f['advice']}")
    faults = sum(f["mark"] == "fault" for f in result["findings"])
    return "\n".join([*lines, "", f"{faults} thing(s) would stop a run: see ✗" if faults else "nothing here would stop a run"])


# ---- the machine ------------------------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Python, and every package below the version that this project needs."""
    modern = sys.version_info >= (3, 11)
    yield Finding("python", "good" if modern else "fault", platform.python_version(), "" if modern else "install 3.11 or newer")
    for name, floor in FLOORS.items():
        have = installed(name)
        if have is None or older(have, floor):
            yield Finding(name, "fault", f"{have or 'not installed'}; {floor} or newer is needed", f"pip install -U '{name}>={floor}'")
        elif name in SHOWN:
            yield Finding(name, "good", have)
    for name, (floor, extra) in OPTIONAL.items():
        have = installed(name)
        if have is None:
            yield Finding(name, "note", f"not installed: only `{extra}` needs it", f"pip install -c constraints.txt -e '.[{extra}]'")
        elif older(have, floor):
            yield Finding(name, "note", f"{have}; {floor} or newer is needed before it is used", f"pip install -U '{name}>={floor}'")
        elif name == "gradio":
            yield Finding(name, "good", have)


def machine(precision: str = "auto") -> Iterator[Finding]:
    """Device, precision, processors, memory, compiler. precision: what the configuration asks for."""
    device = best_device()
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            what = f"GPU {number}"
            busy = free < 0.8 * total
            yield Finding(what, "note" if busy else "good", f"{torch.cuda.get_device_name(number)}, {size(free)} of {size(total)} free",
                          "another program uses it: see nvidia-smi" if busy else "")  # fmt: skip
        if torch.cuda.device_count() > 1:
            yield Finding("GPUs", "good", f"{torch.cuda.device_count()}: torchrun --nproc-per-node {torch.cuda.device_count()} train.py … uses all")
    elif shutil.which("nvidia-smi"):
        found = f"{device.type}: there is an NVIDIA GPU, but this torch ({torch.__version__}) cannot use it"
        yield Finding("device", "note", found, "pip install torch with CUDA, or mend the driver")
    else:
        yield Finding("device", "good", device.type)
    yield bf16(device, precision)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    few = device.type == "cpu" and threads < cores
    yield Finding("cores", "note" if few else "good", f"{cores}, torch uses {threads}", f"OMP_NUM_THREADS={cores} would use all" if few else "")
    yield Finding("memory", "good", f"{size(main_memory())}")
    if has_compiler():
        yield Finding("compiler", "good", "found: torch.compile works where a run is long enough to pay for it")
    else:
        yield Finding("compiler", "note", "none: training runs uncompiled, and slower", "apt install g++ python3-dev, or what your system calls them")


def bf16(device: torch.device, precision: str = "auto") -> Finding:
    """A product in bf16 forward and backward, as training does it."""
    try:
        x = torch.ones(64, 64, device=device, requires_grad=True)
        with torch.autocast(device.type, torch.bfloat16):
            y = x @ x
        y.float().sum().backward()
        if y.dtype == torch.bfloat16 and x.grad is not None and bool((x.grad == 128).all()):
            if not has_bf16(device.type):
                lacking = f"{device.type} has no units for it: fp32 is faster here, and what train.precision auto takes"
                return Finding("bf16", "note", lacking, "this run asks for bf16: --train.precision auto" if precision == "bf16" else "")
            return Finding("bf16", "good", f"tried on {device.type}: right")
        return Finding("bf16", "fault", f"tried on {device.type}: wrong results", "--train.precision fp32")
    except (RuntimeError, TypeError) as error:
        return Finding("bf16", "fault", f"tried on {device.type}: {first_line(error)}", "--train.precision fp32")


def main_memory() -> int:
    """Bytes of main memory that this process may use: a container's limit counts."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def disk(run: Path) -> Finding:
    """Free space where the run will lie."""
    place = existing(run)
    usage = shutil.disk_usage(place)
    if not os.access(place, os.W_OK):
        return Finding("disk", "fault", f"{place} cannot be written", "choose another --out")
    low = usage.free < 1 << 30
    found = f"{size(usage.free)} of {size(usage.total)} free in {place.resolve()}"
    return Finding("disk", "note" if low else "good", found, "free some" if low else "")


def network(config: Config | None) -> Finding:
    """What would be fetched or sent while training."""
    if config and config.track.use_wandb and config.track.wandb_mode == "online":
        return Finding("network", "note", "Weights & Biases is sent what is logged", "--track.wandb_mode offline needs none")
    return Finding("network", "good", "none needed for training: codec and text encoder are read from this machine")


# ---- the data ---------------------------------------------------------------------------------------------------------


def dataset(data: Path, codec: str | None, text: str | None) -> Iterator[Finding]:
    """The folder, its codec and its text encoder, read without a network."""
    try:
        description = DatasetDescription.load(data)
        for split in ("train", *(["heldout"] if description.heldout_count else [])):
            samples = ImageTextDataset(data, split)
            for number in (0, len(samples) - 1):
                samples.fetch([number])
        pixels = ", ".join(map(shapes.name, description.sizes))
        yield Finding("data", "good", f"{data}: {description.train_count:,} images {pixels} to train on, {description.heldout_count:,} held out")
    except (UserError, OSError, ValueError) as error:
        yield Finding("data", "fault", first_line(error))
        return
    try:
        net = codec_from_spec(description.codec, codec)
        net.decode(torch.zeros(1, *description.codec.shape))
        yield Finding("codec", "good", f"{description.codec.id}: loads offline, decodes")
    except UserError as error:
        yield Finding("codec", "fault", first_line(error), "" if codec else "--codec FOLDER, where it moved")
    try:
        load_tokenizer(description.text, data)
        if description.text.kind == "hf":
            load_encoder(description.text, id=text)
        yield Finding("text encoder", "good", f"{description.text.id}{': loads offline' if description.text.kind == 'hf' else ': trained along'}")
    except UserError as error:
        yield Finding("text encoder", "fault", first_line(error), "" if text else "--text FOLDER, where it moved")


# ---- a run ------------------------------------------------------------------------------------------------------------


def trial(config: Config, data: Path, run: Path, codec: str | None, text: str | None) -> tuple[list[Finding], dict[str, Any] | None]:
    """Train a little, save, read back, draw; then what the whole run will take."""
    from flowt2i.pipeline import Pipeline
    from flowt2i.training.loop import Stopped, train

    try:
        micro, accumulate = accumulation(config.data.batch_size, config.train.micro_batch, 1)
        folder = tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing(run))
    except (UserError, OSError) as error:
        return [Finding("training", "fault", first_line(error))], None
    with folder as name:
        place = Path(name, "run")
        try:
            summary = train(few_steps(config, micro), data, place, progress=False, codec=codec, text=text)
        except Stopped as error:
            raise KeyboardInterrupt from error
        except torch.OutOfMemoryError:
            smaller = f"--train.micro_batch {max(1, micro // 2)}: the same batch in more parts"
            return [Finding("training", "fault", f"out of memory with {micro} images at a time", smaller)], None
        except (UserError, RuntimeError) as error:
            return [Finding("training", "fault", first_line(error))], None
        fitted = json.loads((place / "config.json").read_text())["resolved"]["micro_batch"]
        findings = [Finding("training", "good", f"{summary['step']} steps of {fitted} images at a time: loss and gradients are finite")]
        if fitted < micro:
            told = f"{micro} images at a time do not fit: a run goes on with {fitted}"
            findings.append(Finding("micro-batch", "note", told, f"--train.micro_batch {fitted} says so from the start"))
        try:
            written = checkpoint.total_bytes(place / "checkpoints")
            Pipeline.from_pretrained(place, codec=codec, text=text).sample(["a picture"], steps=1)
            findings.append(Finding("checkpoint", "good", f"{size(written)}: written, checksums right, read back"))
            findings.append(Finding("sample", "good", "a picture drawn from that checkpoint"))
        except UserError as error:
            return [*findings, Finding("checkpoint", "fault", first_line(error))], None
        rates = [line["images_per_s"] for line in read_log(place / "log.jsonl")]
    expected = expectation(config, DatasetDescription.load(data), micro / max(rates[1:]) * accumulate, written, summary["peak_memory_gib"])
    return [*findings, *judge(config, expected, run)], expected


def few_steps(config: Config, micro: int) -> Config:
    """Three steps of one micro-batch of this configuration, compiled as the run itself will be."""
    few = config.model_copy(deep=True)
    few.data.batch_size, few.train.micro_batch = micro, 0
    few.train.compile = "on" if will_compile(config.train, best_device()) else "off"
    few.train.steps, few.train.minutes, few.train.log_every, few.train.checkpoint_every = 3, 0.0, 1, 3
    few.train.stop_after, few.train.dry_run = "", False  # this is one itself
    few.train.eval_every, few.train.eval_images, few.train.score_prompts, few.train.score_images = 0, 1, 0, 0
    few.sample.steps, few.sample.images = 1, 1
    few.track.use_wandb = few.track.tensorboard = False
    return few


def expectation(config: Config, description: DatasetDescription, per_step: float, each: int, memory: float) -> dict[str, Any]:
    """What the run will take, from a measured step and checkpoint. `steps` and `seconds` (of training alone) are None where no end is set."""
    minutes = config.train.minutes
    steps = int(minutes * 60 / per_step) if minutes else config.train.steps
    at_once, for_good = dryrun.checkpoints_kept(config.train, steps)
    evaluations = pace.expected(config, description, per_step, steps or 1000)
    return {
        "seconds_per_step": per_step, "steps": steps or None, "seconds": minutes * 60 if minutes else steps * per_step or None, "memory_gib": memory,
        "evaluations": evaluations.number, "seconds_per_evaluation": evaluations.each,
        "checkpoint_bytes": each, "checkpoints_at_once": at_once, "checkpoints_for_good": for_good, "disk_bytes": each * (at_once + for_good),
    }  # fmt: skip


def judge(config: Config, expected: dict[str, Any], run: Path) -> Iterator[Finding]:
    """The expectation in words, and whether memory and disk suffice."""
    time = f"about {duration(expected['seconds'])}" if expected["seconds"] else "until stopped"
    steps = f"{expected['steps']:,} steps" if expected["steps"] else "any number of steps"
    evaluations = pace.Expected(expected["evaluations"], expected["seconds_per_evaluation"]).text + ("" if expected["steps"] else " in 1,000 steps")
    told = f"{time} for {steps} at {expected['seconds_per_step']:.3g} s, on one {best_device().type} process; besides {evaluations}"
    yield Finding("time", "good", told)
    have = torch.cuda.mem_get_info()[1] if best_device().type == "cuda" else main_memory()
    tight = expected["memory_gib"] * (1 << 30) > 0.9 * have
    found = f"{expected['memory_gib']:.1f} GiB of {size(have)}"
    yield Finding("needs memory", "note" if tight else "good", found, "lower --train.micro_batch" if tight else "")
    there = len(checkpoint.list_steps(run))
    free, each = shutil.disk_usage(existing(run)).free, expected["checkpoint_bytes"]
    most = f"{expected['checkpoints_at_once']} at once" + (f" and {expected['checkpoints_for_good']} kept for good" if expected["checkpoints_for_good"] else "")
    found = f"{size(expected['disk_bytes'])} for checkpoints ({most}, {size(each)} each), {size(free)} free"
    space = dryrun.Space(each, expected["checkpoints_at_once"], expected["checkpoints_for_good"])
    if free < space.now(there):
        yield Finding("needs disk", "fault", found, "free some, lower --train.keep_recent, or choose another --out")
    elif free < space.total - there * each:
        yield Finding("needs disk", "note", f"{found}: full before the end", "raise --train.keep_every, lower --train.keep_recent, or free some")
    else:
        yield Finding("needs disk", "good", found)


# ---- small things -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No call of the Hugging Face libraries reaches for the network meanwhile."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def older(have: str, floor: str) -> bool:
    """Whether a version is below a floor; what follows the numbers (`+cpu`, `rc1`) does not count."""
    numbers = lambda version: [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0])]
    return numbers(have) < numbers(floor)


def existing(path: Path) -> Path:
    """The nearest folder above a path that is there already."""
    return next(p for p in (path.absolute().parents if not path.is_dir() else [path.absolute()]) if p.is_dir())


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
