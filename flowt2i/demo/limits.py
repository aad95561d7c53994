"""What a visitor may ask for. Every bound is checked here, on the server, whatever the page in the browser allows."""

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from flowt2i.config import SampleConfig
from flowt2i.errors import UserError, nearest
from flowt2i.settings import own_steps
from flowt2i.shapes import Shape, name
from flowt2i.solvers import SOLVERS

LONGEST_PROMPT, MOST_STEPS, MOST_IMAGES, MOST_GUIDANCE, LARGEST_SEED = 2_000, 200, 8, 20, 2**31 - 1
MOST_UPDATES = 50  # previews of one request, all its drawings together: what waits for a slow browser stays small
MOST_SECONDS = 300.0  # of drawing for one request, all its drawings together: nobody keeps the others waiting longer
WAITING = 16  # requests of the page that may queue up, and as many of programs; further ones are told at once to come back later
SWEEP = (1, 2, 4, 8, 16, 50)  # numbers of steps that "Quality against steps" compares

# explicit embeddings, overrides and isolates reorder what stands round them; letters that run right to left need none of them
REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class OwnSettings(NamedTuple):
    """How a model draws where the visitor says nothing."""

    steps: int
    guidance: float
    solver: str


def own_settings(own: SampleConfig) -> OwnSettings:
    """A model's own, within what a visitor may ask for."""
    return OwnSettings(min(own_steps(own), MOST_STEPS), min(own.guidance, MOST_GUIDANCE), own.solver)


class Request(NamedTuple):
    """What a visitor asked for, checked."""

    prompt: str
    steps: int
    guidance: float
    solver: str
    seed: int
    num: int
    every: int = 1  # steps between two previews
    negative: str = ""
    updates: int = MOST_UPDATES  # previews at most; 0: none
    shape: str = ""  # such as 80x48, one of the model's own (`size_of`); "": what it draws of its own


def check(prompt: Any, steps: Any, guidance: Any, solver: Any, seed: Any, num: Any, every: Any = 1, negative: Any = "", shape: Any = "",
          *, drawings: int = 1) -> Request:  # fmt: skip
    """Turn what came over the net into a `Request`; UserError says what is out of range, in words for the visitor.

    drawings: how many such a request is made of; they share its previews.
    """
    text = readable("prompt", prompt)
    if not text:
        raise UserError("Say what the picture should show.")
    if not isinstance(solver, str) or solver not in SOLVERS:
        guess = nearest(solver[:40], SOLVERS) if isinstance(solver, str) else f" (known: {', '.join(sorted(SOLVERS))})"
        raise UserError(f"No such solver{guess}.")
    whole = _whole("Steps", steps, 1, MOST_STEPS)
    number = _whole("The number of pictures", num, 1, MOST_IMAGES)
    updates = MOST_UPDATES // drawings
    one_by_one = number if solver == "dopri5" else 1  # it draws one picture after another, each of `whole` steps
    interval = max(_whole("Update every", every, 1, MOST_STEPS), -(-whole * one_by_one // updates))
    return Request(
        text, whole, _number("Guidance", guidance, 0, MOST_GUIDANCE), solver, _whole("The seed", seed, 0, LARGEST_SEED),
        number, interval, readable("negative prompt", negative), updates, readable("shape", shape),
    )  # fmt: skip


def size_of(request: Request, sizes: Sequence[Shape]) -> Shape | None:
    """(width, height) of the shape that was asked for, None where none was. UserError where it is none of the model's own: others may cost any time."""
    if not request.shape:
        return None
    own = {name(size): size for size in sizes}
    if request.shape not in own:
        raise UserError(f"This model draws pictures of {', '.join(own)} pixels: choose one of these shapes.")
    return own[request.shape]


def readable(what: str, value: Any) -> str:
    """A text in one line without what no one can read: control characters, halves of surrogate pairs, reordering marks. None is empty.

    UserError where it is too long, or no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"The {what} must be a text.")
    if len(value) > LONGEST_PROMPT:
        raise UserError(f"The {what} has {len(value):,} characters: {LONGEST_PROMPT:,} at most.")
    kept = (" " if c.isspace() else c for c in value if c.isspace() or (unicodedata.category(c) not in ("Cc", "Cs", "Cn") and c not in REORDERING))
    return " ".join("".join(kept).split())


def _number(what: str, value: Any, least: int, most: int, kind: str = "number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:  # NaN is not between anything
        raise UserError(f"{what} must be a {kind} from {least:,} to {most:,}.")
    return value


def _whole(what: str, value: Any, least: int, most: int) -> int:
    number = _number(what, value, least, most, "whole number")
    if number != int(number):
        raise UserError(f"{what} must be a whole number from {least:,} to {most:,}.")
    return int(number)
