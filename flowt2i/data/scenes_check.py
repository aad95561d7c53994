"""Which parts of a caption a picture obeys, found by measuring the picture: nothing here is learned.

The background is recognised from the border and taken away; what is left falls into connected objects; each object's colour is
the nearest palette colour of its core, its shape the best-matching template once position and scale are normalised, its width
follows from its area. Then the objects are held against the things the caption names. Blur and noise as weak as a good model's
are forgiven, smears and strays are not. The thresholds below are in pixels of 64 x 64, to which every picture is resized.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from flowt2i.data.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Image, Scene, Thing, parse
from flowt2i.data.scenes_looks import backdrop, shape_mask
from flowt2i.errors import UserError

SIDE = 64
CONTRAST = 44.0  # RGB distance from the background at which a pixel belongs to an object
STRAY = 10  # pixels: smaller patches are strays, not objects
STRAYS = 30  # pixels of strays in all that a clean picture may have
BACKGROUND_ERROR = 26.0  # greatest median RGB distance of the border from a background that is recognised
COLOUR_ERROR = 62.0  # greatest RGB distance of an object's core from its palette colour
FOREIGN = 0.12  # greatest share of an object that is of another colour than its core
OVERLAP = 0.75  # least soft intersection over union with a shape's template
MARGIN = 0.03  # least lead of that over the next shape's: what is half circle, half square is neither
SMALL_BELOW = 20.0  # widths under it are small (14 to 16 drawn), others large (24 to 28)
MOST = 8  # objects looked at; more are never asked for
GRID = 24  # samples along each side of a normalised shape

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """True where the picture shows what the caption says, False where not, None where the caption says nothing."""

    shape: bool | None
    colour: bool | None
    size: bool | None
    count: bool | None
    relation: bool | None
    background: bool | None

    @property
    def all(self) -> bool:
        """Whether everything that the caption says holds."""
        return False not in self.atoms().values()

    def atoms(self) -> dict[str, bool | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Found:
    """One object in a picture; None where it is none that the scenes know."""

    shape: str | None
    colour: str | None
    size: str | None
    centre: tuple[float, float]  # x, y
    width: float
    overlap: float  # with the template of the best shape


def check(image: Image, asked: str | Scene) -> Verdict:
    """Hold a picture (uint8 [H, W, 3], any size) against a caption of the scene grammar or what `parse` made of it."""
    scene = parse(asked) if isinstance(asked, str) else asked
    background, objects, clean = look(image)
    wanted = [thing for thing in scene.things for _ in range(thing.count)]
    matches = _matches(objects, wanted, scene.relation)
    return Verdict(
        shape=_holds(matches, wanted, "shape"),
        colour=_holds(matches, wanted, "colour"),
        size=None if all(thing.size is None for thing in wanted) else _holds(matches, wanted, "size"),
        count=clean and len(objects) == len(wanted),
        relation=None if scene.relation is None else bool(matches) and all(_lies(match, scene.relation) for match in matches),
        background=None if scene.background is None else background == scene.background,
    )


def look(image: Image) -> tuple[str | None, list[Found], bool]:
    """Background, objects (largest first) and whether the picture is free of strays; the image is uint8 [H, W, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"the checker reads uint8 pictures [H, W, 3], not {image.dtype} {list(image.shape)}")
    if image.shape[:2] != (SIDE, SIDE):
        image = np.asarray(PillowImage.fromarray(image).resize((SIDE, SIDE), PillowImage.Resampling.BICUBIC))  # antialiased
    background, rest = _subtract_background(image.astype(np.float32))
    far = np.einsum("hwc,hwc->hw", rest, rest) > CONTRAST**2
    labels, areas = _connected(far)
    order = np.argsort(-areas[1:], kind="stable") + 1
    big = [int(label) for label in order if areas[label] >= STRAY]
    strays = int(areas[1:].sum() - sum(areas[label] for label in big))
    objects = [_measure(rest, image, labels == label) for label in big[:MOST]]
    return background, objects, strays <= STRAYS and len(big) <= MOST


# ---------------------------------------------------------------- what the picture shows


@lru_cache(maxsize=1)
def _border() -> tuple[Mask, Floats, tuple[str, ...]]:
    """Which pixels are border, the [K, P, 3] colours that each background has there, and the names of the backgrounds."""
    border = np.ones((SIDE, SIDE), bool)
    border[2:-2, 2:-2] = False
    return border, np.stack([backdrop(name, SIDE)[border] for name in BACKGROUNDS]).astype(np.float32), tuple(BACKGROUNDS)


def _subtract_background(image: Floats) -> tuple[str | None, Floats]:
    """Name of the background and [64, 64, 3] the picture less it; None and less the border's median where it is unknown."""
    border, known, names = _border()
    seen = image[border]
    error = np.median(np.linalg.norm(known - seen, axis=2), axis=1)
    best = int(error.argmin())
    if error[best] > BACKGROUND_ERROR:
        return None, np.asarray(image - np.median(seen, axis=0), np.float32)
    shift = np.median(seen - known[best], axis=0)  # a model's white need not be quite white
    return names[best], image - backdrop(names[best], SIDE) - shift


def _connected(mask: Mask) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Label the 4-connected patches of a mask 1, 2, ... (0: none); returns the labels [H, W] and the area of every label."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    step = np.diff(padded, axis=1)
    rows, starts = np.nonzero(step == 1)
    ends = np.nonzero(step == -1)[1]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    # Runs are in reading order, so those of two neighbouring rows are walked like two sorted lists.
    first = np.searchsorted(rows, np.arange(height + 1)).tolist()
    left, right = starts.tolist(), ends.tolist()
    for row in range(1, height):
        above, here = first[row - 1], first[row]
        while above < first[row] and here < first[row + 1]:
            if left[above] < right[here] and left[here] < right[above]:
                a, b = root(above), root(here)
                parent[max(a, b)] = min(a, b)
            if right[above] < right[here]:
                above += 1
            else:
                here += 1
    roots = np.array([root(run) for run in range(len(parent))], np.intp)
    labels = np.zeros(mask.shape, np.intp)
    labels[mask] = np.repeat(np.unique(roots, return_inverse=True)[1] + 1, ends - starts) if len(roots) else 0
    return labels, np.bincount(labels.ravel())


def _measure(rest: Floats, image: Image, patch: Mask) -> Found:
    """Name the object that covers a patch; `rest` is the picture less its background."""
    ys, xs = np.nonzero(patch)
    top, bottom, left, right = max(ys.min() - 1, 0), ys.max() + 2, max(xs.min() - 1, 0), xs.max() + 2
    window = np.s_[top:bottom, left:right]
    patch, rest, image = patch[window], rest[window], image[window]
    wide = np.pad(patch, 1)  # with the antialiased edge, which may lie under the contrast
    wide = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    strength = np.einsum("hwc,hwc->hw", rest, rest) * patch
    core = strength >= np.quantile(strength[patch], 0.6)
    ink = np.median(rest[core], axis=0)  # object colour less background
    colour, error = _nearest_colour(np.median(image[core], axis=0))
    cover = rest @ ink / max(float(ink @ ink), 1.0)
    cover = np.clip(cover, 0, 1)
    foreign = (np.linalg.norm(rest - cover[:, :, None] * ink, axis=2) > COLOUR_ERROR) & patch
    cover = np.where(wide & ~foreign, cover, 0).astype(np.float32)
    one_colour = error <= COLOUR_ERROR and foreign.sum() <= FOREIGN * patch.sum()
    area = max(float(cover.sum()), 1.0)
    y, x = (float((cover.sum(1 - axis) * np.arange(cover.shape[axis])).sum()) / area for axis in (0, 1))
    shape, overlap, lead = _nearest_shape(_normalised(cover, x, y, area))
    width = float(np.sqrt(area / _unit_area(shape)))
    known = overlap >= OVERLAP and lead >= MARGIN
    size = ("small" if width < SMALL_BELOW else "large") if 8 <= width <= 40 else None
    return Found(shape if known else None, colour if one_colour else None, size, (left + x, top + y), width, overlap)


def _nearest_colour(rgb: NDArray[np.floating]) -> tuple[str, float]:
    distance = {name: float(np.linalg.norm(rgb - np.array(known))) for name, known in COLOURS.items()}
    name = min(distance, key=distance.__getitem__)
    return name, distance[name]


def _normalised(cover: Floats, x: float, y: float, area: float) -> Floats:
    """Resample a [h, w] coverage to [GRID, GRID], its centroid x, y in the middle and its area a quarter of the window."""
    half = float(np.sqrt(area))
    offset = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * half
    room = int(half) + 3
    padded = np.pad(cover, room)

    def weights(centre: float, length: int) -> Floats:  # bilinear, as a matrix [GRID, length]
        distance = abs((offset + centre + room)[:, None] - np.arange(length))
        return np.asarray(np.maximum(0, 1 - distance), np.float32)

    return np.asarray(weights(y, padded.shape[0]) @ padded @ weights(x, padded.shape[1]).T, np.float32)


@lru_cache(maxsize=1)
def _templates() -> Floats:
    """[shapes, variants, GRID, GRID]: every shape small and large, sharp and a little blurred."""
    return np.stack([np.stack([_template(shape, width, blur) for width in (15, 26) for blur in (0.0, 0.8)]) for shape in SHAPES])


def _template(shape: str, width: int, blur: float) -> Floats:
    cover = np.pad(shape_mask(shape, width), 3)
    if blur:
        reach = np.arange(len(cover))
        kernel = np.exp(-0.5 * ((reach[:, None] - reach) / blur) ** 2)
        kernel /= kernel.sum(1, keepdims=True)
        cover = (kernel @ cover @ kernel.T).astype(np.float32)
    area = float(cover.sum())
    y, x = (float((cover.sum(1 - axis) * np.arange(len(cover))).sum()) / area for axis in (0, 1))
    return _normalised(cover, x, y, area)


@lru_cache(maxsize=len(SHAPES))
def _unit_area(shape: str) -> float:
    """Area of a shape one pixel wide."""
    return float(shape_mask(shape, 100).sum()) / 100**2


def _nearest_shape(seen: Floats) -> tuple[str, float, float]:
    """The shape whose template has the largest soft intersection over union with what is seen, that overlap, its lead over the next."""
    templates = _templates()
    both, either = np.minimum(templates, seen).sum((2, 3)), np.maximum(templates, seen).sum((2, 3))
    lost = max(0.0, GRID * GRID / 4 - float(seen.sum()))  # what lies outside the window fits no shape
    overlap = (both / (either + lost)).max(1)
    ranked = np.sort(overlap)
    return SHAPES[int(overlap.argmax())], float(ranked[-1]), float(ranked[-1] - ranked[-2])


# ---------------------------------------------------------------- what the caption asks for


def _matches(objects: list[Found], wanted: list[Thing], relation: str | None) -> list[tuple[Found, ...]]:
    """The ways to give each wanted thing an object that agree with the caption best, those in which the relation holds first.

    There are several where they agree alike. Where objects are missing they are shorter than `wanted`.
    """
    length = min(len(objects), len(wanted))
    if length == 0:
        return []
    if relation is None:  # things of one kind: each object counts for itself
        return [tuple(sorted(objects, key=lambda found: -_agreement(found, wanted[0]))[:length])]
    ways = list(permutations(objects, length))
    scores = [sum(_agreement(found, thing) for found, thing in zip(way, wanted)) for way in ways]
    return sorted((way for way, score in zip(ways, scores) if score == max(scores)), key=lambda way: not _lies(way, relation))


def _agreement(found: Found, thing: Thing) -> int:
    return (found.colour == thing.colour) * 4 + (found.shape == thing.shape) * 4 + (found.size == thing.size)


def _holds(matches: list[tuple[Found, ...]], wanted: list[Thing], what: str) -> bool:
    """Whether every object agrees with what is said of its thing, and every kind of thing has an object."""
    if not matches or len(matches[0]) < len(set(wanted)):
        return False
    return all(getattr(thing, what) in (None, getattr(found, what)) for found, thing in zip(matches[0], wanted))


def _lies(match: tuple[Found, ...], relation: str) -> bool:
    """Whether the first object lies on that side of the second, more than it lies on another."""
    if len(match) < 2:
        return False
    (ax, ay), (bx, by) = match[0].centre, match[1].centre
    dx, dy = RELATIONS[relation]
    along, across = ((ax - bx) * dx, ay - by) if dx else ((ay - by) * dy, ax - bx)
    return along > abs(across)
