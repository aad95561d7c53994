"""Dark pictures drawn as their negatives, so that a network learns an outline once and not once light on dark and once dark on light.

A picture x and its negative 2g - x, g being mid-grey, have the same outlines, and so have they under noise: `z_t = (1 - t) n + t x`, mirrored about
t g, is `(1 - t)(-n) + t (2g - x)`, the negative under the mirrored noise, which is as likely. So a picture that is darker than mid-grey at large can
be mirrored before the network and the prediction mirrored back behind it: one of each pair is all that is learned (canonicalisation; Kaba et al.,
2211.06489). What differs between the two, the colours that words name, needs the network to be told which it sees.

The mean of thousands of pixels shows through all but the strongest noise: of 64 x 64 x 3 it has a deviation of 0.009, an hundredth of what lies between a dark
ground and a light one. Nearest the noise it would be told by chance, and a network that is told from there on believes it over the caption's word for the
ground (docs/experiments.md, "Negatives"): so nothing is mirrored before t = 0.05, where that word is read.

Pixels only: in latents the negative is no reflection.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SEEN = 0.05  # from this time on a picture shows whether it is dark


def mid_grey(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Where mid-grey, 0 of pixels in [-1, 1], lies once they are normalised by mean and std [C]: [C]."""
    return -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)


def side(z: Tensor, t: Tensor, middle: Tensor) -> Tensor:
    """[B, 1, 1, 1]: -1 where z [B, C, H, W] is on the average under the middle [B, C, 1, 1] and its time t [B] past `SEEN`, else 1."""
    dark = (z - middle).mean((1, 2, 3)) < 0
    return torch.where(dark & (t > SEEN), -1.0, 1.0).view(-1, 1, 1, 1)


def mirrored(x: Tensor, middle: Tensor, side: Tensor) -> Tensor:
    """x [B, C, H, W] where side is 1, `2 middle - x` where it is -1. Its own inverse."""
    return middle + side * (x - middle)
