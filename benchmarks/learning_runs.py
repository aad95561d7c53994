"""Trainings of a fixed budget with scores along their way: planned once, resumed by asking again, never repeated. What `learning.py` and `size_fit.py` share.

A run has a folder: `plan.json` and `config.json` (what it is, in full; the second as `flowt2i train` gets it), `run/` (its run folder), `starts.json` (the
steps at which a process took it up) and `points.jsonl` (a line a scored checkpoint).
"""

import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ending import Interrupted

from flowt2i import flops
from flowt2i.config import Config, load_config, seconds
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import INTERRUPTED, UserError
from flowt2i.training.compiling import has_compiler
from flowt2i.training.tracking import read_log

Equal = Literal["data", "flops", "time"]
LEAST_HELDOUT = 16  # pictures: below it neither a validation loss by time bin nor a kernel distance says anything
FLOOR = 0.2  # of the validation loss, the same for all: up to t = 0.8 it never acts, so that the loss is the velocity's error for every prediction
COMPARABLE = ("t0.0-0.2", "t0.2-0.4", "t0.4-0.6", "t0.6-0.8")  # the bins that it leaves alone
PROBE = 60  # steps by which a recipe's speed is known
CAPTIONS = 10_000  # whose lengths are looked at for the FLOPs
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


@dataclass(frozen=True)
class Budget:
    """What is equal: images, FLOPs of training, or seconds of training."""

    equal: Equal
    amount: float

    @classmethod
    def parse(cls, equal: Equal, text: str) -> "Budget":
        """`120k` images, `125T` FLOPs, `10m`; UserError otherwise."""
        try:
            if equal == "time":
                amount = seconds(text)
            else:
                number = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+]?\d+)?)([kMGTPE]?)", text)
                amount = float(number[1]) * UNITS[number[2]] if number else 0.0
        except ValueError:
            amount = 0.0
        if not 0 < amount < math.inf:
            example = {"data": "120k (images)", "flops": "125T (1.25e14 FLOPs of training)", "time": "10m"}[equal]
            raise UserError(f"--budget {text!r}: with --equal {equal} give one such as {example}")
        return cls(equal, amount)

    def __str__(self) -> str:
        if self.equal == "time":
            return f"{self.amount:g}s"
        unit = next((unit for unit in reversed(UNITS) if unit and self.amount >= UNITS[unit]), "")
        return f"{self.amount / UNITS[unit]:g}{unit}"


@dataclass(frozen=True)
class Plan:
    """All that decides a run."""

    name: str
    seed: int
    equal: Equal
    budget: float  # of this run: its share is in it
    data: str  # fingerprint
    points: int  # scored checkpoints, at even distances
    steps: int
    flops_per_image: float  # forward and backward
    config: dict[str, Any]

    @property
    def every(self) -> int:
        return self.steps // self.points


@dataclass(frozen=True)
class Scoring:
    """How checkpoints are scored; points that were scored otherwise are scored again."""

    num: int  # pictures at each checkpoint
    final_num: int  # pictures at the last one
    images: int  # held-out images of the validation loss
    reference: str  # real pictures of kernel and Fréchet distance: heldout or train
    draws: bool = True  # False: the loss alone

    def of(self, last: bool) -> dict[str, Any]:
        return {"num": self.final_num if last else self.num, "images": self.images, "reference": self.reference, "draws": self.draws}


# ---- planning ---------------------------------------------------------------------------------------------------------


def described(data: Path) -> DatasetDescription:
    """The data; UserError where too little of it is held out to compare anything on."""
    description = DatasetDescription.load(data)
    if description.heldout_count < LEAST_HELDOUT:
        raise UserError(
            f"{data} is too small: it holds out {description.heldout_count} of {description.train_count + description.heldout_count} images, and a "
            f"comparison needs {LEAST_HELDOUT} or more: prepare more images, or a larger share of them with --heldout"
        )
    return description


def check_scores(description: DatasetDescription, scoring: Scoring) -> None:
    """UserError, before hours of training, for what the scores would lack."""
    from flowt2i.evaluation import nets
    from flowt2i.evaluation.distribution import LEAST_KERNEL

    if scoring.draws and not description.is_scenes:
        if not nets.has_efficientnet():
            raise UserError(f"kernel and Fréchet distance need EfficientNet-lite0: {nets.EFFICIENTNET_INSTALL}")
        if min(scoring.num, scoring.final_num) < LEAST_KERNEL:
            raise UserError(f"a kernel distance needs {LEAST_KERNEL} pictures or more: raise --num")


def training_flops(config: Config, data: Path) -> float:
    """Model FLOPs of an image's forward and backward pass, the mean over the data's captions (of many thousands, some at even distances)."""
    description = DatasetDescription.load(data)
    codec, lengths = description.codec, ImageTextDataset(data, "train").token_lengths()
    some = lengths[:: -(-len(lengths) // CAPTIONS)].tolist()
    return flops.training_flop(config.model.resolve(codec.kind, codec.shape), codec.shape, some, description.text.dim)["total"]


def open_plan(folder: Path, name: str, seed: int, budget: Budget, points: int, config: Config, data: Path) -> Plan:
    """The plan of a run: the one in its folder, where it is of the same budget and recipe (UserError where not), or a new one."""
    if config.flow.perceptual and budget.equal == "flops":
        raise UserError(f"{name} has a perceptual loss, whose network the formula does not count: compare at --equal time or data")
    fingerprint, cost = DatasetDescription.load(data).fingerprint, training_flops(config, data)
    config = config.model_copy(deep=True)
    config.train.seed = seed
    if budget.equal == "time" and config.train.compile == "auto":  # decided here, so that the probe and the run are alike
        config.train.compile = "on" if budget.amount >= 60 and has_compiler() else "off"
    if theirs := read_plan(folder):
        plan = planned(name, seed, budget, points, config, fingerprint, cost, theirs.steps)
        require_same(folder, theirs, plan)
        return plan
    if budget.equal == "time":
        steps = budget.amount / step_seconds(folder, config, budget, data)
    else:
        steps = budget.amount / config.data.batch_size / (cost if budget.equal == "flops" else 1)
    plan = planned(name, seed, budget, points, config, fingerprint, cost, points * max(1, round(steps / points)))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", json.dumps(plan.config, indent=2))
    write_whole(folder / "plan.json", json.dumps({name: value for name, value in asdict(plan).items() if name != "config"}, indent=2))
    return plan


def read_plan(folder: Path) -> Plan | None:
    """The plan that a folder holds; None where it holds none. UserError where it cannot be read."""
    try:
        values = json.loads((folder / "plan.json").read_text())
        return Plan(**values, config=load_config(folder / "config.json").model_dump())  # a setting that came since is as it was before
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}/plan.json cannot be read ({str(error).splitlines()[0]}): remove {folder} to make this run again") from error


def planned(name: str, seed: int, budget: Budget, points: int, config: Config, data: str, cost: float, steps: int) -> Plan:
    """A plan of `steps`: its checkpoints are kept, and nothing is shown along its way that would take time from it."""
    config = config.model_copy(deep=True)
    every = steps // points
    train = config.train
    train.steps, train.minutes, train.checkpoint_every, train.keep_every = steps, 0.0, every, every
    train.eval_every, train.score_prompts, train.score_images = 0, 0, 0
    train.log_every = max(n for n in range(1, min(10, every) + 1) if every % n == 0)
    return Plan(name, seed, budget.equal, budget.amount, data, points, steps, cost, config.model_dump())


def require_same(folder: Path, theirs: Plan, ours: Plan) -> None:
    """UserError naming the first thing in which the run of a folder is another. How its FLOPs are counted is no part of the run."""
    flat = lambda plan: {k: v for k, v in asdict(plan).items() if k not in ("config", "flops_per_image")} | {
        f"{section}.{field}": value
        for section, fields in plan.config.items() if isinstance(fields, dict)
        for field, value in fields.items() if section != "track"
    }  # fmt: skip
    a, b = flat(theirs), flat(ours)
    for name in a | b:
        if a.get(name) != b.get(name):
            raise UserError(f"{folder} holds a run with {name} {a.get(name)!r}, and this one has {b.get(name)!r}: choose another --out, or remove that folder")


def step_seconds(folder: Path, config: Config, budget: Budget, data: Path) -> float:
    """Seconds of a step of a recipe on this machine, measured by training a few that are thrown away."""
    probe = folder / "probe"
    shutil.rmtree(probe, ignore_errors=True)
    settings = planned("probe", 0, budget, 1, config, "", 0.0, PROBE).config
    settings["train"] |= {"log_every": 5, "eval_images": 1}
    settings["sample"] |= {"images": 1, "steps": 1}
    probe.mkdir(parents=True)
    write_whole(probe / "config.json", json.dumps(settings))
    run_train(probe / "config.json", data, probe / "run")
    found = statistics.median(config.data.batch_size / line["images_per_s"] for line in read_log(probe / "run" / "log.jsonl")[2:])
    shutil.rmtree(probe)
    return found


# ---- training ---------------------------------------------------------------------------------------------------------


def train(folder: Path, plan: Plan, data: Path) -> None:
    """Train a planned run to its end, from its newest checkpoint on; nothing where it is there already. Raises Interrupted, all saved, after a signal."""
    from flowt2i.training import checkpoint

    run = folder / "run"
    done = checkpoint.list_steps(run)
    if done and done[-1] >= plan.steps:
        return
    starts = [*read_starts(folder), done[-1] if done else 0]
    write_whole(folder / "starts.json", json.dumps(starts))
    run_train(folder / "config.json", data, run)


def run_train(config: Path, data: Path, run: Path) -> None:
    """The training of a configuration; raises as `train_apart`."""
    train_apart(["--config", str(config), "--data", str(data), "--out", str(run), "--json"])


def train_apart(words: list[str]) -> None:
    """`flowt2i train --resume latest` in a process of its own, which gets the signals that come meanwhile.

    Raises Interrupted where one stopped it, SystemExit with its status where it failed (it has said why).
    """
    process = subprocess.Popen([sys.executable, "-m", "flowt2i", "train", *words, "--resume", "latest"], stdout=subprocess.DEVNULL, start_new_session=True)
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        process.send_signal(number)

    handlers = {which: signal.signal(which, pass_on) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
    if status == INTERRUPTED or (status and came):  # one that came before the training listened ended it at once: there was nothing to save
        raise Interrupted
    if status:
        raise SystemExit(status if status > 0 else 1)


def seconds_at(lines: list[dict[str, Any]], starts: list[int]) -> Callable[[int], float]:
    """Seconds of training up to a step, from the lines of log.jsonl. Start, compilation, evaluations and pauses are not in it.

    The first stretch after each start (steps `starts`) holds the compilation, and may not begin where the line before it ended: it counts as the median one.
    """
    ends = [0, *(line["step"] for line in lines)]
    own = [line["images_seen"] / line["step"] / line["images_per_s"] for line in lines]  # seconds a step
    first = {next((i for i, end in enumerate(ends[1:]) if end > start), -1) for start in starts}
    usual = statistics.median([s for i, s in enumerate(own) if i not in first] or own)
    spent, total = {0: 0.0}, 0.0
    for i, each in enumerate(own):
        total += (ends[i + 1] - ends[i]) * (usual if i in first else each)
        spent[ends[i + 1]] = total

    def at(step: int) -> float:
        before = max(end for end in spent if end <= step)
        return spent[before] + (step - before) * usual

    return at


# ---- scoring ----------------------------------------------------------------------------------------------------------


def score(folder: Path, plan: Plan, data: Path, scoring: Scoring, progress: bool = True) -> list[dict[str, Any]]:
    """The points of a finished run, those that were not scored before scored now; each is kept as soon as it is there."""
    from flowt2i.training import checkpoint

    known = {(p["step"], json.dumps(p["scoring"])): p for p in read_log(folder / "points.jsonl")}
    spent = seconds_at(read_log(folder / "run" / "log.jsonl"), read_starts(folder))
    points = []
    for step in range(plan.every, plan.steps + 1, plan.every):
        how = scoring.of(last=step == plan.steps)
        found = known.get((step, json.dumps(how)))
        if found is None:
            found = {"step": step, "scoring": how} | score_checkpoint(checkpoint.folder(folder / "run", step), data, how, plan.seed, progress)
            with (folder / "points.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
        images = step * plan.config["data"]["batch_size"]
        points.append({"images": images, "flops": images * plan.flops_per_image, "seconds": spent(step)} | found)
    return points


def score_checkpoint(path: Path, data: Path, how: dict[str, Any], seed: int, progress: bool) -> dict[str, Any]:
    """Scores of a checkpoint by `flowt2i evaluate`'s own metrics, with the weights and the sampler that it would be used with.

    Prompts (or the noise) are those of the training's seed: what three seeds of a recipe got right are independent cases, and two recipes are asked alike.
    `loss`: mean of the bins up to t = 0.8, and each bin.
    """
    from flowt2i.evaluation.metrics import Context
    from flowt2i.evaluation.metrics import score as measure
    from flowt2i.pipeline import Pipeline
    from flowt2i.training import distributed

    pipeline = Pipeline.from_pretrained(path)
    pipeline.config.flow.floor = FLOOR
    scenes = pipeline.description.is_scenes
    world = distributed.World(0, 1, pipeline.device)
    context = Context(world, how["num"], pipeline, data, given_num=how["images"], seed=seed, real=how["reference"], source=path, progress=progress)
    names = ["loss", *((["scenes"] if scenes else ["kid", "frechet"]) if how["draws"] else [])]
    outcome = measure(names, context)
    if outcome.failure:
        raise outcome.failure
    found: dict[str, Any] = {"weights": pipeline.weights, "protocols": {name: scores.protocol for name, scores in outcome.found.items()}}
    bins = {name.rsplit("/", 1)[1]: value for name, value in outcome.found["loss"].values.items() if f"/{pipeline.weights.lower()}/" in name}
    found["loss"] = {"mean": statistics.fmean(bins[name] for name in COMPARABLE if name in bins)} | bins
    if "scenes" in outcome.found:
        found["scenes"] = {name.rsplit("/", 1)[1]: tally for name, tally in outcome.found["scenes"].details["intervals"].items()}
    for name in ("kid", "frechet"):
        if name in outcome.found:
            values = outcome.found[name].values
            title = min(values, key=len)
            errors = outcome.found[name].details.get("errors", {})
            found[name] = {"value": values[title], "floor": values.get(f"{title}/floor"), "error": errors.get(title)}
    return found


# ---- files ------------------------------------------------------------------------------------------------------------


def read_starts(folder: Path) -> list[int]:
    path = folder / "starts.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text + "\n")
    aside.replace(path)
