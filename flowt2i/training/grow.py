"""Weights of a model, made to fit one of another picture size or patch. Pure functions on named tensors.

Almost all weights know no size: attention takes any number of patches, and positions are places in the picture (`positions`). What does is
- the learned table of positions, where a model has one: interpolated bicubically;
- the patch embedding and the output, where the patch is another: resized so that the model sees in an enlarged picture what it saw before
  (the PI-resize of FlexiViT, Beyer et al. 2212.08013: the pseudo-inverse of bilinear resizing), and puts out what it put out, enlarged
  (of masks that look at their pixel nearly so: what they do with it is not linear).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowt2i.errors import UserError
from flowt2i.model import FlowTransformer
from flowt2i.positions import resize_table


def time_shift(old: tuple[int, ...], new: tuple[int, ...]) -> float:
    """By how much times move towards the noise from latents of shape (C, H, W) to larger ones: `sqrt(m / n)` (Esser et al. 2403.03206, eq. 23).

    m, n: places of what the flow runs on, pixels or cells of a latent. The noise of each is independent, so that what a picture shows at large is
    seen through it the better the more of them there are; with the patch kept, their ratio is the ratio of the numbers of tokens.
    """
    return math.sqrt(math.prod(new[1:]) / math.prod(old[1:]))


def resizing(old: int, new: int) -> Tensor:
    """The matrix [new², old²] that resizes a patch of side `old` bilinearly, row by row; fp64."""
    patches = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    return F.interpolate(patches, size=(new, new), mode="bilinear", align_corners=False, antialias=new < old).flatten(1).T


def resize_embedding(weight: Tensor, channels: int, old: int, new: int) -> Tensor:
    """[d, C old²] -> [d, C new²]: `w B⁺`, so that a patch x enlarged by B is embedded as x was: `w B⁺ B x = w x`."""
    inverse = torch.linalg.pinv(resizing(old, new))
    return (weight.double().view(-1, channels, old * old) @ inverse).flatten(1).to(weight.dtype)


def resize_output(weight: Tensor, channels: int, old: int, new: int) -> Tensor:
    """[C old², ...] -> [C new², ...]: `B w`, so that what is put out is what was, enlarged. Weight or bias of the last layer."""
    parts = weight.double().view(channels, old * old, -1)
    return (resizing(old, new) @ parts).view(channels * new * new, *weight.shape[1:]).to(weight.dtype)


def fitted(tensors: dict[str, Tensor], patch: int, grid: tuple[int, int], model: FlowTransformer) -> dict[str, Tensor]:
    """The tensors of a model of this patch, trained at this grid (rows, columns) of patches, for `model`, which differs from it in these alone."""
    tensors = dict(tensors)
    if "positions" in tensors and grid != (model.rows, model.columns):
        tensors["positions"] = resize_table(tensors["positions"], grid, (model.rows, model.columns)).contiguous()
    if patch != model.patch:
        own, channels = model.state_dict(), model.shape[0]
        name = next(name for name in own if name.startswith("embed.") and name.endswith("weight"))
        if name not in tensors:
            raise UserError(
                f"model.patch {model.patch} makes a patch embedding of other layers than patch {patch} has: choose one nearer to it, or keep the patch"
            )
        tensors[name] = resize_embedding(tensors[name], channels, patch, model.patch)
        for name in ("unembed.weight", "unembed.bias"):
            tensors[name] = resize_output(tensors[name], channels, patch, model.patch)
        for name in ("masks.weight", "masks.bias") if "masks.weight" in tensors else ():  # a mask is a picture of one channel
            tensors[name] = resize_output(tensors[name], model.config.masks + model.config.pixel_masks, patch, model.patch)
    return tensors
