"""Drawing with previews, in a thread of its own, one at a time, ended soon after nobody waits for it any more."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from flowt2i.demo.limits import MOST_SECONDS, Request, size_of
from flowt2i.errors import UserError
from flowt2i.pipeline import Pipeline, Samples
from flowt2i.solvers import ToleranceError

PULSE = 0.5  # seconds between two looks at whether anyone still waits


class Step(NamedTuple):
    """How far a drawing is."""

    done: int
    steps: int
    images: np.ndarray  # uint8 [B, H, W, 3], the predicted clean pictures so far
    fraction: float  # of the whole drawing
    seconds: float  # since it began

    @property
    def left(self) -> float:
        """Seconds to go, by the pace so far."""
        return self.seconds * (1 - self.fraction) / self.fraction


class Cut(NamedTuple):
    """The prompt was longer than the model reads."""

    tokens: int


class Pulse(NamedTuple):
    """Nothing new: yielded so that whoever waits can leave."""


class Clock:
    """The seconds that one request may draw, over all its drawings; waiting for its turn does not count."""

    def __init__(self, limit: float = MOST_SECONDS):
        self.limit, self.spent = limit, 0.0

    def check(self, drawing: float) -> None:
        """UserError where `drawing` seconds more are too many."""
        if self.spent + drawing > self.limit:
            raise UserError(f"Drawing took longer than the {self.limit:.0f} s that one request may: ask for fewer steps or pictures.")


News = Step | Cut | Pulse | Samples


class _Abandoned(Exception):
    """The visitor went away or pressed stop."""


_turn = threading.Lock()  # one drawing at a time, also where the one before was abandoned and has not noticed yet


def run(load: Callable[[], Pipeline], request: Request, clock: Clock | None = None, gone: threading.Event | None = None) -> Iterator[News]:
    """Load a model and draw with it: yields steps, and at last the `Samples`; a `Pulse` where nothing else happens for `PULSE` seconds.

    Closing the generator, or setting `gone`, ends the drawing before its next evaluation of a network; after `gone` no samples come.
    clock: shared by the drawings of one request. UserError where the model cannot be loaded or the drawing takes longer than it may.
    """
    news: queue.Queue[News | Exception] = queue.Queue()
    clock, abandoned = clock or Clock(), gone or threading.Event()

    def work() -> None:
        try:
            while not _turn.acquire(timeout=PULSE):
                if abandoned.is_set():
                    raise _Abandoned
            try:
                if abandoned.is_set():
                    raise _Abandoned
                news.put(_draw(load(), request, clock, news.put, abandoned))
            finally:
                _turn.release()
        except Exception as error:  # handed over to the thread that waits
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                item = news.get(timeout=PULSE)
            except queue.Empty:
                item = Pulse()
            if isinstance(item, _Abandoned):
                return
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Samples):
                return
    finally:
        abandoned.set()


def _draw(pipeline: Pipeline, request: Request, clock: Clock, tell: Callable[[News], None], abandoned: threading.Event) -> Samples:
    size = size_of(request, pipeline.description.sizes)
    started, cut_before = time.perf_counter(), pipeline.tokenizer.truncated
    shown: list[np.ndarray] = []  # as far as they are; a solver may draw one picture after another
    finished, told = 0, 0.0

    def alive() -> None:
        if abandoned.is_set():
            raise _Abandoned
        clock.check(time.perf_counter() - started)

    def preview(step: int, steps: int, images: np.ndarray) -> None:
        nonlocal told
        shown[finished:] = list(images)
        fraction = (finished + len(images) * step / steps) / request.num
        if (fraction - told) * request.updates > 1 - 1e-9:  # never more than `updates` of them
            told = fraction
            tell(Step(step, steps, np.stack(shown), fraction, time.perf_counter() - started))

    def batch_done(count: int) -> None:
        nonlocal finished
        finished += count

    try:
        samples = pipeline.sample(
            request.prompt, steps=request.steps, solver=request.solver, guidance=request.guidance, seed=request.seed, num=request.num,
            preview=preview if request.updates else None, preview_every=request.every, progress=batch_done, negative=request.negative, alive=alive,
            width=size[0] if size else None, height=size[1] if size else None,
        )  # fmt: skip
    except UserError as error:
        if isinstance(error.__cause__, ToleranceError):  # said without the option of the command line that visitors do not have
            raise UserError(f"{request.solver}: {error.__cause__}; choose another solver, or less guidance") from error
        raise
    finally:
        clock.spent += time.perf_counter() - started
    if pipeline.tokenizer.truncated > cut_before:
        tell(Cut(pipeline.description.text.max_tokens))
    return samples
