"""What every kind of source hands on: a key, where the picture is, where the caption is; nothing decoded yet."""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

MAX_FILE_BYTES = 256 << 20  # of one image file: more than any honest picture under the pixel limit needs
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
CAPTION_SUFFIXES = frozenset({".json", ".txt"})


class Dropped(Exception):
    """A sample that is left out. `reason` is one of a few phrases that are counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file (all of it where `size` is None), read only where they are needed: in a worker process."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self, limit: int = MAX_FILE_BYTES) -> bytes:
        """The bytes; Dropped where they are not there, too many, or not in a regular file."""
        try:
            found = os.stat(self.path)  # twice a sample, and a Path costs as much as the reading
            if not stat.S_ISREG(found.st_mode):  # a FIFO would block for ever
                raise Dropped("not a regular file", self.path)
            size = found.st_size if self.size is None else self.size
            if size > limit:
                raise Dropped("file too large", f"{size} bytes")
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(size)
        except OSError as error:
            raise Dropped("unreadable file", str(error)) from error
        if len(data) < size:
            raise Dropped("truncated file", f"{len(data)} of {size} bytes")
        return data


@dataclass(frozen=True, slots=True)
class CaptionFile:
    """A caption in a file: JSON with one of the caption keys, or plain text."""

    kind: str  # "json" or "txt"
    span: Span


@dataclass(frozen=True, slots=True)
class SceneImage:
    """A picture that is drawn where it is needed. `scene` is a flowt2i.data.scenes.Scene."""

    scene: Any


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample of a source. With `reason` set it is dropped already and the rest is not looked at."""

    key: str
    source: str
    image: Span | bytes | SceneImage | None = None
    captions: tuple[Any, ...] = ()  # tried in turn: CaptionFile, or a value that should be a text
    reason: str = ""
    detail: str = ""


class Shard(Protocol):
    """A part of a source: a tar, a folder, a table. Read again, it gives the same samples in the same order."""

    name: str
    costly: bool  # reading captions alone means downloading the pictures too

    def samples(self, start: int = 0) -> Iterator[RawSample]:
        """Samples from number `start` on, problems included (as samples with a reason)."""

    def estimate(self) -> int | None:
        """About how many samples there are, found quickly; None where unknown."""

    def forget(self) -> None:
        """Free what was kept of the shard: it will not be read for now."""

    def signature(self) -> str:
        """Changes when the shard does (name and size)."""


def clean_key(name: str) -> str:
    """A key that is valid UTF-8 and one line: lone surrogates and control characters become `?`."""
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "?", name)[:512]
