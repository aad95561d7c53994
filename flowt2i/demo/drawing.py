"""Drawing with previews, in a thread of its own, one at a time, ended where nobody waits for it any more."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from flowt2i.demo.limits import MOST_SECONDS, Request
from flowt2i.errors import UserError
from flowt2i.pipeline import Pipeline, Samples


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


News = Step | Cut | Samples


class _Abandoned(Exception):
    """The visitor went away or pressed stop."""


_turn = threading.Lock()  # one drawing at a time, also where the one before was abandoned and has not noticed yet


def run(load: Callable[[], Pipeline], request: Request, seconds: float = MOST_SECONDS) -> Iterator[News]:
    """Load a model and draw with it: yields steps, and at last the `Samples`. Closing the generator ends the drawing at the next preview.

    UserError where the model cannot be loaded or the drawing takes longer than it may.
    """
    news: queue.Queue[News | Exception] = queue.Queue()
    abandoned = threading.Event()

    def work() -> None:
        try:
            with _turn:
                if not abandoned.is_set():
                    news.put(_draw(load(), request, seconds, news.put, abandoned))
        except Exception as error:  # handed over to the thread that waits
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item = news.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Samples):
                return
    finally:
        abandoned.set()


def _draw(pipeline: Pipeline, request: Request, seconds: float, tell: Callable[[News], None], abandoned: threading.Event) -> Samples:
    started, cut_before = time.perf_counter(), pipeline.tokenizer.truncated
    shown: list[np.ndarray] = []  # as far as they are; a solver may draw one picture after another
    finished = 0

    def preview(step: int, steps: int, images: np.ndarray) -> None:
        gone = time.perf_counter() - started
        if abandoned.is_set():
            raise _Abandoned
        if gone > seconds:
            raise UserError(f"Drawing took longer than the {seconds:.0f} s that one request may: ask for fewer steps or pictures.")
        shown[finished:] = list(images)
        tell(Step(step, steps, np.stack(shown), (finished + len(images) * step / steps) / request.num, gone))

    def batch_done(count: int) -> None:
        nonlocal finished
        finished += count

    samples = pipeline.sample(
        request.prompt, steps=request.steps, solver=request.solver, guidance=request.guidance, seed=request.seed, num=request.num,
        preview=preview, preview_every=request.every, progress=batch_done, negative=request.negative,
    )  # fmt: skip
    if pipeline.tokenizer.truncated > cut_before:
        tell(Cut(pipeline.description.text.max_tokens))
    return samples
