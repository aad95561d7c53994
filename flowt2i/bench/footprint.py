"""What a training takes of memory, computed: weights, gradients, optimizer and EMA from the parameters, activations from what autograd keeps.

    memory(B) = state + fixed + slope B

for micro-batches of B images. `state` is exact. `fixed` and `slope` come from two small forward passes on the CPU, in which every tensor that autograd
keeps for the backward pass is counted once: so they follow the model as it is, not a formula that grows old. Left out are the allocator's own losses,
what lives only within an operation, and the network of a perceptual loss; `python benchmarks/scale.py` sets the sum beside measured peaks.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowt2i.bench.step import BareStep


class Footprint(NamedTuple):
    """Bytes."""

    state: int  # weights, gradients, optimizer, EMA
    fixed: float  # kept for the backward pass however few the images: weights in bf16
    slope: float  # kept for the backward pass of an image

    def bytes(self, images: int) -> float:
        return self.state + self.fixed + images * self.slope

    def largest(self, capacity: float, spare: float = 0.1) -> int:
        """Most images that fit into so many bytes, a share of them left for what is not counted; 0: not even one."""
        return max(0, int(((1 - spare) * capacity - self.state - self.fixed) // self.slope))


def state_bytes(model: nn.Module, muon: bool, ema: bool) -> int:
    """Bytes of weights and gradients, of AdamW's two moments (Muon: one, for the matrices of the blocks), and of the averaged weights; all fp32."""
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name and not name.endswith("table"))
    return 4 * (total * (2 + ema) + 2 * total - (matrices if muon else 0))


def kept_bytes(objective: nn.Module, inputs: tuple[Any, ...], weights: set[int]) -> int:
    """Bytes that autograd keeps of a forward pass for the backward one: each storage once, without the weights themselves (their storages' addresses)."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = objective(*inputs)  # alive until all is counted, or an address might be used twice
    total = sum(seen.values())
    del out
    return total


def footprint(step: BareStep) -> Footprint:
    """What a training of this step's model takes, eager. The model should be on the CPU: its passes there are small, but on a GPU they ask for memory.

    With `train.checkpoint_activations`: what stays between the blocks, and the inside of the one whose backward pass is at work.
    """
    model = step.model
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    padded = lambda images: (*step.inputs(images)[:-1], 0)  # without room: the longest captions have none, and must fit as well
    kept = lambda: np.array([kept_bytes(step.objective, padded(images), weights) for images in (1, 3)])
    found = kept()
    if model.checkpoint_activations:
        model.checkpoint_activations = False
        found = found + (kept() - found) / len(model.blocks)
        model.checkpoint_activations = True
    few, more = found.tolist()
    slope = (more - few) / 2
    return Footprint(state_bytes(step.model, step.config.optim.name == "muon", step.ema is not None), few - slope, slope)
