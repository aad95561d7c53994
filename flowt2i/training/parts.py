"""Captions of which one part is left (`flow.part_dropout`), so that "red apple, flat style" teaches "red apple" and "flat style" too."""

from typing import Any

import torch
from torch import Tensor


def commas(tokenizer: Any) -> frozenset[int]:
    """The tokens that are a comma and nothing else, of a `CaptionTokenizer`."""
    return frozenset(token for text, token in tokenizer.backend.get_vocab().items() if text.lstrip("▁Ġ") in (",", ",</w>"))


def keep_one_side(
    ids: Tensor, mask: Tensor, chance: Tensor, share: float, comma: frozenset[int], null: tuple[int, ...], pad: int = 0
) -> tuple[Tensor, Tensor, list[int]]:
    """Keep what is before or after one of the commas of a caption: ids [b, T], mask [b, T], and the rows that were changed.

    A row is changed where its `chance` [b], in (0, 1), lies below `share` and it has a comma with something on both sides. All on the CPU.
    null: the tokens of the empty caption, of which the last ends every caption and those before it begin it.
    """
    begin, end = list(null[:-1]), list(null[-1:])
    changed: list[int] = []
    ids, mask = ids.clone(), mask.clone()
    for row in (chance < share).nonzero().flatten().tolist():
        words = ids[row][mask[row]].tolist()[len(begin) : -1]
        places = [i for i, word in enumerate(words) if word in comma and 0 < i < len(words) - 1]
        if not places:
            continue
        number = min(int(chance[row] / share * 2 * len(places)), 2 * len(places) - 1)  # below the share the chance is uniform: it chooses, too
        place = places[number // 2]
        kept = torch.tensor([*begin, *(words[:place] if number % 2 == 0 else words[place + 1 :]), *end])
        ids[row], mask[row] = pad, False
        ids[row, : len(kept)], mask[row, : len(kept)] = kept, True
        changed.append(row)
    return ids, mask, changed
