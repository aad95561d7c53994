"""The ranks of a run: PyTorch's own engine under `torchrun`, or one process."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flowt2i.errors import UserError


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of ranks, its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor (in place)."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
            values /= self.size
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def best_device() -> torch.device:
    """A CUDA GPU where there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def start() -> World:
    """Join the ranks that `torchrun` started, or stand alone."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = best_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    return World(int(os.environ.get("RANK", 0)), size, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def accumulation(batch: int, micro: int, world: int) -> tuple[int, int]:
    """(micro-batch, accumulation steps) that make the effective batch on this many ranks.

    `micro` 0 takes a rank's whole share. UserError where the numbers do not divide.
    """
    if batch % world:
        raise UserError(f"data.batch_size {batch} cannot be spread over {world} ranks: choose a multiple of {world}")
    share = batch // world
    micro = min(micro or share, share)
    if share % micro:
        raise UserError(f"train.micro_batch {micro} does not divide the {share} images a rank: choose a divisor of {share}")
    return micro, share // micro
