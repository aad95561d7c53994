"""Decoding in worker processes: raw samples in, clean captions and small uint8 pictures out. Imports no torch."""

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowt2i.data.captions import read_caption
from flowt2i.data.images import load_fitted
from flowt2i.data.sample import Dropped, RawSample, SceneImage
from flowt2i.errors import UserError
from flowt2i.shapes import Shape

AHEAD_BYTES = 64 << 20  # of pictures that may wait, decoded or not, so that workers go on while a unit is tokenized and written

_big: Any = None  # lock round the decoding of very large pictures, shared by the workers


@dataclass(frozen=True, slots=True)
class Rules:
    """What a picture must be to be kept, and how large it becomes (pixels)."""

    image_size: int
    min_side: int
    max_aspect: float
    min_caption: int
    max_caption: int
    buckets: tuple[Shape, ...] = ()  # shapes to choose from; none: the square


@dataclass(slots=True)
class Decoded:
    """A run of samples. `captions[i]` is None where sample i is dropped; `pixels`, `sizes` and `digests` hold only the kept."""

    keys: list[str]
    sources: list[str]
    captions: list[str | None]
    problems: list[tuple[str, str]]  # reason and detail of each, ("", "") of the kept
    pixels: list[NDArray[np.uint8]]  # [3, H, W] each
    sizes: list[Shape]  # width and height that each had
    digests: list[bytes]  # 16 bytes of sha256 over picture and caption


def decode(samples: list[RawSample], rules: Rules) -> Decoded:
    """Decode a run of samples; never raises for a bad one."""
    pixels: list[NDArray[np.uint8]] = []
    sizes: list[Shape] = []
    captions: list[str | None] = []
    problems: list[tuple[str, str]] = []
    digests: list[bytes] = []
    for sample in samples:
        try:
            if sample.reason:
                raise Dropped(sample.reason, sample.detail)
            caption = read_caption(sample, rules.min_caption, rules.max_caption)
            seen, size = _picture(sample, rules)
            picture = np.ascontiguousarray(seen.transpose(2, 0, 1))
        except Dropped as dropped:
            captions.append(None)
            problems.append((dropped.reason, dropped.detail))
            continue
        digest = hashlib.sha256(picture.data)
        digest.update(caption.encode())
        digests.append(digest.digest()[:16])
        pixels.append(picture)
        sizes.append(size)
        captions.append(caption)
        problems.append(("", ""))
    return Decoded([s.key for s in samples], [s.source for s in samples], captions, problems, pixels, sizes, digests)


def _picture(sample: RawSample, rules: Rules) -> tuple[NDArray[np.uint8], Shape]:
    if isinstance(sample.image, SceneImage):
        from flowt2i.data.scenes import render

        return render(sample.image.scene, rules.image_size), (rules.image_size, rules.image_size)
    if sample.image is None:
        raise Dropped("missing image")
    data = sample.image if isinstance(sample.image, bytes) else sample.image.read()
    shapes = rules.buckets or [(rules.image_size, rules.image_size)]
    return load_fitted(data, shapes, rules.min_side, rules.max_aspect, _big or nullcontext())


def decode_in_order(runs: Iterable[list[RawSample]], rules: Rules, workers: int) -> Generator[Decoded, None, None]:
    """Decode runs of samples in `workers` processes (1: in this one) and give them back in order, a bounded number under way."""
    if workers <= 1:
        for run in runs:
            yield decode(run, rules)
        return
    # spawn: a fork of a process with threads (tokenizers, torch) may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(context.Lock(),))
    under_way: deque[tuple[Future[Decoded], int]] = deque()  # with the bytes of its pictures
    held = 0

    def taken() -> Decoded:
        nonlocal held
        future, size = under_way.popleft()
        held -= size
        return future.result()

    try:
        for run in runs:
            with _hidden_main():
                under_way.append((pool.submit(decode, run, rules), size := _bytes_of(run, rules)))
            held += size
            if under_way[0][0].done():  # one for each that is handed out, or a slow reader would drain what the workers live on
                yield taken()
            while len(under_way) >= 4 * workers and held > AHEAD_BYTES:
                yield taken()
        while under_way:
            yield taken()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed (out of memory?): rerun the same command to continue, with fewer --workers") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _bytes_of(run: list[RawSample], rules: Rules) -> int:
    """What a run holds in memory at most, about: its small pictures, and the files that came along with it (of tables, from the hub)."""
    return sum(3 * rules.image_size**2 + (len(sample.image) if isinstance(sample.image, bytes) else 0) for sample in run)


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep a spawned worker from importing the user's script again: it needs nothing of it, and the script may be unguarded or slow."""
    main: dict[str, Any] = sys.modules["__main__"].__dict__
    saved: dict[str, Any] = {name: main[name] for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(saved)


def _start_worker(lock: Any) -> None:
    global _big
    _big = lock
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # the main process was killed: leave no orphan
