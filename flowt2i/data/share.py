"""Which units are a worker's: all of them, or every N-th under `--worker I/N` or `torchrun`. Workers need not know of each other."""

import os
import re
from dataclasses import dataclass

from flowt2i.errors import UserError

WHOLE_GROUPS = 4  # from so many groups a worker on, each group has one worker: no other one needs to open its files


@dataclass(frozen=True, slots=True)
class Share:
    """Worker `number` of `of`."""

    number: int = 0
    of: int = 1

    @property
    def alone(self) -> bool:
        return self.of == 1

    def group(self, group: int, groups: int) -> bool:
        """May any unit of the group be this worker's?"""
        return groups < WHOLE_GROUPS * self.of or group % self.of == self.number

    def unit(self, group: int, piece: int, groups: int) -> bool:
        """Is the unit this worker's?"""
        if groups < WHOLE_GROUPS * self.of:
            return (group + piece) % self.of == self.number
        return group % self.of == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parse_share(text: str) -> Share:
    """`I/N` with I from 0 to N - 1; where nothing is given, the rank that `torchrun` set, or all. UserError for anything else."""
    if not text:
        size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
        return Share(int(os.environ["RANK"]), size) if size > 1 else Share()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]) <= 4096:
        raise UserError(f"worker {text!r} is not of the form I/N with I from 0 to N - 1, such as 0/2 and 1/2 for two workers")
    return Share(int(match[1]), int(match[2]))
