"""What a user can mend (exit 2, one line) told apart from what is our fault (a traceback)."""

import difflib
import os
import time
from collections.abc import Iterable

INTERRUPTED = 3  # exit status of a training that a signal stopped, all saved


class UserError(ValueError):
    """A mistake the user can mend; the message is one line and says what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or the whole list when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(sorted(known))})"


def first_of_node() -> bool:
    """Whether this process says what all ranks of a node were told alike: the only one, or the first that torchrun started there."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def told_elsewhere() -> int:
    """The status of a mistake that another rank says. Not at once: torchrun ends all ranks when the first one ends, and that one may not have spoken yet."""
    time.sleep(2)
    return 2
