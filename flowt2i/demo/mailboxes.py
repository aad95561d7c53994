"""What gradio keeps for browsers that have not fetched it yet, bounded.

Its queue has a mailbox for each session that ever asked for something, two thousand of them, full of pictures where nobody came for them; and the one
thrown out for a new one may be that of a visitor who waits. Here there are few, and nobody who waits loses one.

Gradio notices a visitor who hangs up, but not one who never listened: what such a one asked for is ended here.
"""

import math
import time
from collections import OrderedDict
from typing import Any

MOST = 64  # sessions that nobody waits in
PATIENCE = 10.0  # seconds that a visitor has to begin to listen; the page does at once


class Mailboxes(OrderedDict[str, Any]):
    """In place of `Queue.pending_messages_per_session`."""

    def __init__(self, queue: Any, most: int = MOST):
        super().__init__()
        self.queue, self.most = queue, most

    def __getitem__(self, session: str) -> Any:
        """The box, where something is put into it or listened for; a request of this session that nobody has listened to for too long is ended."""
        box, now = super().__getitem__(session), time.monotonic()
        for event in self._events():
            if event.session_hash == session and box.heard < event.enqueue_time < now - PATIENCE:
                event.alive = False  # as where a visitor hangs up: skipped in the queue, ended at its next news
        return box

    def __setitem__(self, session: str, box: Any) -> None:
        box.heard, get = -math.inf, box.get  # when anyone listened last, time.monotonic

        def listen() -> Any:
            box.heard = time.monotonic()
            return get()

        box.get = listen
        super().__setitem__(session, box)
        if len(self) <= self.most:
            return
        wanted = {session, *(event.session_hash for event in self._events())}
        for old in [name for name in self if name not in wanted][: len(self) - self.most]:
            del self[old]
            self.queue.pending_event_ids_session.pop(old, None)

    def _events(self) -> list[Any]:
        """Those waiting and those at work."""
        waiting = [event for line in self.queue.event_queue_per_concurrency_id.values() for event in line.queue]
        return waiting + [event for job in self.queue.active_jobs if job for event in job]


def bound(queue: Any) -> None:
    """Give a gradio queue few mailboxes."""
    queue.pending_messages_per_session = Mailboxes(queue)
