"""Shapes of pictures: aspect buckets, which of them a picture falls into and what it loses there, and sizes that a model can make.

A shape is (width, height) in pixels, written 80x48. Buckets are a few shapes of about equal area, so that one noise schedule, one micro-batch and one
position scale serve them all (NovelAI 2022; SDXL, Podell et al. 2307.01952, sec. 2.3). Pure functions; imports no torch.
"""

import math
import re
from collections.abc import Sequence

from flowt2i.errors import UserError

Shape = tuple[int, int]  # width, height

STEPS = 16  # sides of derived buckets are multiples of this part of the square's side at least: 7 to 15 buckets from 56 pixels on, not hundreds
AREA = 1.5  # buckets are at most so many times larger or smaller than the square: beyond it the noise would mean something else
MOST = 64  # buckets of a list that is given; each costs a graph where blocks are compiled


def name(shape: Shape) -> str:
    """ "80x48"."""
    return f"{shape[0]}x{shape[1]}"


def parse(text: str) -> list[Shape]:
    """Shapes of a list such as "64x64,80x48", in the order of width and height. UserError where it is none, or names one twice."""
    found: list[Shape] = []
    for word in text.replace(" ", "").split(","):
        sides = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", word)
        if not sides or not int(sides[1]) or not int(sides[2]):
            raise UserError(f"--buckets {text[:60]!r}: {word[:20]!r} is no shape; give `auto`, or WIDTHxHEIGHT in pixels such as 64x64,80x48,48x80")
        found.append((int(sides[1]), int(sides[2])))
    twice = [shape for shape in found if found.count(shape) > 1]
    if twice or len(found) > MOST:
        raise UserError(f"--buckets: {name(twice[0])} is there twice" if twice else f"--buckets: {len(found)} shapes are more than {MOST}: give fewer")
    return sorted(found)


def derived(image_size: int, unit: int, max_aspect: float) -> list[Shape]:
    """Buckets round the square of this side, in order: sides are multiples of a step, the longer at most `max_aspect` times the shorter.

    The step is `unit`, what codec and patch can make, or the next multiple of it above a sixteenth of the square's side. For each shorter side there is one
    longer one, that of the area nearest to the square's. UserError where the unit does not divide the square's own side, or makes nothing but it.
    """
    if image_size % unit:
        near = nearest_multiple(image_size, unit)
        raise UserError(f"--buckets auto: --image-size {image_size} is not a multiple of {unit}, the step of the sides: take {near}")
    step = unit * max(1, -(-image_size // (STEPS * unit)))
    found = {(image_size, image_size)}
    for short in range(step, image_size, step):
        long = nearest_multiple(image_size**2 / short, step)
        if image_size <= long <= max_aspect * short and _fits(short * long, image_size):
            found |= {(long, short), (short, long)}
    if len(found) == 1:
        raise UserError(
            f"--buckets auto: sides that are multiples of {step}, the longer one at most {max_aspect:g} times the shorter, make no shape but the square of "
            f"{image_size}: take a larger --image-size or --max-aspect, or leave --buckets out"
        )
    return sorted(found)


def buckets(asked: str, image_size: int, unit: int, max_aspect: float) -> list[Shape]:
    """The buckets that `prepare --buckets` asks for; none for "". unit: what codec and patch can make, or a multiple of it.

    UserError for a side that is no multiple of it, and for an area far from the square's.
    """
    if not asked:
        return []
    if asked == "auto":
        return derived(image_size, unit, max_aspect)
    found = parse(asked)
    for width, height in found:
        require(width, height, unit, f"--buckets {name((width, height))}", "codec and patch make")
        if not _fits(width * height, image_size):
            side = nearest_multiple(math.sqrt(width * height), unit)
            raise UserError(
                f"--buckets {name((width, height))} has {width * height / image_size**2:.2g} times the pixels of --image-size {image_size}, and the shapes of "
                f"a dataset share one noise schedule: give --image-size {side}, or other buckets"
            )
    return found


def _fits(area: float, image_size: int) -> bool:
    return 1 / AREA <= area / image_size**2 <= AREA


def fitting(width: int, height: int, shapes: Sequence[Shape]) -> Shape:
    """The shape whose ratio of sides is nearest to that of a picture (the logarithms differ least): what it loses there is least; the first of equal ones."""
    return min(shapes, key=lambda shape: (abs(math.log(width * shape[1] / (height * shape[0]))), shape))


def kept(width: int, height: int, shape: Shape) -> float:
    """The share of a picture's area that is left when it is resized to cover a shape and what stands over is cut off."""
    ratio = width * shape[1] / (height * shape[0])
    return min(ratio, 1 / ratio)


def cover(width: int, height: int, shape: Shape) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) in the middle of a picture that has a shape's ratio of sides."""
    wide, high = (float(width), width * shape[1] / shape[0]) if width * shape[1] <= height * shape[0] else (height * shape[0] / shape[1], float(height))
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


def nearest_multiple(side: float, unit: int) -> int:
    """The multiple of `unit` nearest to a side, at least one of it."""
    return max(1, round(side / unit)) * unit


def require(width: int, height: int, unit: int, what: str, who_makes: str) -> None:
    """UserError, naming the nearest shape that can be made, where a side is no multiple of `unit`."""
    if width % unit or height % unit or min(width, height) < 1:
        near = name((nearest_multiple(width, unit), nearest_multiple(height, unit)))
        raise UserError(f"{what} cannot be made: {who_makes} sides that are multiples of {unit}, such as {near}")
