"""How often a training is evaluated, and what that costs it.

While it is evaluated a training waits, on all ranks. So an evaluation, asked for every `train.eval_every` steps, is made only where with it all evaluations so
far take at most `train.eval_share` of the time since the start; else it is put off to the next multiple of `eval_every`. What it will take is judged by the
one before. A minute of evaluations is free, so that short runs are looked at as often as they ask to be, and the one at the end is always made.

The weights do not depend on it (an evaluation changes no state of the training), so what a clock decides here makes no run another.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm import tqdm

from flowt2i.config import Config, SampleConfig
from flowt2i.description import DatasetDescription
from flowt2i.guidance import on_interval
from flowt2i.human import duration
from flowt2i.schedules import make_times
from flowt2i.settings import own_steps
from flowt2i.solvers import SOLVERS, Velocity
from flowt2i.styles import BY_STYLES
from flowt2i.training.distributed import World

FREE = 60.0  # seconds of evaluations that are not held against the share
SCORE_STEPS = 20  # of the solver, at most, for pictures that are scored while training
FORWARD = 1 / 3  # of a training step: a backward pass takes two forward ones


@dataclass
class Pace:
    """Which evaluations of a run are made, by what those before took."""

    every: int  # steps; 0: none but the last
    share: float
    telling: bool = False  # say so where the first one is put off
    began: float = field(default_factory=time.perf_counter)
    spent: float = 0.0  # seconds of evaluations so far
    last: float = 0.0  # of the last one

    def due(self, step: int, world: World) -> bool:
        """Whether to evaluate after this step: rank 0's answer, on every rank."""
        if not self.every or step % self.every:
            return False
        due = bool(world.from_main(int(self.affordable(time.perf_counter() - self.began))))
        if self.telling and not due:
            self.telling = False
            most = f"{self.share:.2g} of the time (--train.eval_share)"
            tqdm.write(f"no evaluation at step {step:,}: the last one took {duration(self.last)}, and they are to take at most {most}", file=sys.stderr)
        return due

    def affordable(self, elapsed: float) -> bool:
        """Whether another evaluation like the last one fits, after so many seconds of training and evaluations."""
        return self.spent + self.last <= max(FREE, self.share * (elapsed + self.last))

    def took(self, seconds: float) -> None:
        self.spent, self.last = self.spent + seconds, seconds


# ---- what is to be expected ------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """The evaluations that are to come."""

    number: int
    each: float  # seconds of one

    @property
    def text(self) -> str:
        return f"{self.number:,} evaluation{'s' if self.number > 1 else ''} of about {duration(max(1, self.each))}"


def expected(config: Config, description: DatasetDescription, per_step: float, steps: int) -> Expected:
    """Of so many steps of `per_step` seconds. By counting: the checker, the feature net and a VAE's decoder come on top."""
    each = per_step * FORWARD * passes(config, description) / config.data.batch_size
    every, share = config.train.eval_every, config.train.eval_share
    before_the_last = len(range(every, steps, every)) if every else 0
    affordable = max(FREE, share / (1 - share) * steps * per_step) / each if share < 1 else before_the_last
    return Expected(min(before_the_last, int(affordable)) + 1, each)


def passes(config: Config, description: DatasetDescription) -> int:
    """How many pictures go through the network in one evaluation, one that is drawn as often as it takes steps and captions."""
    train, sample = config.train, config.sample
    pool = config.data.subset or description.heldout_count or description.train_count
    validated = min(train.eval_images, pool) * (2 if train.ema else 1)
    if description.is_scenes:
        scored = train.score_prompts
    else:
        scored = 0 if config.data.subset else train.score_images
    previews = len(sample.prompts[: sample.images]) or sample.images
    return validated + previews * of_a_picture(sample, own_steps(sample)) + scored * of_a_picture(sample, score_steps(sample))


def score_steps(sample: SampleConfig) -> int:
    """Steps of the pictures that are scored while training."""
    return min(SCORE_STEPS, own_steps(sample))


def of_a_picture(sample: SampleConfig, steps: int) -> int:
    """Passes of the network that a picture takes: its solver follows a single number, with two passes a velocity where that is guided."""
    solver = {"dopri5": "rk4", "sde": "euler"}.get(sample.solver, sample.solver)  # the one chooses its steps, the other draws noise
    passes: list[int] = []

    def counting(each: int) -> Velocity:
        return lambda z, t: passes.append(each) or torch.zeros_like(z)  # type: ignore[func-returns-value]

    ends = {name: getattr(sample, f"{name}_until") if getattr(sample, name) else 0.0 for name in BY_STYLES}
    velocity = on_interval(counting(2), counting(1), sample.guidance_from, sample.guidance_until) if sample.guidance != 1 else counting(1)
    styles = on_interval(counting(len(sample.styles)), counting(0), 0, max(ends.values()))  # captions beside a picture's own: its style and the others
    subject = on_interval(counting(len(sample.styles) - 1), counting(0), 0, ends["analogy"])  # and itself in those
    SOLVERS[solver](lambda z, t: velocity(z, t) + styles(z, t) + subject(z, t), torch.zeros(1, 1, 1, 1), make_times(sample.schedule, steps, sample.shift))
    return sum(passes)
