"""What a visitor may ask for. Every bound is checked here, on the server, whatever the page in the browser allows."""

import unicodedata
from typing import Any, NamedTuple

from flowt2i.errors import UserError, nearest
from flowt2i.solvers import SOLVERS

LONGEST_PROMPT, MOST_STEPS, MOST_IMAGES, MOST_GUIDANCE, LARGEST_SEED = 2_000, 200, 8, 20, 2**31 - 1
MOST_UPDATES = 50  # previews of one drawing: what waits for a slow browser stays small
MOST_SECONDS = 300.0  # of one drawing: nobody keeps the others waiting longer
WAITING = 16  # requests of the page that may queue up, and as many of programs; further ones are told at once to come back later
SWEEP = (1, 2, 4, 8, 16, 50)  # numbers of steps that "Quality against steps" compares

# explicit embeddings, overrides and isolates reorder what stands round them; letters that run right to left need none of them
REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


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


def check(prompt: Any, steps: Any, guidance: Any, solver: Any, seed: Any, num: Any, every: Any = 1, negative: Any = "") -> Request:
    """Turn what came over the net into a `Request`; UserError says what is out of range, in words for the visitor."""
    text = readable("prompt", prompt)
    if not text:
        raise UserError("Say what the picture should show.")
    if not isinstance(solver, str) or solver not in SOLVERS:
        guess = nearest(solver[:40], SOLVERS) if isinstance(solver, str) else f" (known: {', '.join(sorted(SOLVERS))})"
        raise UserError(f"No such solver{guess}.")
    whole = _whole("Steps", steps, 1, MOST_STEPS)
    interval = max(_whole("Update every", every, 1, MOST_STEPS), -(-whole // MOST_UPDATES))
    return Request(
        text, whole, _number("Guidance", guidance, 0, MOST_GUIDANCE), solver, _whole("The seed", seed, 0, LARGEST_SEED),
        _whole("The number of pictures", num, 1, MOST_IMAGES), interval, readable("negative prompt", negative),
    )  # fmt: skip


def readable(name: str, value: Any) -> str:
    """A text in one line without what no one can read: control characters, halves of surrogate pairs, reordering marks. UserError where it is too long."""
    if not isinstance(value, str):
        return ""
    if len(value) > LONGEST_PROMPT:
        raise UserError(f"The {name} has {len(value):,} characters: {LONGEST_PROMPT:,} at most.")
    kept = (" " if c.isspace() else c for c in value if c.isspace() or (unicodedata.category(c) not in ("Cc", "Cs", "Cn") and c not in REORDERING))
    return " ".join("".join(kept).split())


def _number(name: str, value: Any, least: int, most: int, kind: str = "number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:  # NaN is not between anything
        raise UserError(f"{name} must be a {kind} from {least:,} to {most:,}.")
    return value


def _whole(name: str, value: Any, least: int, most: int) -> int:
    number = _number(name, value, least, most, "whole number")
    if number != int(number):
        raise UserError(f"{name} must be a whole number from {least:,} to {most:,}.")
    return int(number)
