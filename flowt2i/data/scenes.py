"""The built-in captioned pictures: flat shapes with attributes, counts and relations, and captions that name them.

A picture and its caption are pure functions of `(seed, index)`, on any machine and with any library version: every random
choice comes from a hash, not from a random generator whose stream may change. Some (colour, shape) pairs never appear in
training scenes, so that following a caption can be told apart from remembering pictures. `scenes_check.check` says which
parts of a caption a picture obeys.

Lengths in this file are in pixels of a 64 x 64 picture; `render` scales them.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from flowt2i.data.scenes_looks import BACKGROUNDS, COLOURS, SHAPES, Image, backdrop, shape_mask
from flowt2i.errors import UserError, nearest

T = TypeVar("T")

SIZES = {"small": (14, 16), "large": (24, 28)}  # least and greatest width
COUNTS = ("one", "two", "three", "four")
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first thing lies, seen from the second
HELD_OUT = frozenset(
    {
        ("red", "diamond"),
        ("orange", "ring"),
        ("yellow", "heart"),
        ("green", "star"),
        ("blue", "triangle"),
        ("purple", "square"),
        ("pink", "cross"),
        ("brown", "circle"),
    }
)


@dataclass(frozen=True)
class Thing:
    """One kind of object, `count` times; a size of None is one that a caption left open."""

    shape: str
    colour: str
    size: str | None
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """One thing (one to four times), or two single things of which the first lies `relation` of the second."""

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None  # None: left open
    seed: int = 0  # decides placement and phrasing


class _Dice:
    """Draws from a hash of the key: the same on every machine, for ever."""

    def __init__(self, *key: object) -> None:
        self._key = "/".join(map(str, key))
        self._blocks = 0
        self._left: list[int] = []

    def below(self, n: int) -> int:
        if not self._left:
            digest = hashlib.blake2b(f"{self._key}#{self._blocks}".encode()).digest()
            self._left = np.frombuffer(digest, "<u4").tolist()
            self._blocks += 1
        return self._left.pop() % n

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def around(self, reach: int) -> int:
        """A whole number in [-reach, reach]."""
        return self.below(2 * reach + 1) - reach


# ---------------------------------------------------------------- scenes


def scene_at(seed: int, index: int, *, heldout: bool = False) -> Scene:
    """The scene number `index` of the endless row that `seed` names.

    With `heldout` it uses a held-out (colour, shape) pair, without it never does. About 40% of scenes show one object, 20%
    two to four of a kind, 40% two objects in a relation.
    """
    return _draw(_Dice("scene", seed, index, heldout), heldout)


def _draw(dice: _Dice, heldout: bool) -> Scene:
    kind = dice.below(10)
    first = _thing(dice, heldout)
    things: tuple[Thing, ...] = (first,)
    relation = None
    if kind >= 8:
        things = (replace(first, count=2 + dice.below(3)),)
    elif kind >= 4:
        relation = dice.pick(tuple(RELATIONS))
        second = _thing(dice, False)
        while (second.colour, second.shape) == (first.colour, first.shape):  # a caption that gives no sizes must still tell them apart
            second = _thing(dice, False)
        things = (first, second) if dice.chance(50) else (second, first)
    return Scene(things, relation, dice.pick(tuple(BACKGROUNDS)), dice.below(1 << 32))


def _thing(dice: _Dice, heldout: bool) -> Thing:
    size = dice.pick(tuple(SIZES))
    while True:
        pair = dice.pick(tuple(COLOURS)), dice.pick(SHAPES)
        if (pair in HELD_OUT) == heldout:
            return Thing(pair[1], pair[0], size)


def sample(seed: int, index: int, heldout: bool = False, size: int = 64) -> tuple[Image, str]:
    """Picture (uint8 [size, size, 3]) and caption of one scene."""
    scene = scene_at(seed, index, heldout=heldout)
    return render(scene, size), caption(scene)


def prompts(seed: int, n: int, heldout: bool = False) -> list[str]:
    """`n` captions for evaluation, drawn apart from the scenes of every training seed."""
    return [caption(_draw(_Dice("prompt", seed, index, heldout), heldout)) for index in range(n)]


def curated_prompts() -> list[str]:
    """Sixteen captions for a grid that shows every shape, colour, count, relation and background; no pair in them is held out."""
    return [
        "a large red heart on a white background",
        "a small yellow star on a navy background",
        "a large green triangle on a cream background",
        "a picture of a large blue ring on a sunset background",
        "a small purple cross on a mint background",
        "a drawing of a large pink diamond on a sky background",
        "two large orange circles on a navy background",
        "three small red stars on a cream background",
        "four small blue hearts on a white background",
        "four large brown squares on a grey background",
        "a small red circle to the left of a large blue square on a white background",
        "a large yellow triangle to the right of a small purple ring on a grey background",
        "a small pink heart above a large green cross on a cream background",
        "a large orange star below a small blue diamond on a sky background",
        "a large brown diamond with a small yellow circle above it on a mint background",
        "the small pink star is to the right of the large purple heart on a sunset background",
    ]


# ---------------------------------------------------------------- captions

_LEAD = ("{x}", "a picture of {x}", "an image of {x}")
_SIDE = {
    "left": ("{a} to the left of {b}", "{a} left of {b}", "{b} with {a} to its left"),
    "right": ("{a} to the right of {b}", "{a} right of {b}", "{b} with {a} to its right"),
    "above": ("{a} above {b}", "{a} placed above {b}", "{b} with {a} above it"),
    "below": ("{a} below {b}", "{a} placed below {b}", "{b} with {a} below it"),
}
_SENTENCE = {
    "left": "{the_a} is to the left of {the_b}",
    "right": "{the_a} is to the right of {the_b}",
    "above": "{the_a} is above {the_b}",
    "below": "{the_a} is below {the_b}",
}
# What a caption can say of the objects, and how it can name the background. Every caption is one of each.
PHRASES: dict[str, tuple[str, ...]] = {
    "one": tuple(lead.format(x="{a}") for lead in (*_LEAD, "a drawing of {x}", "there is {x}", "{x} by itself")),
    "many": tuple(lead.format(x="{n}") for lead in (*_LEAD, "a drawing of {x}", "there are {x}", "a group of {x}")),
    **{relation: (*(lead.format(x=side) for lead in (*_LEAD, "there is {x}") for side in sides), _SENTENCE[relation]) for relation, sides in _SIDE.items()},
}
GROUNDS = ("{x}", "{x} on a {g} background", "{x} against a {g} background", "on a {g} background, {x}")


def caption(scene: Scene) -> str:
    """What the scene shows, in one of the phrasings (at most 20 words); it may leave the sizes or the background unsaid."""
    dice = _Dice("words", scene.seed)
    phrase = dice.pick(PHRASES[_kind(scene)])
    ground = dice.pick(GROUNDS[1:]) if dice.chance(60) and scene.background else GROUNDS[0]
    sized = dice.chance(75)
    words: dict[str, str] = {}
    for name, thing in zip("ab", scene.things):
        noun = " ".join(filter(None, (thing.size if sized else None, thing.colour, thing.shape)))
        words |= {name: f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}", f"the_{name}": f"the {noun}"}
        words["n"] = f"{COUNTS[thing.count - 1]} {_plural(noun)}"
    return ground.format(x=phrase.format(**words), g=scene.background)


def parse(text: str) -> Scene:
    """What a caption asks for: the scene with None for what it leaves open. UserError where the grammar has no such caption."""
    plain = " ".join(text.lower().strip().rstrip(".").split())
    scene = _parse(plain)
    if scene is None:
        known = _words()
        strange = next((word for word in re.findall(r"[^\s,]+", plain) if word not in known), None)
        why = f"the word {strange!r} is not in it{nearest(strange, known)}" if strange and strange.isalpha() else "try 'a small red star'"
        raise UserError(f"the caption {text[:80]!r} is outside the grammar of the built-in scenes: {why}")
    return scene


@lru_cache(maxsize=65536)
def _parse(text: str) -> Scene | None:
    background = None
    for ground in _grounds():
        if match := ground.fullmatch(text):
            text, background = match["x"], match["g"]
            break
    for kind, pattern in _phrases():
        if match := pattern.fullmatch(text):
            said = match.groupdict()
            if kind == "many":
                thing = Thing(said["shape_n"].removesuffix("es" if said["shape_n"] == "crosses" else "s"), said["colour_n"], said["size_n"])
                return Scene((replace(thing, count=COUNTS.index(said["count_n"]) + 1),), None, background)
            things = tuple(Thing(said[f"shape_{k}"], said[f"colour_{k}"], said[f"size_{k}"]) for k in ("a" if kind == "one" else "ab"))
            return Scene(things, None if kind == "one" else kind, background)
    return None


def _kind(scene: Scene) -> str:
    return scene.relation or ("one" if scene.things[0].count == 1 else "many")


_one_of = "|".join  # an alternative in a regular expression


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


@lru_cache(maxsize=1)
def _grounds() -> list[re.Pattern[str]]:
    return [re.compile(ground.format(x="(?P<x>.+)", g=f"(?P<g>{_one_of(BACKGROUNDS)})")) for ground in GROUNDS[1:]]


@lru_cache(maxsize=1)
def _phrases() -> list[tuple[str, re.Pattern[str]]]:
    def noun(article: str, key: str, shapes: Iterable[str]) -> str:
        looks = f"(?:(?P<size_{key}>{_one_of(SIZES)}) )?(?P<colour_{key}>{_one_of(COLOURS)}) (?P<shape_{key}>{_one_of(shapes)})"
        return f"{article} {looks}"

    parts = {key: noun("an?", key, SHAPES) for key in "ab"} | {f"the_{key}": noun("the", key, SHAPES) for key in "ab"}
    parts["n"] = noun(f"(?P<count_n>{_one_of(COUNTS[1:])})", "n", map(_plural, SHAPES))
    return [(kind, re.compile(phrase.format(**parts))) for kind, phrases in PHRASES.items() for phrase in phrases]


@lru_cache(maxsize=1)
def _words() -> set[str]:
    frames = [*GROUNDS, *(phrase for phrases in PHRASES.values() for phrase in phrases)]
    plain = {word.strip(",") for frame in frames for word in frame.split() if "{" not in word}
    return plain | {*SIZES, *COLOURS, *SHAPES, *map(_plural, SHAPES), *COUNTS[1:], *BACKGROUNDS, "a", "an", "the"}


# ---------------------------------------------------------------- pictures


def render(scene: Scene, size: int = 64) -> Image:
    """The picture of a scene, uint8 [size, size, 3], edges antialiased; what the scene leaves open is drawn from its seed."""
    if size < 16:
        raise UserError(f"scenes cannot be drawn at {size} pixels: ask for at least 16")
    dice = _Dice("place", scene.seed)
    picture = backdrop(scene.background or dice.pick(tuple(BACKGROUNDS)), size).copy()
    for thing, (x, y, width) in _places(scene, dice):
        mask = shape_mask(thing.shape, max(3, round(width * size / 64)))
        side = len(mask)
        top, left = (min(max(round(c * size / 64 - side / 2), 0), size - side) for c in (y, x))
        patch = picture[top : top + side, left : left + side]
        colour = np.array(COLOURS[thing.colour], np.float32)
        patch[:] = patch + mask[:, :, None] * (colour - patch) + 0.5
    return picture


def _places(scene: Scene, dice: _Dice) -> list[tuple[Thing, tuple[int, int, int]]]:
    """Centre x, y and width of every object; gaps of at least 4 and margins of at least 3 hold by construction."""
    sizes = [thing.size or dice.pick(tuple(SIZES)) for thing in scene.things]
    if scene.relation:
        dx, dy = RELATIONS[scene.relation]
        places = []
        for thing, size, side in zip(scene.things, sizes, (1, -1)):
            width = SIZES[size][0] + dice.below(3)
            along, across = dice.around((28 - width) // 2), dice.around(6)
            shift = (along, across) if dx else (across, along)
            places.append((thing, (32 + side * 16 * dx + shift[0], 32 + side * 16 * dy + shift[1], width)))
        return places
    thing = scene.things[0]
    least, most = SIZES[sizes[0]]
    if thing.count == 1:
        return [(thing, (32 + dice.around(8), 32 + dice.around(8), least + dice.below(most - least + 1)))]
    width = least + (dice.below(3) if sizes[0] == "small" else 0)  # four large ones leave no room to vary
    cells = {2: ((17, 32), (47, 32)), 3: ((32, 17), (17, 47), (47, 47)), 4: ((17, 17), (47, 17), (17, 47), (47, 47))}[thing.count]
    reach = (26 - width) // 2
    return [(thing, (x + dice.around(reach), y + dice.around(reach), width)) for x, y in cells]
