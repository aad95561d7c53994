"""How long captions are: the lengths that a benchmark draws where no dataset is given."""

import numpy as np

from flowt2i.training.compiling import text_padding

# Tokens of a caption, with the end token, and how many captions have so many: the 4,989 training captions of the emoji data that the README's pictures
# were learned from ("snowman, google emoji style"), read by T5's tokenizer. Short, as names are: mean 12.2.
EMOJI_T5 = {9: 511, 10: 870, 11: 783, 12: 729, 13: 750, 14: 584, 15: 331, 16: 201, 17: 128, 18: 49, 19: 32, 20: 12, 21: 3, 22: 4, 23: 1, 25: 1}
LONGEST = 128  # to which captions are cut, and to which plain trainers pad all of them


def draw_lengths(count: int, lengths: dict[int, int] | np.ndarray, seed: int = 0) -> np.ndarray:
    """[count] caption lengths at random, the same for the same seed; from a table {tokens: captions}, or from the lengths of all captions of a dataset."""
    random = np.random.default_rng(seed)
    if isinstance(lengths, dict):
        weights = np.array(list(lengths.values()), float)
        return random.choice(np.array(list(lengths)), count, p=weights / weights.sum())
    return random.choice(lengths, count)


def padded_width(longest: int, longest_of_all: int, compiled: bool) -> int:
    """Tokens that training pads a batch to whose longest caption has `longest`."""
    step = text_padding(longest_of_all, compiled)
    return -(-max(1, longest) // step) * step
