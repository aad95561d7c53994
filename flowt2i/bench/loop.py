"""The rate of a real training, loop and all: a short run through `Trainer`, and how much of it is spent waiting for data."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowt2i.bench.timing import clock, one_shape_each
from flowt2i.config import Config
from flowt2i.data.dataset import Batch
from flowt2i.training.loop import Outcome, Trainer

WARM = 3  # steps that are not counted: they compile, start loader processes, fill caches


class TimedTrainer(Trainer):
    """A training that ends after `seconds`, and knows how long its steps took and its batches were waited for."""

    def __init__(self, config: Config, data: Path, run: Path, seconds: float):
        super().__init__(config, data, run, progress=False)
        self.seconds, self.waited = seconds, 0.0
        self.begun: float | None = None  # when the steps that count began
        self.ended, self.counted, self.waited_before = 0.0, 0, 0.0  # and ended; how many; what was waited for earlier

    def _loader(self) -> Iterator[Batch]:
        batches = super()._loader()
        try:
            while True:
                asked = time.perf_counter()
                batch = next(batches)
                self.waited += time.perf_counter() - asked
                yield batch
        finally:
            batches.close()  # type: ignore[attr-defined]

    def _step(self, batches: Any, factor: float, logging: bool) -> Outcome:
        if self.begun is None and self.step == WARM:  # before a step: what is logged between those that count lies within
            self.begun, self.waited_before = clock(self.world.device), self.waited
        outcome = super()._step(batches, factor, logging)
        if self.begun is not None:
            self.counted += 1
            if time.perf_counter() - self.begun > self.seconds and self.counted >= 2:
                self.ended = clock(self.world.device)
                self.steps = self.step + 1  # the loop counts this step after it is done, and ends
        return outcome


def loop_rate(config: Config, data: Path, compiled: bool, seconds: float) -> dict[str, Any]:
    """Train for about `seconds` (compilation not counted) in a folder that is removed again.

    Gives `images_per_s`, `steps`, `batch`, `workers`, `waiting_for_data` (share of the time) and `checkpoint_s`: for how long a checkpoint, of which there is
    one at the end, stops the training. Evaluations are not counted: they are as long as one asks for.
    """
    config = config.model_copy(deep=True)
    train, sample = config.train, config.sample
    train.minutes, train.steps, train.compile, train.dry_run = 0.0, 0, "on" if compiled else "off", False
    train.eval_every, train.eval_images, train.score_prompts, train.score_images = 0, 8, 0, 0
    train.checkpoint_every = 10**9  # one at the end
    sample.steps, sample.solver, sample.schedule, sample.images, sample.prompts = 1, "euler", "uniform", 1, []
    config.track.use_wandb = config.track.tensorboard = False
    with tempfile.TemporaryDirectory(prefix="flowt2i-bench-") as folder:
        trainer = TimedTrainer(config, data, Path(folder) / "run", seconds)
        try:
            with one_shape_each():
                trainer.train()
        finally:
            trainer.close()
        stall = trainer.saver.reports[-1]["stall_s"] if trainer.saver.reports else 0.0
    assert trainer.begun is not None
    took = trainer.ended - trainer.begun
    return {
        "images_per_s": round(trainer.counted * config.data.batch_size / took, 2),
        "steps": trainer.counted,
        "batch": config.data.batch_size,
        "workers": config.data.workers,
        "waiting_for_data": round((trainer.waited - trainer.waited_before) / took, 4),
        "checkpoint_s": round(stall, 4),
    }
