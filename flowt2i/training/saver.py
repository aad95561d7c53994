"""Saving beside the training: it stops only for copying the tensors into main memory; a thread writes, syncs, proves and prunes.

One write at a time: a save that comes before the last one is written waits for it. What goes wrong in the thread is kept until the
ranks next agree on it (`failed`), and raised by `wait`.
"""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowt2i.errors import UserError
from flowt2i.training import checkpoint
from flowt2i.training.distributed import World
from flowt2i.training.parallel import whole

Contents = tuple[dict[str, dict[str, Tensor]], dict[str, str], dict[str, Path]]  # file -> name -> tensor; file -> text; name -> folder to copy in
Kinds = dict[tuple[str, str], tuple[torch.Size, torch.dtype, bool]]  # (file, name) -> shape, type, whether it comes from a GPU


class Saver:
    """Writes the checkpoints of a run. All ranks call `save`; rank 0 writes."""

    def __init__(self, world: World, run: Path, keep_recent: int, keep_every: int):
        self.world, self.run, self.keep_recent, self.keep_every = world, run, keep_recent, keep_every
        self.error: BaseException | None = None
        self.reports: list[dict[str, float]] = []  # of each checkpoint written: step, bytes, stall_s, write_s
        self.rehearsed = (0, 0.0)  # of a rehearsal on rank 0: bytes, seconds that it took to write and prove
        self._buffers: dict[tuple[str, str], Tensor] = {}  # kept: fresh memory would cost more time than the copy
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def reserve(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Get the memory for the copies ready, beside the training: to be given fresh memory takes longer than to copy into it."""
        wanted = {(stem, name): (t.shape, t.dtype, t.device.type == "cuda") for stem, named in tensors.items() for name, t in named.items()}
        kinds = {key: kind for key, kind in wanted.items() if key not in self._buffers}
        if self.world.main and kinds:
            self._thread = threading.Thread(target=self._reserve, args=(kinds,), name="reserve")
            self._thread.start()

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str], copies: dict[str, Path]) -> None:
        """Copy the tensors and return; `checkpoint.save` and `prune` go on behind. After a failure nothing more is written."""
        started = time.perf_counter()
        self.settle_together()
        copied = self._copy(tensors)
        if not self.world.main or self.failed:
            return
        stall = time.perf_counter() - started
        self._thread = threading.Thread(target=self._write, args=(step, copied, texts, copies, stall), name="checkpoint")
        self._thread.start()

    def rehearse(self, aside: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str], copies: dict[str, Path]) -> None:
        """A whole checkpoint, written into a folder of its own as real ones are, proved, and removed. Raises on all ranks where it fails."""
        self.reserve(tensors)
        self.settle_together()
        copied = self._copy(tensors)
        if self.world.main and not self.failed:
            self._thread = threading.Thread(target=self._rehearse, args=(aside, copied, texts, copies), name="dry run")
            self._thread.start()
        self.wait()

    def settle(self) -> None:
        """Return when this rank writes nothing."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def settle_together(self) -> None:
        """Return on all ranks when none writes. They ask each other again and again: a slow disk may take longer than ranks wait in one collective."""
        while self.world.size > 1 and self.world.any(self.writing):
            time.sleep(0.05)
        self.settle()

    def wait(self) -> None:
        """Return on all ranks when the last checkpoint stands; where it could not be written all ranks stop, and rank 0 says why."""
        self.settle_together()
        if self.world.any(self.failed):
            self.raise_error()

    def raise_error(self) -> None:
        """What stopped the writing, from rank 0; the other ranks fall silent."""
        raise self.error or self.world.fail("no checkpoint could be written")

    def _copy(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        copies: dict[str, dict[str, Tensor]] = {stem: {} for stem in tensors}
        for stem, named in tensors.items():
            for name, tensor in named.items():
                full = whole(tensor.detach())  # every rank takes part in gathering a sharded tensor
                if self.world.main and not self.failed:
                    if (stem, name) not in self._buffers:
                        self._allocate({(stem, name): (full.shape, full.dtype, full.device.type == "cuda")})
                    copies[stem][name] = self._buffers[stem, name].copy_(full, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return copies

    def _reserve(self, kinds: Kinds) -> None:
        try:
            self._allocate(kinds)
        except (RuntimeError, MemoryError) as error:
            self.error = UserError(f"no main memory for a copy of what a checkpoint holds ({str(error).splitlines()[0]}): free some")

    def _allocate(self, kinds: Kinds) -> None:
        """Buffers of these shapes, pinned where they receive from a GPU, and touched: memory is only given when it is written to."""
        for key, (shape, dtype, pinned) in kinds.items():
            self._buffers[key] = torch.empty(shape, dtype=dtype, pin_memory=pinned).zero_()

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str], copies: dict[str, Path], stall: float) -> None:
        started = time.perf_counter()
        try:
            path = checkpoint.save(self.run, step, tensors, texts, copies)
            checkpoint.prove(path)
            checkpoint.prune(self.run, self.keep_recent, self.keep_every)
        except BaseException as error:
            self.error = error
            return
        written = {"step": step, "bytes": checkpoint.total_bytes(path)}
        self.reports.append(written | {"stall_s": round(stall, 4), "write_s": round(time.perf_counter() - started, 4)})

    def _rehearse(self, aside: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str], copies: dict[str, Path]) -> None:
        started = time.perf_counter()
        try:
            path = checkpoint.save(aside, 0, tensors, texts, copies)
            checkpoint.prove(path)
            self.rehearsed = (checkpoint.total_bytes(path), time.perf_counter() - started)
        except BaseException as error:
            self.error = error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """Of a run's saves: how many, the longest stall of the training, the longest write."""
        if not self.reports:
            return {}
        return {"checkpoints": len(self.reports), **{f"longest_{key}": max(r[key] for r in self.reports) for key in ("stall_s", "write_s")}}
