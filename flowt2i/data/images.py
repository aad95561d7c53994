"""From the bytes of any image file to an RGB picture of a wanted shape, safely: sizes are checked before anything is decoded."""

import functools
import io
import struct
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowt2i.data.sample import Dropped
from flowt2i.shapes import Shape, cover, fitting

# No format that runs a program (EPS) or has a parser few people use. Pictures of several (MPO) open as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit, of which Pillow only warns; about 0.9 GB at the worst moment of decoding
BIG_PIXELS = 16_000_000  # from here on pictures are decoded one at a time over all workers, to bound the memory

_BICUBIC = Image.Resampling.BICUBIC


def load_square(data: bytes, size: int, min_side: int = 1, max_aspect: float = 1e9, big: AbstractContextManager | None = None) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [size, size, 3]: see `load_fitted`."""
    return load_fitted(data, [(size, size)], min_side, max_aspect, big)[0]


def load_fitted(
    data: bytes, shapes: Sequence[Shape], min_side: int = 1, max_aspect: float = 1e9, big: AbstractContextManager | None = None
) -> tuple[NDArray[np.uint8], Shape]:
    """Decode an image file to uint8 [height, width, 3], of that of the shapes in which it loses least, and its own (width, height) as it is seen.

    The first frame, with EXIF orientation applied, RGB on white under transparency; antialiased resize until the shape is covered and
    centre crop in one step. `big` is entered while a very large picture is decoded. Dropped where it cannot be.
    """
    if not data:
        raise Dropped("undecodable image", "empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bombs and odd metadata; our own checks decide
        try:
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                _check_size(image, min_side, max_aspect)
                with (big or nullcontext()) if image.width * image.height > BIG_PIXELS else nullcontext():
                    return _fitted(image, shapes)
        except Dropped:
            raise
        except Image.DecompressionBombError as error:
            raise Dropped("too many pixels", str(error)[:200]) from error
        except MemoryError as error:
            raise Dropped("undecodable image", "out of memory") from error
        except Exception as error:  # Pillow's plugins raise nearly anything on corrupt files
            raise Dropped("undecodable image", f"{type(error).__name__}: {error}"[:200]) from error


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # a build of Pillow may lack some


def _check_size(image: Image.Image, min_side: int, max_aspect: float) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Dropped("too many pixels", f"{width} x {height}")
    if min(width, height) < max(min_side, 1):
        raise Dropped("too small", f"{width} x {height}")
    if max(width, height) > max_aspect * min(width, height):
        raise Dropped("aspect ratio", f"{width} x {height}")


def _fitted(image: Image.Image, shapes: Sequence[Shape]) -> tuple[NDArray[np.uint8], Shape]:
    orientation = _orientation(image) if image.format != "TIFF" else None  # Pillow turns these by itself
    seen = (image.height, image.width) if _is_sideways(orientation) else image.size  # as it is seen
    shape = fitting(*seen, shapes)
    lying = (shape[1], shape[0]) if _is_sideways(orientation) else shape  # as the file has it
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (2 * lying[0], 2 * lying[1]))  # decodes at 1/2, 1/4 or 1/8 while both sides stay at least twice the target
    box = cover(*image.size, lying)
    rgb = to_rgb(image)
    if rgb.size != lying:
        rgb = rgb.resize(lying, _BICUBIC, box=box, reducing_gap=3.0)
    if orientation is not None:  # what is in the middle stays there, so turning the small picture is enough
        rgb = rgb.transpose(orientation)
    return np.asarray(rgb), seen


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit scaled down rather than clipped, transparency laid on white. An RGB picture comes back itself, loaded."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_grey(image)
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    if image.mode == "RGB":  # most are: a copy costs time
        image.load()
        return image
    return image.convert("RGB")


def _deep_to_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":  # TIFF: either 0..1 or 0..255
        scale = 255.0 if np.nanmax(values, initial=0.0) <= 1.0 else 1.0
        grey = np.empty(values.shape, np.uint8)
        for top in range(0, len(values), 64):  # in strips: copies in floats of the whole would need a lot of memory
            strip = np.nan_to_num(values[top : top + 64] * scale, nan=0.0, posinf=255.0, neginf=0.0)
            grey[top : top + 64] = np.clip(strip + 0.5, 0, 255)
        return Image.fromarray(grey)
    if image.mode == "I" and values.max(initial=0) <= 255:
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))  # as Pillow does for 16-bit RGB


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _is_sideways(turn: Image.Transpose | None) -> bool:
    return turn is not None and turn in [_TURNS[n] for n in (5, 6, 7, 8)]


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except (ValueError, TypeError, SyntaxError, OSError, KeyError, struct.error):  # a broken EXIF block spoils no picture
        return None
