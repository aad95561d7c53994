"""What gradio keeps for browsers that have not fetched it yet, bounded.

Its queue has a mailbox for each session that ever asked for something, two thousand of them, full of pictures where nobody came for them; and the one
thrown out for a new one may be that of a visitor who waits. Here there are few, and nobody who waits loses one.
"""

from collections import OrderedDict
from typing import Any

MOST = 64  # sessions that nobody waits in


class Mailboxes(OrderedDict[str, Any]):
    """In place of `Queue.pending_messages_per_session`."""

    def __init__(self, queue: Any, most: int = MOST):
        super().__init__()
        self.queue, self.most = queue, most

    def __setitem__(self, session: str, box: Any) -> None:
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
