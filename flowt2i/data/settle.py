"""What of the units stays in the dataset: decided from their records alone, in the order of the source, the same for any number of workers.

A unit knows only itself. Over all of them, a picture with its caption counts once (the first time), `limit` ends the dataset, and
of a dataset in which chance held nothing out one sample is moved there.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from flowt2i.data.options import PrepareOptions
from flowt2i.data.sources import HELDOUT_PREFIX
from flowt2i.data.units import Drop, Unit, UnitId

LEAST_FOR_HELDOUT = 20  # from this many samples on, at least one is held out


@dataclass(slots=True)
class Settled:
    """What stays of a unit. Numbers count the samples that the unit kept."""

    unit: Unit
    read: int  # samples up to the limit
    dropped: list[Drop]
    train: list[int]
    heldout: list[int]

    def chosen(self, split: str) -> list[int]:
        """Numbers of the samples in a split."""
        return self.train if split == "train" else self.heldout


class Settling:
    """Takes in units in order, as far as they are there."""

    def __init__(self, options: PrepareOptions, groups: int) -> None:
        self.options, self.groups = options, groups
        self.units: list[Settled] = []
        self.kept = 0
        self.next: UnitId | None = (0, 0) if groups else None  # the first unit that is missing; None: complete
        self._seen: set[str] = set()

    @property
    def full(self) -> bool:
        """Is the limit reached?"""
        return self.options.limit is not None and self.kept >= self.options.limit

    def advance(self, find: Callable[[int, int], Unit | None]) -> None:
        """Take in all units that can be found, up to the first that cannot."""
        while self.next is not None and (unit := find(*self.next)):
            self._take(unit)
            group, piece = unit.id
            after = (group + 1, 0) if unit.last else (group, piece + 1)
            self.next = None if self.full or after[0] == self.groups else after

    def hold_one_out(self) -> None:
        """Once complete: move the training sample with the least key hash to the held-out split where chance left that empty."""
        if not self.options.heldout or self.kept < LEAST_FOR_HELDOUT or any(settled.heldout for settled in self.units):
            return
        everything = ((_hash(settled.unit.keys[number]), at, number) for at, settled in enumerate(self.units) for number in settled.train)
        _, at, number = min(everything)
        self.units[at].train.remove(number)
        self.units[at].heldout.append(number)

    def _take(self, unit: Unit) -> None:
        settled = Settled(unit, 0, [], [], [])
        left_out = {drop.at: drop for drop in unit.dropped}
        number = 0
        for at in range(unit.read):
            if self.full:
                break
            settled.read += 1
            if at in left_out:
                settled.dropped.append(left_out[at])
                continue
            digest = unit.digests[32 * number : 32 * number + 32]
            if self.options.drop_duplicates and digest in self._seen:
                settled.dropped.append(Drop(at=at, source=unit.source_at(at), key=unit.keys[number], reason="duplicate"))
            else:
                self._seen.add(digest)
                self.kept += 1
                (settled.heldout if is_heldout(unit.keys[number], self.options.heldout) else settled.train).append(number)
            number += 1
        self.units.append(settled)


def is_heldout(key: str, fraction: float) -> bool:
    """Is a sample held out? Decided by its key alone, so that the same sample is on the same side in any dataset."""
    if key.startswith(HELDOUT_PREFIX):
        return True
    return int.from_bytes(_hash(key)[:8], "big") < fraction * 2**64


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
