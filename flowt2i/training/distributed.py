"""The ranks of a run: PyTorch's own engine under `torchrun`, or one process."""

import hashlib
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from flowt2i.errors import UserError
from flowt2i.memory import is_out_of_memory

T = TypeVar("T")


class ToldElsewhere(UserError):
    """What all ranks stop for, and another rank says."""


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of ranks, its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor (in place)."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: the same answer on all."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def from_main(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.broadcast(shared, 0)
        return int(shared.item())

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank. Where it fails there all ranks stop, and rank 0 says why."""
        if self.size == 1:
            return work()
        result: list[Any] = [False, None]
        try:
            if self.main:
                result = [True, work()]
        finally:  # the others must not wait for a rank that gave up
            dist.broadcast_object_list(result, 0)
        if not result[0]:
            raise ToldElsewhere("rank 0 stopped")
        return result[1]

    def fail(self, message: str) -> UserError:
        """The error to raise on every rank, for rank 0 to say."""
        return UserError(message) if self.main else ToldElsewhere(message)

    def share(self, count: int) -> np.ndarray:
        """Which of `count` pieces of work this rank does: as many on every rank, the last piece repeated where they do not come out even."""
        each = -(-count // self.size)
        return np.minimum(np.arange(self.rank * each, (self.rank + 1) * each), count - 1)

    def collect(self, mine: np.ndarray, count: int) -> np.ndarray:
        """All `count` results in order, on every rank, from what each made of its `share`."""
        if self.size == 1:
            return mine
        own = torch.from_numpy(np.ascontiguousarray(mine)).to(self.device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return torch.cat(every)[:count].cpu().numpy()


def best_device() -> torch.device:
    """A CUDA GPU where there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a GPU, or that this process took in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


_store: Any = None  # of the process group at work: where ranks leave each other word without a collective
_rendezvous: Any = None  # where the ranks met, and this one's number
_groups = _questions = 0  # process groups so far, and votes


def start(timeout_s: float = 600) -> World:
    """Join the ranks that `torchrun` started, or stand alone. A rank that hears nothing of the others for `timeout_s` seconds gives up."""
    global _store, _rendezvous, _groups
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = best_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        _rendezvous = _rendezvous or next(dist.rendezvous("env://", timeout=timeout))[:2]
        store, rank = _rendezvous
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # several nodes do not count their restarts alike: docs/running.md says what to set there
            # torchrun keeps one store over restarts: without a prefix ranks would find the addresses of those that were killed (pytorch issue 135712)
            store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        _store, _groups = dist.PrefixStore(f"group-{_groups}", store), _groups + 1
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout, device_id=bound)
    return World(int(os.environ.get("RANK", 0)), size, device)


def votes(world: World, answer: str, patience_s: float) -> dict[int, str]:
    """What the ranks answer, asked without a collective: a rank that hangs in one is missing after so many seconds."""
    global _questions
    _questions += 1
    key = lambda rank, question=_questions: f"votes/{question}/{rank}"
    _store.set(key(world.rank), answer)
    end = time.monotonic() + patience_s
    found: dict[int, str] = {}
    for rank in range(world.size):
        try:
            _store.wait([key(rank)], timedelta(seconds=max(0.1, end - time.monotonic())))
            found[rank] = _store.get(key(rank)).decode()
        except dist.DistStoreError:
            continue
    return found


def said_once(error: UserError) -> UserError:
    """An error for its rank to say; of those that meet the same one the first speaks, and the others leave it to that one."""
    if isinstance(error, ToldElsewhere) or _store is None:
        return error
    rank, life = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # who spoke before a restart is gone
    key = f"said/{life}/{hashlib.sha256(str(error).encode()).hexdigest()}"
    try:
        _store.set(f"{key}/{rank}", "")
        _store.wait([f"{key}/{rank}"], timedelta(seconds=5))  # is the store still there? `compare_set` would wait for ever
        first = _store.compare_set(key, "", rank).decode()
    except RuntimeError:
        return error
    return error if first == rank else ToldElsewhere(str(error))


def lost_rank(error: BaseException) -> bool:
    """Whether this is what a rank meets when another was killed, or hangs. Not NCCL's own lack of memory, which is a `DistError` too."""
    text = str(error)
    closed = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Connection refused", "Socket Timeout")
    met = isinstance(error, dist.DistError) or any(words in text for words in closed)
    return met and _store is not None and not is_out_of_memory(error)


_ended: list[Any] = []  # process groups that are over


def stop() -> None:
    """Leave the ranks."""
    _leave()


def restart(timeout_s: float) -> None:
    """A process group of its own for what follows: collectives that broke off stay behind in the old one. For all ranks."""
    if dist.is_initialized():
        _leave()
        start(timeout_s)


def _leave() -> None:
    """Groups are kept: a thread of one that its destructor meets at work aborts the process (seen with gloo, torch 2.13)."""
    if dist.is_initialized():
        _ended.extend(dist.distributed_c10d._world.pg_map)
        dist.destroy_process_group()


def accumulation(batch: int, micro: int, world: int) -> tuple[int, int]:
    """(micro-batch, accumulation steps) that make the effective batch on this many ranks.

    The micro-batch is the largest divisor of a rank's share that is at most `micro` (0: the whole share). UserError where the
    batch cannot be spread evenly over the ranks.
    """
    if batch % world:
        raise UserError(f"data.batch_size {batch} cannot be spread over {world} ranks: choose a multiple of {world}")
    share = batch // world
    most = min(micro or share, share)
    micro = next(size for size in range(most, 0, -1) if share % size == 0)
    return micro, share // micro
