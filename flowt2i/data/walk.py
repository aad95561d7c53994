"""A walk over the shards in order, cut into units and these into runs that are decoded at a time."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flowt2i.data.sample import RawSample, Shard
from flowt2i.data.share import Share
from flowt2i.data.units import Unit, UnitId

RUN = 32  # samples handed to a worker process at a time


@dataclass(slots=True)
class Run:
    """Consecutive samples of one unit."""

    unit: UnitId
    samples: list[RawSample]
    closes: bool  # the unit ends here
    last: bool  # and the group too


def walk(groups: list[list[Shard]], rows: int, share: Share, find: Callable[[int, int], Unit | None]) -> Iterator[Run]:
    """Runs of all units that are the share's and that `find` does not find; every unit but the last of a group has `rows` samples."""
    for group, shards in enumerate(groups):
        if share.group(group, len(groups)):
            stream = _Stream(shards)
            for piece in itertools.count():
                done = find(group, piece)
                if done and done.last:
                    break
                if done or not share.unit(group, piece, len(groups)):
                    continue
                stream.move_to(piece * rows)
                if stream.over and piece:  # the group ended in a unit of another worker
                    break
                yield from _runs_of_unit(stream, (group, piece), rows)
                if stream.over:
                    break
            for shard in shards:
                shard.forget()


def _runs_of_unit(stream: "_Stream", unit: UnitId, rows: int) -> Iterator[Run]:
    while True:
        samples = stream.take(min(RUN, rows))
        rows -= len(samples)
        closes = stream.over or not rows
        yield Run(unit, samples, closes, stream.over)
        if closes:
            return


class _Stream:
    """The samples of a group, one of them read ahead: the end is known when it is reached."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.at = 0
        self._rest: Iterator[RawSample] | None = None
        self._ahead: RawSample | None = None

    @property
    def over(self) -> bool:
        """Are all samples taken?"""
        return self._ahead is None

    def move_to(self, start: int) -> None:
        """Go to sample number `start`; only forward."""
        if self._rest is None:
            if len(self.shards) == 1:
                self._rest = self.shards[0].samples(start)
            else:
                self._rest = itertools.islice(itertools.chain.from_iterable(shard.samples() for shard in self.shards), start, None)
            self.at = start
            self._ahead = next(self._rest, None)
        while self.at < start and not self.over:
            self._step()

    def take(self, count: int) -> list[RawSample]:
        """The next `count` samples, or as many as there are."""
        taken: list[RawSample] = []
        while len(taken) < count and self._ahead is not None:
            taken.append(self._ahead)
            self._step()
        return taken

    def _step(self) -> None:
        assert self._rest is not None
        self._ahead = next(self._rest, None)
        self.at += 1
