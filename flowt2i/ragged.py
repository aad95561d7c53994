"""Captions of several lengths in training: keys and values of the caption are made of its real tokens, packed one after the other, not of the padding.

A batch of captions is [B, T], padded to its longest. Which tokens are real is known on the device only, once captions were dropped, and a shape that
follows from it would make the host wait. So `room`, how many tokens the packed batch has, is settled beforehand, from the lengths of all captions: it is the
same for every batch, which `torch.compile` likes too. A batch that holds more than that stays padded (as those of a bucket of shapes whose captions are
longer than others may). Drawing and validation always pad.

Shapes: B captions, T tokens with padding, S tokens packed (`room`).
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEVIATIONS = 5.0  # a sum of lengths lies further above its mean once in three million batches
WORTH = 0.9  # of the tokens: below this share it is packed. Chosen, not measured


class Packing(NamedTuple):
    """Where the tokens of a padded batch stand in the packed one."""

    order: Tensor  # int64 [S], places in [B * T]: of the real tokens, then of padding
    places: Tensor  # int64 [B * T], numbers in [S]; of padding any that is there


class Lengths(NamedTuple):
    """Mean and deviation of the lengths of all captions, in tokens."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, lengths: NDArray[np.integer]) -> "Lengths":
        return cls(float(lengths.mean()), float(lengths.std()))

    def room(self, images: int) -> int:
        """S for batches of so many images, drawn at random: `DEVIATIONS` of the deviation of the sum of their lengths above its mean, as a multiple of 32."""
        return 32 * math.ceil((images * self.mean + DEVIATIONS * math.sqrt(images) * self.deviation) / 32)

    def room_for(self, mask: Tensor, least: int = 1) -> int:
        """`room` where a batch with this mask [B, T], on the CPU, fits into it and leaves enough out; else 0. least: tokens of an empty caption."""
        room, real = self.room(len(mask)), int(mask.sum(1).clamp(min=least).sum())
        return room if real <= room < WORTH * mask.numel() else 0


def packing_of(mask: Tensor, room: int) -> Packing:
    """How to pack a batch whose mask [B, T] has at most `room` real tokens: the caller knows that, since looking would make the host wait."""
    real = mask.flatten()
    return Packing((~real).to(torch.uint8).argsort(stable=True)[:room], (real.cumsum(0) - 1).clamp(min=0))


def pack(x: Tensor, packing: Packing) -> Tensor:
    """[B, T, ...] -> [S, ...]."""
    return x.flatten(0, 1).index_select(0, packing.order)


def unpack(x: Tensor, packing: Packing, batch: int) -> Tensor:
    """[S, ...] -> [B, T, ...]. What stands at padding is arbitrary and has no gradient: it must be masked."""
    unpacked: Tensor = _Unpack.apply(x, packing.order, packing.places)  # type: ignore[no-untyped-call]
    return unpacked.unflatten(0, (batch, -1))


class _Unpack(torch.autograd.Function):
    """Gather whose backward pass is a gather, too: every packed token is read at one place that counts. PyTorch's own adds up row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(0, order), None, None
