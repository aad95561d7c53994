"""Drawing from more than a prompt: between two seeds or prompts, from a given picture, inside a mask.

Shapes: latents and noise are `[B, C, H, W]`, normalised; masks `[1, 1, H, W]`, 1 where the picture is to be drawn anew.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowt2i import flow
from flowt2i.data.images import load_fitted
from flowt2i.data.sample import Dropped
from flowt2i.errors import UserError
from flowt2i.precision import double
from flowt2i.shapes import Shape
from flowt2i.solvers import Velocity

Picture = Image.Image | str | Path  # what --init and --mask take
LARGEST_SEED = 2**62


@dataclass(frozen=True)
class Start:
    """What one picture is drawn from: a prompt and a seed, or a place between two of either."""

    prompt: str
    seed: int
    to: str | None = None  # another prompt
    to_seed: int | None = None  # another seed
    mix: float = 0.0  # how far from the first to the second: 0 to 1

    def way(self) -> dict[str, Any]:
        """Where it leads and how far, for the picture's metadata; nothing where it leads nowhere."""
        ends = {name: end for name, end in (("to", self.to), ("to_seed", self.to_seed)) if end is not None}
        return ends | {"mix": self.mix} if ends else {}


def starts(prompts: Sequence[str], seed: int, num: int, variation: float, to: str | None, to_seed: int | None, mix: float | None) -> list[Start]:
    """`num` starts of each prompt, in order; UserError where the settings are out of range or contradict each other.

    Picture k has seed `seed + k`. With `variation` above 0 all have the seed `seed`, each its noise moved by that share of the way towards the noise of
    another seed. With `to` or `to_seed` the pictures of a prompt lead from it to there in even steps (or all stand at `mix`), all from one seed.
    """
    if not prompts:
        raise UserError("no prompt: give at least one")
    if any(not p.strip() for p in prompts):
        raise UserError("an empty prompt: say what the picture should show")
    if isinstance(mix, int):
        mix = float(mix)
    if type(num) is not int or num < 1 or type(seed) is not int or not 0 <= seed < LARGEST_SEED or not 0 <= (to_seed or 0) < LARGEST_SEED:
        raise UserError("num must be at least 1 and seeds between 0 and 2^62")
    for name, share in (("variation", variation), ("mix", mix or 0.0)):
        if not 0 <= share <= 1:  # NaN is not between anything
            raise UserError(f"{name} {share} is out of range: choose 0 to 1")
    if to is not None and not to.strip():
        raise UserError("an empty prompt to go to: say what the last picture should show")
    if to is None and to_seed is None:
        if mix is not None:
            raise UserError("a mix needs another prompt or seed to mix with: give `to` or `to_seed`")
        if variation:
            return [Start(p, seed, None, seed + 1 + i * num + k, variation) for i, p in enumerate(prompts) for k in range(num)]
        return [Start(p, seed + i * num + k) for i, p in enumerate(prompts) for k in range(num)]
    if variation:
        raise UserError("a variation and a way to another prompt or seed cannot be had at once: leave one out")
    places = [mix] * num if mix is not None else ([0.5] if num == 1 else [k / (num - 1) for k in range(num)])
    return [Start(p, seed, to, to_seed, place) for p in prompts for place in places]


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Along the great circle from `first` to `second` (Shoemake 1985), picture by picture; share [B, 1, 1, 1].

    Between two draws of Gaussian noise a straight line would run through noise that is too weak, which the network never saw.
    """
    one, other, rest, share = map(double, (first, second, 1 - share, share))
    cosine = F.cosine_similarity(one.flatten(1), other.flatten(1)).clamp(-1, 1).view(-1, 1, 1, 1)
    angle = cosine.arccos()
    straight = angle.sin() < 1e-6  # the same or opposite: there is no one great circle
    sine = angle.sin().where(~straight, torch.ones_like(angle))
    a, b = (rest * angle).sin() / sine, (share * angle).sin() / sine
    return (a.where(~straight, rest) * one + b.where(~straight, share) * other).to(first)


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
    """A mask [1, 1, H, W] of pixels -> [1, 1, h, w] of latents: a latent is drawn anew where any of its pixels is."""
    return F.adaptive_max_pool2d(mask, shape[1:])


def paste(drawn: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The original's own pixels outside the mask: uint8 [N, H, W, 3], [H, W, 3], bool [H, W] -> [N, H, W, 3]."""
    return np.where(mask[None, :, :, None], drawn, original[None])


def load_picture(picture: Picture, sizes: Sequence[Shape], what: str) -> tuple[np.ndarray, Shape]:
    """A picture as uint8 [H, W, 3] of that of the sizes (width, height) it fits best (its middle, resized), and its own size, turned as its EXIF says.

    UserError where it cannot be read.
    """
    try:
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            content = buffer.getvalue()
        else:
            content = Path(picture).read_bytes()
        return load_fitted(content, sizes)
    except OSError as error:
        raise UserError(f"cannot read {what} {str(picture)[:200]!r}: {error.strerror or error}") from error
    except ValueError as error:  # a name that no file can have
        raise UserError(f"cannot read {what} {str(picture)[:200]!r}: {error}") from error
    except Dropped as error:
        raise UserError(f"{what} {str(picture)[:200]!r} is not a picture that can be used: {error}") from error


def load_init(init: Picture, mask: Picture | None, sizes: Sequence[Shape]) -> tuple[np.ndarray, np.ndarray | None]:
    """The given picture uint8 [H, W, 3], of one of the sizes, and, with a mask, bool [H, W]: true where its mask is bright.

    UserError where they do not fit.
    """
    original, shape = load_picture(init, sizes, "the picture to start from")
    if mask is None:
        return original, None
    grey, mask_shape = load_picture(mask, sizes, "the mask")
    if mask_shape != shape:
        raise UserError(f"the mask has {mask_shape[0]}x{mask_shape[1]} pixels and the picture {shape[0]}x{shape[1]}: give one of the same size")
    bright = grey.mean(2) >= 128
    if not bright.any():
        raise UserError("the mask is black all over: paint white what is to be drawn anew")
    return original, bright


def fingerprint(pixels: np.ndarray) -> str:
    """The first half of the sha256 of a picture's pixels: whether it is the one that was used before."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:32]
