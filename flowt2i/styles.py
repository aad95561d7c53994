"""Captions of two parts, "SUBJECT, STYLE", as those of the emoji data: which part is which, and which styles there are. Pure functions."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

BY_STYLES = ("analogy", "style_contrast")  # what a drawing may do with a model's styles: settings, each with its end as `NAME_until`
MOST_STYLES = 8  # each is a distribution to learn from its own pictures; captions that end in more kinds of words have none
LEAST_SHARE = 0.01  # of the captions that must end in a style
COVERED = 0.9  # of the captions that must end in one of the styles


class Parted(NamedTuple):
    """A caption before and behind its last comma."""

    subject: str
    style: str

    def __str__(self) -> str:
        return f"{self.subject}, {self.style}" if self.style else self.subject


def parted(caption: str) -> Parted:
    """Without a comma the style is empty."""
    subject, comma, style = caption.rpartition(", ")
    return Parted(subject, style) if comma else Parted(caption, "")


def compared(captions: Sequence[Parted], styles: Sequence[str]) -> list[list[str]]:
    """What analogy and contrast look at, each for every caption: its style alone; then, in turns, its subject in another style and that style alone.

    So styles alone are the even ones and subjects the odd ones. A caption in none of the styles is compared with itself and the empty caption.
    """
    columns = []
    for caption in captions:
        if caption.style in styles:
            pairs = [(str(Parted(caption.subject, style)), style) for style in styles if style != caption.style]
            columns.append([caption.style, *(text for pair in pairs for text in pair)])
        else:
            columns.append(["", *[str(caption), ""] * (len(styles) - 1)])
    return [list(row) for row in zip(*columns)]


def styles_of(captions: Sequence[Parted]) -> list[str]:
    """The styles, sorted; none where captions do not end in a few of them."""
    counts = Counter(caption.style for caption in captions if caption.style)
    styles = sorted(style for style, count in counts.items() if count >= max(2, LEAST_SHARE * len(captions)))
    return styles if 2 <= len(styles) <= MOST_STYLES and sum(counts[style] for style in styles) >= COVERED * len(captions) else []
