"""The model on several ranks: DDP (each holds a whole copy) or FSDP2 (each holds a share of every tensor), both PyTorch's own.

Weights, EMA and optimizer state are whole tensors in a checkpoint whichever way they are held: `whole` gathers, `share_like` takes a rank's share.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:  # `torch.distributed.fsdp` takes a second to import, and sampling needs none of it
    from flowt2i.training.objective import Objective


def shard(objective: "Objective", device: torch.device) -> None:
    """Split every tensor of a model over the ranks, in place: a block at a time is gathered for its forward and backward pass.

    Nothing stays gathered after a forward pass, so that what follows an evaluation sees shares again. The objective is the root:
    captions are encoded outside the model's own forward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    captions = objective.model.caption_encoder
    units: list[nn.Module] = [*objective.model.blocks, *([*captions.blocks, captions] if captions is not None else []), objective.model, objective]
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing works in place on what a block gives
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")


def replicate(objective: "Objective") -> DistributedDataParallel:
    """A whole copy on each rank; gradients lie in the buffers in which they are summed, and constant buffers are not sent round."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers to what earlier versions do not know
        return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)


def gradient_sync(module: nn.Module, on: bool) -> AbstractContextManager[Any]:
    """Forward and backward within: gradients are summed over ranks where `on` (the last micro-batch), otherwise only accumulated here."""
    if is_sharded(module):
        sharded: Any = module
        sharded.set_requires_gradient_sync(on)
        return nullcontext()
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not on else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank holds a share, gathered (all ranks must ask); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, held as `like` is: this rank's share of it, or all of it."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
