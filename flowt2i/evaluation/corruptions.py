"""Known damage at growing strength: a score is worth something only if it puts more of it further away (Heusel et al. 1706.08500, figure 3)."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter


def blur(image: Image.Image, strength: float, seed: int) -> Image.Image:
    """Gaussian, of `strength` pixels."""
    return image.filter(ImageFilter.GaussianBlur(strength))


def noise(image: Image.Image, strength: float, seed: int) -> Image.Image:
    """Gaussian, of a standard deviation of `strength` grey levels."""
    values = np.asarray(image) + np.random.default_rng(seed).normal(0, strength, (image.height, image.width, 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, strength: float, seed: int) -> Image.Image:
    """JPEG of quality 100 - `strength`."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(100 - strength))
    return Image.open(file).convert("RGB")


def colour(image: Image.Image, strength: float, seed: int) -> Image.Image:
    """Red up and blue down by `strength` grey levels, clipped."""
    values = np.asarray(image).astype(np.int16) + np.array([round(strength), 0, -round(strength)], np.int16)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


CORRUPTIONS: dict[str, tuple[Callable[[Image.Image, float, int], Image.Image], tuple[float, ...]]] = {  # what, and four strengths at 64 pixels
    "blur": (blur, (0.7, 1, 2, 4)),
    "noise": (noise, (8, 16, 32, 64)),
    "jpeg": (jpeg, (40, 70, 85, 95)),
    "colour": (colour, (32, 64, 96, 160)),
}


def corrupt(images: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """uint8 [N, H, W, 3] -> the same with one kind of damage; picture k always gets the same."""
    function, _ = CORRUPTIONS[kind]
    return np.stack([np.asarray(function(Image.fromarray(image), strength, k)) for k, image in enumerate(images)])
