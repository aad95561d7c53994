"""A folder of images with `metadata.jsonl` (`file_name`, `text`) or a `.txt` (or `.json`) beside each image."""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from flowt2i.data.captions import CAPTION_KEYS
from flowt2i.data.sample import IMAGE_SUFFIXES, CaptionFile, RawSample, Span, clean_key

LINK = "a link that leads out of the folder (--follow-links allows it)"


class FolderShard:
    """All images under a folder, in sorted order; the key is the path inside the folder. Caption files are listed by `metadata.jsonl`
    (in any subfolder, for the images below it); images that none names need a caption file beside them.

    A link that leads out of the folder is not followed unless `follow_links`: in a folder from a stranger `1.txt` may be a link to
    a secret, which would end up in the dataset as a caption.
    """

    costly = False

    def __init__(self, folder: Path, follow_links: bool = False) -> None:
        self.folder, self.follow_links = Path(folder), follow_links
        self._root = os.path.join(os.path.realpath(folder), "")
        self.name = str(folder)
        self._index: list[RawSample] | None = None

    def samples(self, start: int = 0) -> Iterator[RawSample]:
        """Samples from number `start` on."""
        yield from self._read()[start:]

    def estimate(self) -> int:
        """Number of samples, exactly."""
        return len(self._read())

    def forget(self) -> None:
        """Free the index."""
        self._index = None

    def signature(self) -> str:
        """Name and number of samples."""
        return f"{self.folder.name}:{len(self._read())}"

    def _read(self) -> list[RawSample]:
        if self._index is None:
            self._index = list(self._scan())
        return self._index

    def _scan(self) -> Iterator[RawSample]:
        names = sorted(self._walk())
        listed: set[str] = set()
        for name in names:
            if PurePosixPath(name).name == "metadata.jsonl":
                if self._leads_out(name):
                    yield RawSample(clean_key(name), self.name, reason="outside the folder", detail=LINK)
                    continue
                for sample in self._read_metadata(name):
                    listed.add(sample.key)
                    yield sample
        known = set(names)
        for name in names:
            if name in listed or PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
                continue
            stem = name[: -len(PurePosixPath(name).suffix)]
            kinds = [kind for kind in ("json", "txt") if f"{stem}.{kind}" in known]
            captions = tuple(CaptionFile(kind, Span(str(self.folder / f"{stem}.{kind}"))) for kind in kinds)
            path = self.folder / name
            if any(self._leads_out(file) for file in (name, *(f"{stem}.{kind}" for kind in kinds))):
                yield RawSample(clean_key(name), self.name, reason="outside the folder", detail=LINK)
            elif not path.is_file():
                yield RawSample(clean_key(name), self.name, reason="not a regular file")
            elif not captions:
                yield RawSample(clean_key(name), self.name, reason="missing caption")
            else:
                yield RawSample(clean_key(name), self.name, Span(str(path)), captions)

    def _leads_out(self, name: str) -> bool:
        return not self.follow_links and not os.path.realpath(self.folder / name).startswith(self._root)  # a link on the way counts too

    def _walk(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.folder):  # does not follow links to folders, so cannot go round in circles
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in files:
                if not name.startswith("."):
                    yield Path(folder, name).relative_to(self.folder).as_posix()

    def _read_metadata(self, name: str) -> Iterator[RawSample]:
        base = PurePosixPath(name).parent
        with (self.folder / name).open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._from_line(line, base, f"{name}:{number}")

    def _from_line(self, line: bytes, base: PurePosixPath, where: str) -> RawSample:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return RawSample(clean_key(where), self.name, reason="bad json", detail=str(error)[:200])
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            return RawSample(clean_key(where), self.name, reason="bad json", detail="no file_name")
        inside = PurePosixPath(row["file_name"])
        if inside.is_absolute() or ".." in inside.parts or "\0" in row["file_name"]:
            return RawSample(clean_key(row["file_name"]), self.name, reason="outside the folder", detail=where)
        name = (base / inside).as_posix()
        try:
            found = (self.folder / name).is_file()
        except (OSError, ValueError):  # a name that no file can have
            found = False
        if not found:
            return RawSample(clean_key(name), self.name, reason="missing image", detail=where)
        if self._leads_out(name):
            return RawSample(clean_key(name), self.name, reason="outside the folder", detail=LINK)
        captions = tuple(row[key] for key in CAPTION_KEYS if row.get(key) is not None)
        return RawSample(clean_key(name), self.name, Span(str(self.folder / name)), captions)
