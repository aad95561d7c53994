"""Dark pictures drawn as their negatives, so that a network learns an outline once and not once light on dark and once dark on light.

A picture x and its negative 2g - x, g being mid-grey, have the same outlines, and so have they under noise: `z_t = (1 - t) n + t x`, mirrored about
t g, is `(1 - t)(-n) + t (2g - x)`, the negative under the mirrored noise, which is as likely. So a picture that is darker than mid-grey at large can
be mirrored before the network and the prediction mirrored back behind it: of each such pair one is learned (canonicalisation; Kaba et al.,
2211.06489). What differs between the two, the colours that words name, needs the network to be told which it sees. (Pictures about as dark as light fall to
either side by chance: it learns both of those.)

The mean of all pixels shows through all but the strongest noise: of 64 x 64 x 3 it has a deviation of 0.009, half a hundredth of what lies between a dark
ground and a light one. Nearer the noise than `seen_from` it would be told by chance, and a network that goes by it there, as it rightly does from there on,
draws the ground that the noise seems to show and not the one that the caption names (docs/experiments.md, "Negatives"). So there nothing is mirrored, the
mean is taken out, and the network is told that, too: what is left to go by is the caption.

Pixels only: in latents the negative is no reflection.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNSEEN, LIGHT, DARK = 0, 1, 2
SIDES = 3


def mid_grey(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Where mid-grey, 0 of pixels in [-1, 1], lies once they are normalised by mean and std [C]: [C]."""
    return -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)


def seen_from(height: int, width: int) -> float:
    """The time from which on pictures of a size show whether they are dark: 0.03 at 64 x 64. More pixels show it sooner, their noise has a smaller mean."""
    ratio = 0.03 / 0.97 * 64 / math.sqrt(height * width)  # of data to noise, t / (1 - t)
    return ratio / (1 + ratio)


def side_of(z: Tensor, t: Tensor, grey: Tensor, seen: float) -> Tensor:
    """Which side of mid-grey [1, C, 1, 1] the noisy z [B, C, H, W] at t [B] shows: `LIGHT` or `DARK`, before the time `seen` `UNSEEN` [B], int64."""
    dark = (z - _at(t) * grey).mean((1, 2, 3)) < 0
    return torch.where(t > seen, torch.where(dark, DARK, LIGHT), UNSEEN)


def shown(z: Tensor, t: Tensor, grey: Tensor, side: Tensor) -> Tensor:
    """What the network is to see of z [B, C, H, W]: its negative where it is dark, no mean [C] where none can be seen yet.

    Of what it puts out, a predicted velocity lacks that mean (a hundredth of a deviation), predicted data do not.
    """
    unseen = (side == UNSEEN).view(-1, 1, 1, 1)
    return torch.where(unseen, z - z.mean((2, 3), keepdim=True), mirrored(z, _at(t) * grey, side))


def mirrored(x: Tensor, middle: Tensor, side: Tensor) -> Tensor:
    """`2 middle - x` [B, C, H, W] where the side [B] is dark, else x. Data and velocities are mirrored about mid-grey, a noisy z about t times that."""
    return torch.where((side == DARK).view(-1, 1, 1, 1), 2 * middle - x, x)


def _at(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)
