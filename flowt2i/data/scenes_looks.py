"""What the built-in pictures are made of: shapes as antialiased masks, colours and backgrounds."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from flowt2i.errors import UserError, nearest

Image = NDArray[np.uint8]
Rgb = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLOURS: dict[str, Rgb] = {
    "red": (218, 32, 44),
    "orange": (247, 126, 20),
    "yellow": (253, 216, 16),
    "green": (38, 160, 70),
    "blue": (40, 95, 235),
    "purple": (128, 45, 190),
    "pink": (245, 100, 180),
    "brown": (135, 78, 35),
}
# Names that are no object's colour: "a blue star on a pale blue background" would ask more of a small text encoder than of the flow.
BACKGROUNDS: dict[str, tuple[Rgb, Rgb]] = {  # colour at the top, colour at the bottom
    "white": ((255, 255, 255), (255, 255, 255)),
    "grey": ((190, 193, 198), (190, 193, 198)),
    "cream": ((252, 238, 205), (252, 238, 205)),
    "sky": ((192, 224, 252), (192, 224, 252)),
    "mint": ((196, 244, 208), (196, 244, 208)),
    "navy": ((22, 28, 68), (22, 28, 68)),
    "sunset": ((218, 202, 252), (255, 226, 190)),
}


@lru_cache(maxsize=64)
def backdrop(name: str, size: int) -> Image:
    """A background, uint8 [size, size, 3]."""
    top, bottom = (np.array(rgb, np.float32) for rgb in BACKGROUNDS[name])
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top + (bottom - top) * down + 0.5, (size, size, 3)).astype(np.uint8)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, width: int) -> NDArray[np.float32]:
    """How much of each pixel a shape `width` pixels wide covers, float32 [width + 2, width + 2] in 0..1."""
    fine = 8
    axis = ((np.arange((width + 2) * fine) + 0.5) / fine - 1 - width / 2) / (width / 2)
    inside = _inside(shape, axis[None, :], axis[:, None])
    return inside.reshape(width + 2, fine, width + 2, fine).mean((1, 3), dtype=np.float32)


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points lie in the shape; it spans [-1, 1], y points down."""
    radius = np.hypot(x, y)
    match shape:
        case "circle":
            return radius <= 0.97
        case "ring":
            return (radius <= 1) & (radius >= 0.55)
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.88
        case "diamond":
            return abs(x) / 0.76 + abs(y) <= 1
        case "triangle":
            return (y <= 0.84) & (abs(x) <= (y + 0.92) / 1.76)
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 0.96)
        case "star":
            y = y + 0.05
            turn = abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # angle from the nearest tip
            inner, tip = 0.46, 1.05
            along, off = np.hypot(x, y) * np.cos(turn), np.hypot(x, y) * np.sin(turn)
            corner = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
            return (tip - along) * corner[1] >= off * (tip - corner[0])
        case "heart":
            x, y = x * 1.16, 0.16 - y * 1.14
            return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3
    raise UserError(f"unknown shape {shape!r}{nearest(shape, SHAPES)}")
