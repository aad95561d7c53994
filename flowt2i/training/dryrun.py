"""What would stop a run after hours is tried before step 0, and what the run will take is said.

Every start, new or resumed (`check`): is there room for the run's checkpoints, can a file be written, synced, renamed and read back in its
folder, can a picture be drawn and decoded. A fraction of a second.

A new run besides (`rehearse`): its first step, with its own samples, at a learning rate of 0; and a whole checkpoint with the state that the
optimizer has then, by the way that all later ones will go. Nothing of it stays: the weights were not changed, the optimizer forgets, the
average never saw the step, and there is no other state. So the run is bit by bit the one without a dry run. A resume need not rehearse: the
run has made steps and checkpoints before, and starting a big model again stays quick.
"""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm import tqdm

from flowt2i.config import TrainConfig
from flowt2i.errors import UserError
from flowt2i.human import duration, size
from flowt2i.training import checkpoint, pace
from flowt2i.training.distributed import peak_memory
from flowt2i.training.optim import Optimizer, state_keys

if TYPE_CHECKING:
    from flowt2i.training.loop import Trainer

QUICK = 5.0  # seconds: a first step below this says little of the speed, for most of it is warming up
FOLDER = ".dry-run"  # within the run's
SLACK = 1 << 20  # bytes beside the tensors: description, tokenizer, log


# ---- before step 0 ----------------------------------------------------------------------------------------------------


def check(trainer: "Trainer") -> None:
    """UserError, on all ranks alike, where the run would fail later: the quick part, for every start."""
    if not trainer.config.train.dry_run or (trainer.steps and trainer.step >= trainer.steps):
        return
    trainer.world.on_main(lambda: _try(trainer))


def _try(trainer: "Trainer") -> None:
    require_space(trainer)
    write_one(trainer)
    draw_one(trainer)


def rehearse(trainer: "Trainer") -> bool:
    """The first step of a new run and a whole checkpoint, on all ranks; UserError on all where one fails. The run is as it was afterwards.

    False where there was nothing to rehearse.
    """
    if not trainer.config.train.dry_run or trainer.resumed_from:
        return False
    with tqdm(desc="dry run", total=2, unit="part", leave=False, disable=not trainer.progress) as bar:
        try:
            seconds = _timed_step(trainer)
            # The first one compiles or warms up, the second shows the speed. Decided together: a step holds collectives.
            if trainer.world.any(trainer.compiled or seconds < QUICK):
                seconds = _timed_step(trainer)
            bar.update()
            if trainer.stopping():  # a signal came meanwhile: the run takes one step, saves and stops
                return True
            trainer.saver.rehearse(trainer.run_folder / FOLDER, *trainer.contents())
            bar.update()
        finally:
            trainer.optimizer.forget()
    if trainer.progress:
        written, took = trainer.saver.rehearsed
        picture = "the decoder" if trainer.sharded else "a picture"  # see `draw_one`
        print(f"dry run: a step, a checkpoint of {size(written)} in {took:.1f} s and {picture}: all work", file=sys.stderr)
        trainer.forecast.tell(seconds)
    return True


def _timed_step(trainer: "Trainer") -> float:
    started = time.perf_counter()
    trainer.rehearse_step()
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize(trainer.world.device)
    return time.perf_counter() - started


def clear(run: Path) -> None:
    """Remove what a dry run left that was killed."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def require_space(trainer: "Trainer") -> None:
    """UserError where the newest checkpoints have no room; a warning where those that are kept for good will have none."""
    run, space = trainer.run_folder, checkpoint_space(trainer, trainer.steps)
    there = len(checkpoint.list_steps(run))
    needed, free = space.now(there), shutil.disk_usage(run).free
    if free < needed:
        raise UserError(
            f"no room for checkpoints in {run}: {size(needed)} needed ({space.at_once} of {size(space.each)} at once, {there} already there), "
            f"{size(free)} free; free some, lower --train.keep_recent, or choose another --out"
        )
    if free < space.total - there * space.each:
        print(
            f"warning: the disk of {run} will be full before the end: {size(space.total)} of checkpoints, {size(free)} free; "
            "raise --train.keep_every, lower --train.keep_recent, or free some",
            file=sys.stderr,
        )


def write_one(trainer: "Trainer") -> None:
    """A checkpoint of one number: written, synced, renamed, read back as real ones are."""
    folder = trainer.run_folder / FOLDER
    try:
        texts = {"config.json": "{}", "state.json": "{}"}
        written = checkpoint.save(folder, 0, {"model": {"number": torch.ones(1)}}, texts, {"tokenizer": trainer.data / "tokenizer"})
        if problem := checkpoint.damage(written):
            raise UserError(f"a checkpoint written into {trainer.run_folder} does not read back ({problem}): choose another --out")
    finally:
        clear(trainer.run_folder)


def draw_one(trainer: "Trainer") -> None:
    """One picture in one solver step, decoded: text encoder, model, guidance and VAE work on this device."""
    try:
        pipeline = trainer.pipeline()
        if trainer.sharded:
            pipeline.to_images(torch.zeros(1, *trainer.description.codec.shape, device=trainer.world.device))
            return  # rank 0 has only its share of the weights: the decoder alone
        training, device = pipeline.model.training, trainer.world.device
        # Eager: a compiled block that first saw this batch size would be compiled for all sizes, and its losses would round otherwise.
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            pipeline.model.eval()
            pipeline.sample(["a picture"], steps=1, solver="euler")
            pipeline.model.train(training)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign VAE or a device may raise: it would come at the first preview, and end the run there
        line = (str(error).splitlines() or [""])[0][:160]
        raise UserError(
            f"no picture could be drawn before step 0 ({type(error).__name__}: {line}): previews would fail; mend the codec, or set --train.dry_run false"
        ) from error


# ---- what a run takes -------------------------------------------------------------------------------------------------


class Space(NamedTuple):
    """What a run's checkpoints take on disk."""

    each: int  # bytes of one
    at_once: int  # the newest ones, and the one being written before the oldest goes
    for_good: int  # those at multiples of `keep_every` at the end of the run; 0 where the end is not known

    @property
    def total(self) -> int:
        return self.each * (self.at_once + self.for_good)

    def now(self, there: int) -> int:
        """Bytes that must be free for the newest ones, where so many lie there already."""
        return max(1, self.at_once - there) * self.each + SLACK


def checkpoint_space(trainer: "Trainer", steps: int) -> Space:
    at_once, for_good = checkpoints_kept(trainer.config.train, steps)
    remembered = sum(t.numel() * t.element_size() for t in trainer.matching.state().values()) if trainer.matching else 0
    return Space(checkpoint_bytes(trainer.model, trainer.optimizer, trainer.ema is not None) + remembered, at_once, for_good)


def checkpoint_bytes(model: torch.nn.Module, optimizer: Optimizer, ema: bool) -> int:
    """Bytes of the tensors of a checkpoint: weights, their average, and the moments that the optimizer will have after its first step."""
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    moments = 0
    for part in optimizer.parts:
        number = len([key for key in state_keys(part) if key != "step"])
        moments += sum(number * p.numel() * p.element_size() for group in part.param_groups for p in group["params"])
    return weights * (2 if ema else 1) + moments


def checkpoints_kept(config: TrainConfig, steps: int) -> tuple[int, int]:
    """How many checkpoints lie side by side at most: (newest ones and the one being written, kept for good). steps 0: without end."""
    saves = math.ceil(steps / config.checkpoint_every) if steps else config.keep_recent + 1
    at_once = min(config.keep_recent + 1, saves)
    for_good = steps // math.lcm(config.keep_every, config.checkpoint_every) if config.keep_every else 0
    return at_once, min(for_good, saves - at_once)


class Forecast:
    """Says once what the run will take in time, memory and disk: after a rehearsal, else when the first steps have shown the speed."""

    FROM, STEPS, SECONDS = 2, 20, 5.0  # the first two steps compile and warm up; then so many steps, or fewer where they are slow

    def __init__(self, trainer: "Trainer"):
        self.trainer, self.begun, self.told = trainer, 0.0, not trainer.progress

    def after_step(self) -> None:
        if self.told:
            return
        done, now = self.trainer.step - self.trainer.first, time.perf_counter()
        if done == self.FROM:
            self.begun = now
        counted = done - self.FROM
        if counted >= 2 and (counted >= self.STEPS or now - self.begun >= self.SECONDS):
            self.tell((now - self.begun) / counted)

    def tell(self, per_step: float) -> None:
        self.told = True
        tqdm.write(self.text(per_step), file=sys.stderr)

    def text(self, per_step: float) -> str:
        trainer = self.trainer
        minutes = trainer.config.train.minutes
        steps = trainer.steps or trainer.step + int(minutes * 60 / per_step)  # `train.minutes` becomes a number of steps after a while
        space = checkpoint_space(trainer, steps)
        ends = steps > trainer.step
        to_go = steps - trainer.step if ends else 1000
        evaluations = pace.expected(trainer.config, trainer.description, per_step, to_go)
        left = f"{duration(to_go * per_step + evaluations.number * evaluations.each)} {'to go' if ends else 'for 1,000 steps, no end set'}"
        kept = f"{space.at_once} at once" + (f", {space.for_good} for good" if space.for_good else "")
        memory = "of the GPU" if trainer.world.device.type == "cuda" else "of main memory"
        return (
            f"expected: {left} at {per_step:.3g} s a step, {evaluations.text} included; {peak_memory(trainer.world.device):.1f} GiB {memory}; "
            f"{size(space.total)} of checkpoints ({kept}), {size(shutil.disk_usage(trainer.run_folder).free)} free"
        )
