"""Where a patch lies in its picture, as features and as rotations: the same place has the same position at every size.

Places are measured in patches of a base grid, the 8 x 8 patches of a 64-pixel picture. A grid of other fineness covers the same square: its
patches are smaller or larger steps in it, so a 4 x 4 grid lies at 0.5, 2.5, 4.5, 6.5 and a 16 x 16 one at -0.25, 0.25, ..., 7.25. What a model
learned about places at one size therefore holds at the next ("position interpolation", Chen et al. 2306.15595, sec. 2.3; for pictures, Esser et
al. 2403.03206, sec. 5.3.2). A grid that is not square keeps its patches square, has the area of the base grid and shares its centre.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 8  # patches along a side of the base grid


def places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column [rows * columns] of every patch's centre, in patches of the base grid, fp64; row by row. Of the base grid: 0 to 7."""
    step = BASE / math.sqrt(rows * columns)
    y, x = ((BASE - 1) / 2 + step * (torch.arange(count, dtype=torch.float64, device="cpu") - (count - 1) / 2) for count in (rows, columns))
    return y.repeat_interleave(columns), x.repeat(rows)


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """Sine and cosine features [n, width] of positions [n] at geometrically spaced frequencies (1706.03762, sec. 3.5)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sincos_2d(rows: int, columns: int, width: int) -> Tensor:
    """[rows * columns, width]: half of the width speaks of the row, half of the column."""
    y, x = places(rows, columns)
    return torch.cat([sincos_1d(y, width // 2), sincos_1d(x, width // 2)], 1)


def rotation_2d(rows: int, columns: int, head: int) -> Tensor:
    """Cosines and sines [2, rows * columns, head / 2] that turn queries and keys by their place.

    Axial rotary positions (Su et al. 2104.09864, applied to each axis by half of the head): frequencies fall geometrically from a
    quarter turn a patch of the base grid to a 64th of a turn.
    """
    y, x = places(rows, columns)
    frequencies = math.pi / 2 * 16 ** (-torch.arange(head // 4, dtype=torch.float64, device=y.device) / (head // 4))
    angles = torch.cat([y[:, None] * frequencies, x[:, None] * frequencies], 1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Learned positions [rows * columns, d] of an old grid (rows, columns), interpolated bicubically for a new one."""
    image = table.view(1, *old, -1).permute(0, 3, 1, 2)
    return F.interpolate(image, size=new, mode="bicubic", align_corners=False)[0].flatten(1).T
