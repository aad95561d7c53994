"""Classifier-free guidance wrapped round a velocity field (Ho & Salimans, 2207.12598, eq. 6)."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowt2i.solvers import Velocity

TextVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (z [B, C, H, W], t [], text [B, T, D], mask [B, T]) -> [B, C, H, W]


def conditional(field: TextVelocity, text: Tensor, mask: Tensor) -> Velocity:
    """The field under its captions alone: one network evaluation a call, no guidance."""
    return lambda z, t: field(z, t, text, mask)


def classifier_free(field: TextVelocity, text: Tensor, mask: Tensor, null_text: Tensor, null_mask: Tensor, scale: float) -> Velocity:
    """`v = v_null + scale (v_text - v_null)`, both halves in one batch.

    text, null_text: [B, T, D]; masks [B, T]. `scale` 1 is the plain conditional field, 0 the unconditional one.
    """
    both_text, both_mask = torch.cat([text, null_text]), torch.cat([mask, null_mask])

    def guided(z: Tensor, t: Tensor) -> Tensor:
        with_text, without = field(torch.cat([z, z]), t, both_text, both_mask).chunk(2)
        return without + scale * (with_text - without)

    return guided
