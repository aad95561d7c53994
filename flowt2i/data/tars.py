"""WebDataset tars: pairs of `KEY.jpg` (png, webp, …) and `KEY.json` or `KEY.txt`.

Only headers are read here; a sample says where in the tar its bytes lie. Nothing is ever extracted, so names and links in a
tar cannot reach outside. `tarfile` reads a tar that was cut between members, or has a damaged header, silently short: here
both are found and told.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flowt2i.data.sample import CAPTION_SUFFIXES, IMAGE_SUFFIXES, CaptionFile, RawSample, Span, clean_key

_BLOCK = 512
_SUFFIXES = IMAGE_SUFFIXES | CAPTION_SUFFIXES
# What tarfile raises on hostile headers; RecursionError: a chain of thousands of extension headers.
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, MemoryError, IndexError, KeyError)


@dataclass
class _Pair:
    """What was found under one key, each suffix with its place, in the order of the tar."""

    images: dict[str, Span] = field(default_factory=dict)
    captions: dict[str, Span] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    problem: str = ""


class TarShard:
    """One tar on disk. Members of a pair need not be adjacent; of two members of one name the first counts."""

    costly = False

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._index: list[RawSample] | None = None

    def samples(self, start: int = 0) -> Iterator[RawSample]:
        """Samples from number `start` on; damage to the tar as a whole comes last, as a sample with a reason and no key."""
        yield from self._read()[start:]

    def estimate(self) -> int:
        """Number of samples: exact, only headers are read."""
        return len(self._read())

    def forget(self) -> None:
        """Free the index."""
        self._index = None

    def signature(self) -> str:
        """Name and size."""
        return f"{self.path.name}:{self.path.stat().st_size}"

    def _read(self) -> list[RawSample]:
        if self._index is None:
            pairs, damage = _scan(self.path)
            self._index = [sample for key, pair in pairs.items() for sample in self._samples_of(key, pair)]
            self._index += [RawSample("", self.name, reason=reason, detail=detail) for reason, detail in damage]
        return self._index

    def _samples_of(self, key: str, pair: _Pair) -> Iterator[RawSample]:
        key = clean_key(key)
        captions = tuple(CaptionFile(kind, pair.captions["." + kind]) for kind in ("json", "txt") if "." + kind in pair.captions)
        image = next(iter(pair.images.values()), None)
        if image is None:
            yield RawSample(key, self.name, reason=pair.problem or "missing image")
        elif not captions:
            yield RawSample(key, self.name, reason=pair.problem or "missing caption")
        else:
            yield RawSample(key, self.name, image, captions)
        for _ in range(max(pair.repeats.values(), default=0)):
            yield RawSample(key, self.name, reason="duplicate key")


def _scan(path: Path) -> tuple[dict[str, _Pair], list[tuple[str, str]]]:
    """All pairs in order of their first member, and (reason, detail) of what is wrong with the tar as a whole."""
    pairs: dict[str, _Pair] = {}
    size = path.stat().st_size
    try:
        # "r:" takes plain tars only; errors in names stay readable as surrogates, which clean_key replaces
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            cut = ""
            try:
                behind = -1
                while (member := tar.next()) is not None:
                    if member.size < 0 or member.offset <= behind:  # a header that points back would be read for ever
                        cut = f"{member.name!r} has a size below zero"
                        break
                    behind = member.offset
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                    if member.isreg() and member.offset_data + member.size > size:
                        cut = f"{member.name!r} is cut"
                        break
                    _place(pairs, str(path), member)
            except _BROKEN as error:
                cut = f"{type(error).__name__}: {error}"
            if cut:
                return pairs, [("tar ends early", clean_key(cut))]
            return pairs, _check_end(path, tar.offset, size)  # type: ignore[attr-defined]
    except _BROKEN as error:
        return pairs, [("corrupt tar", clean_key(f"{type(error).__name__}: {error}"))]


def _place(pairs: dict[str, _Pair], path: str, member: tarfile.TarInfo) -> None:
    stem, suffix = posixpath.splitext(member.name)
    suffix = suffix.lower()
    if suffix not in _SUFFIXES or member.isdir() or posixpath.basename(stem).startswith("._"):
        return  # others (.pkl, .npy, macOS's ._ copies) are none of ours, and never opened
    pair = pairs.setdefault(stem, _Pair())
    if not member.isreg() or member.issparse():
        pair.problem = "not a regular file"
        return
    found = pair.images if suffix in IMAGE_SUFFIXES else pair.captions
    if suffix in found:
        pair.repeats[suffix] = pair.repeats.get(suffix, 0) + 1
    else:
        found[suffix] = Span(path, member.offset_data, member.size)


def _check_end(path: Path, offset: int, size: int) -> list[tuple[str, str]]:
    """Is there an end-of-archive block where reading stopped, and nothing but zeros behind it?"""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            return [("tar ends early", f"no end-of-archive block at byte {offset}")]
        if any(block):
            return [("corrupt tar", f"no readable header at byte {offset}, {size - offset} bytes were not read")]
        while chunk := file.read(1 << 20):
            if chunk.count(0) != len(chunk):
                return [("data after the end of the tar", f"{size - offset} bytes were not read")]
    return []
