"""How a script here ends: a mistake the user can mend is one line and status 2, a signal is told, and never a traceback."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from flowt2i.errors import INTERRUPTED, UserError


class Interrupted(Exception):
    """A signal stopped the training that ran; the same command goes on with it."""


def told(main: Callable[..., int | None]) -> Callable[..., int]:
    """`main` with an exit status: its own or 0, 2 (UserError), 3 (stopped by a signal, all saved), 130 (Ctrl-C elsewhere)."""
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(*words: list[str] | None) -> int:
        try:
            return main(*words) or 0
        except UserError as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            return 2
        except Interrupted:
            print(f"{script}: stopped, all saved: the same command goes on", file=sys.stderr)
            return INTERRUPTED
        except KeyboardInterrupt:
            print(f"{script}: stopped: the same command goes on", file=sys.stderr)
            return 130

    return run
