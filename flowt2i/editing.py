"""Drawing from more than a prompt: between two seeds or prompts, from a given picture, inside a mask. Tensors in, tensors out.

Shapes: latents and noise are `[B, C, H, W]`, normalised; masks `[1, 1, H, W]`, 1 where the picture is to be drawn anew.
"""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowt2i import flow
from flowt2i.data.images import load_square
from flowt2i.data.sample import Dropped
from flowt2i.errors import UserError
from flowt2i.solvers import Velocity

Picture = Image.Image | str | Path  # what --init and --mask take


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Along the great circle from `first` to `second` (Shoemake 1985, sec. 3.3), picture by picture; share [B, 1, 1, 1].

    Between two draws of Gaussian noise a straight line would run through noise that is too weak, which the network never saw.
    """
    cosine = F.cosine_similarity(first.double().flatten(1), second.double().flatten(1)).clamp(-1, 1).view(-1, 1, 1, 1)
    angle = cosine.arccos()
    straight = angle.sin() < 1e-6  # the same or opposite: there is no one great circle
    sine = angle.sin().where(~straight, torch.ones_like(angle))
    a, b = ((1 - share) * angle).sin() / sine, (share * angle).sin() / sine
    a, b = a.where(~straight, (1 - share).to(a.dtype)), b.where(~straight, share.to(b.dtype))
    return (a * first + b * second).to(first.dtype)


def start_from(data: Tensor, noise: Tensor, strength: float) -> Tensor:
    """Where the flow starts for a given picture: the point of its path at `t = 1 - strength` (SDEdit, Meng et al. 2108.01073, for straight paths)."""
    return flow.interpolate(data, noise, torch.full((len(noise),), 1 - strength, device=noise.device))


def keep_outside(velocity: Velocity, data: Tensor, mask: Tensor) -> Velocity:
    """The field with its answer known outside the mask: there the velocity is `(data - z) / (1 - t)`, that of the given picture.

    What starts on the known path stays on it at every step of any solver, because along a straight path this velocity is constant, and the network
    sees the kept part just as noisy as the part it draws (the replacement of Lugmayr et al., RePaint, 2201.09865, eq. 8, without drawing noise anew).
    """

    def masked(z: Tensor, t: Tensor) -> Tensor:
        known = (data - z) / (1 - t).clamp_min(1e-6)
        return torch.where(mask > 0.5, velocity(z, t), known)

    return masked


def shrink_mask(mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A mask [1, 1, S, S] of pixels -> [1, 1, H, W] of latents: a latent is drawn anew where any of its pixels is."""
    return F.adaptive_max_pool2d(mask, shape[1:])


def paste(drawn: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The original's own pixels outside the mask: uint8 [N, S, S, 3], [S, S, 3], bool [S, S] -> [N, S, S, 3]."""
    return np.where(mask[None, :, :, None], drawn, original[None])


def load_picture(picture: Picture, size: int, what: str) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture as uint8 [size, size, 3] (its centre square, resized), and its own (width, height). UserError where it cannot be read."""
    try:
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            content = buffer.getvalue()
        else:
            content = Path(picture).read_bytes()
        square = load_square(content, size)
        with Image.open(io.BytesIO(content)) as image:
            return square, image.size
    except OSError as error:
        raise UserError(f"cannot read {what} {str(picture)[:200]!r}: {error.strerror or error}") from error
    except Dropped as error:
        raise UserError(f"{what} {str(picture)[:200]!r} is not a picture that can be used: {error}") from error


def load_init(init: Picture, mask: Picture | None, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The given picture uint8 [size, size, 3] and, with a mask, bool [size, size]: true where its mask is bright. UserError where they do not fit."""
    original, shape = load_picture(init, size, "the picture to start from")
    if mask is None:
        return original, None
    grey, mask_shape = load_picture(mask, size, "the mask")
    if mask_shape != shape:
        raise UserError(f"the mask has {mask_shape[0]}x{mask_shape[1]} pixels and the picture {shape[0]}x{shape[1]}: give one of the same size")
    bright = grey.mean(2) >= 128
    if not bright.any():
        raise UserError("the mask is black all over: paint white what is to be drawn anew")
    return original, bright
