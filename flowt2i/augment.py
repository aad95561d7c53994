"""Augmentation that does not leak: moved, turned, scaled and mirrored training pictures, and the model told of what was done.

A small set is seen hundreds of times, and a model that has learned its pictures by heart draws combinations it was not shown the worse. Changed pictures are
as good as new ones, but a model that is not told draws turned and mirrored ones, too. So it gets what was done as a label beside the time, and is asked for
pictures to which nothing was done (Karras et al., EDM, 2206.00364, sec. 5 and appendix F.2). Pure functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = 6  # mirrored; log2 of the scale; cos - 1 and sin of the angle; shift to the right and down
NUMBERS = 9  # uniform numbers an image: four for what is done, and five for how much
SCALE, TURN, SHIFT = 0.2, 0.25, 0.125  # deviations: of log2 of the scale, of the angle in radians, of the shift in sides of the picture


def labels(numbers: Tensor, share: float) -> Tensor:
    """What is done to each image [b, LABELS], 0 for nothing, from uniform numbers [b, NUMBERS]: mirroring, scaling, turning and shifting, each of a share."""
    mirrored, scaled, turned, shifted = (numbers[:, :4] < share).to(numbers.dtype).unbind(1)
    normal = torch.special.ndtri(numbers[:, 4:].double().clamp(0.01, 0.99)).to(numbers.dtype)
    log_scale, angle = scaled * SCALE * normal[:, 0], turned * TURN * normal[:, 1]
    right, down = shifted * SHIFT * normal[:, 2], shifted * SHIFT * normal[:, 3]
    return torch.stack([mirrored, log_scale, angle.cos() - 1, angle.sin(), right, down], 1)


def warp(data: Tensor, labels: Tensor) -> Tensor:
    """Images [b, C, H, W] with it done, bilinearly; what comes in from outside has the mean colour of the corners. Images whose label is 0 stay bit for bit."""
    rows = labels.ne(0).any(1).nonzero().flatten()
    if not len(rows):
        return data
    mirrored, log_scale, cos, sin, right, down = labels[rows].unbind(1)
    aspect = data.shape[3] / data.shape[2]
    # where each point of the result comes from, in coordinates of -1..1: shift back, turn back, scale back, mirror
    zoom, cos = torch.exp2(-log_scale), cos + 1
    sign = 1 - 2 * mirrored
    matrix = torch.stack([sign * zoom * cos, sign * zoom * sin / aspect, -zoom * sin * aspect, zoom * cos], 1).view(-1, 2, 2)
    offset = -matrix @ torch.stack([2 * right, 2 * down], 1).unsqueeze(2)
    grid = F.affine_grid(torch.cat([matrix, offset], 2), [len(rows), *data.shape[1:]], align_corners=False)
    fill = data[rows][:, :, :: data.shape[2] - 1, :: data.shape[3] - 1].mean((2, 3), keepdim=True)
    return data.index_copy(0, rows, fill + F.grid_sample(data[rows] - fill, grid.to(data.dtype), padding_mode="zeros", align_corners=False))
