"""Captions that training has no picture of, put together from parts of those it has: "SUBJECT, STYLE" (`match.composed`).

Where every subject has been seen in some style and every style with some subject, a model should draw any subject in any style. Of a pair without
a picture one can still say what features its picture would have if subject and style added up: those of the subject's pictures in other styles,
less the means of these styles, plus the mean of the style asked for. Pure functions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowt2i.styles import Parted, styles_of


def composed(captions: Sequence[Parted]) -> list[Parted]:
    """All pairs of a subject that stands in some style and another style that no caption has, in a fixed order."""
    styles, there = styles_of(captions), set(captions)
    subjects = list(dict.fromkeys(caption.subject for caption in captions if caption.style in styles))
    return [pair for subject in subjects for style in styles if (pair := Parted(subject, style)) not in there]


def expected(wanted: Sequence[Parted], captions: Sequence[Parted], features: Tensor) -> Tensor:
    """Features [len(wanted), d] of composed captions, as if subject and style added up, from those of the captions [n, d]."""
    styles = styles_of(captions)
    rows = {style: [k for k, caption in enumerate(captions) if caption.style == style] for style in styles}
    mean = {style: features[rows[style]].mean(0) for style in styles}
    shown: dict[str, list[Tensor]] = {}
    for k, caption in enumerate(captions):
        if caption.style in mean:
            shown.setdefault(caption.subject, []).append(features[k] - mean[caption.style])
    found = [torch.stack(shown[pair.subject]).mean(0) + mean[pair.style] for pair in wanted]
    return torch.stack(found) if found else features.new_zeros(0, features.shape[1])
