"""What a user can mend (exit 2, one line) told apart from what is our fault (a traceback)."""

import difflib
from collections.abc import Iterable

INTERRUPTED = 3  # exit status of a training that a signal stopped, all saved


class UserError(ValueError):
    """A mistake the user can mend; the message is one line and says what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or the whole list when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(sorted(known))})"
