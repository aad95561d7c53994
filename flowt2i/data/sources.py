"""What can be read: the names a user gives, turned into shards, each once and in a fixed order."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from flowt2i.data.folders import FolderShard
from flowt2i.data.sample import IMAGE_SUFFIXES, RawSample, SceneImage, Shard
from flowt2i.data.tables import HubShard, TableShard
from flowt2i.data.tars import TarShard
from flowt2i.errors import UserError

DEFAULT_SOURCE = "jackyhate/text-to-image-2M"
_TABLES = (".parquet", ".arrow")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BRACE = re.compile(r"\{([^{}]*)\}")


class SceneShard:
    """Built-in scenes number 0 to `count` - 1 of `seed`, drawn where they are needed."""

    costly = False

    def __init__(self, seed: int, count: int, heldout: bool) -> None:
        self.seed, self.count, self.heldout = seed, count, heldout
        self.name = "scenes"

    def samples(self, start: int = 0) -> Iterator[RawSample]:
        """Samples from number `start` on."""
        from flowt2i.data.scenes import caption, scene_at

        for index in range(start, self.count):
            scene = scene_at(self.seed, index, heldout=self.heldout)
            key = f"{HELDOUT_PREFIX if self.heldout else 'scenes-'}{self.seed}-{index:08d}"
            yield RawSample(key, self.name, SceneImage(scene), (caption(scene),))

    def estimate(self) -> int:
        """The count."""
        return self.count

    def forget(self) -> None:
        """Nothing is kept."""

    def signature(self) -> str:
        """Everything that decides what is drawn."""
        return f"scenes:{self.seed}:{self.count}:{self.heldout}"


HELDOUT_PREFIX = "heldout-pair-"  # keys of samples that are held out whatever their hash


def open_sources(
    sources: list[str],
    *,
    count: int = 40_000,
    seed: int = 0,
    heldout: float = 0.02,
    split: str = "train",
    files: str = "",
    image_column: str = "",
    text_column: str = "",
    follow_links: bool = False,
) -> list[Shard]:
    """Shards of all sources, in the order given, those of one source sorted by name; a file named twice is read once.

    A source is a tar, a parquet or arrow file, a glob or brace pattern of such, a folder of such or of images, the id of a
    Hugging Face dataset, or `scenes` (`count` samples, a share `heldout` of them with held-out attribute pairs).
    UserError where nothing can be read.
    """
    if not sources:
        raise UserError("no source: name tars, a folder, a dataset id or `scenes`")
    shards: list[Shard] = []
    for source in sources:
        if source == "scenes":
            pairs = round(count * heldout)
            shards += [SceneShard(seed, count - pairs, False), SceneShard(seed, pairs, True)][: 2 if pairs else 1]
            continue
        for item in _resolve(source):
            if isinstance(item, str):
                shards.append(HubShard(item, split, files, image_column, text_column))
            elif item.is_dir():
                shards.append(FolderShard(item, follow_links))
            elif item.suffix == ".tar":
                shards.append(TarShard(item))
            else:
                shards.append(TableShard(item, image_column, text_column))
    once: dict[str, Shard] = {}
    for shard in shards:
        once.setdefault(_identity(shard), shard)
    return list(once.values())


def expand_braces(pattern: str) -> list[str]:
    """`{00..02}` and `{a,b}` as the shell does it, any number of them; the pattern itself where there is none."""
    match = _BRACE.search(pattern)
    if match is None:
        return [pattern]
    body = match[1]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) > 1_000_000:
            raise UserError(f"{pattern!r} names {abs(last - first) + 1} files: use a glob instead")
        width = max(len(numbers[1]), len(numbers[2])) if numbers[1].startswith("0") or numbers[2].startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(first, last + (1 if last >= first else -1), 1 if last >= first else -1)]
    else:
        parts = body.split(",")
    return [text for part in parts for text in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def _resolve(source: str) -> Iterator[Path | str]:
    if source.startswith("pipe:"):
        raise UserError(f"{source[:60]!r} is a command, and sources are never run: save its output to a .tar and name that")
    if re.match(r"[a-z][a-z0-9+.-]*://", source):
        raise UserError(f"{source[:80]!r} is a URL: download the file and name it, or give the id of a Hugging Face dataset")
    path = Path(os.path.expanduser(source))
    if path.is_file():
        yield _readable(path)
    elif path.is_dir():
        yield from _folder(path)
    elif "{" in source or glob.has_magic(source):
        yield from _pattern(str(path))
    elif path.suffix in (".tar", *_TABLES) or source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise UserError(f"no such file or folder: {source}")
    else:
        yield source


def _pattern(pattern: str) -> Iterator[Path]:
    for text in expand_braces(pattern):
        found = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]
        if not found:
            raise UserError(f"nothing matches {text!r}: check the path, and quote patterns so that the shell leaves them alone")
        for name in found:
            if not Path(name).exists():
                raise UserError(f"no such file: {name} (from the pattern {pattern!r})")
            if Path(name).is_dir():
                raise UserError(f"{name} is a folder: name the folder itself, or a pattern of files such as {name}/*.tar")
            yield _readable(Path(name))


def _folder(folder: Path) -> Iterator[Path]:
    if (folder / "dataset.json").exists() and (folder / "units").is_dir():
        raise UserError(f"{folder} is a dataset that is already prepared: train on it, or name the files it was made of")
    for suffix in (".tar", *_TABLES):
        files = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
        if files:
            yield from files
            return
    for _, _, names in os.walk(folder):
        if any(Path(name).suffix.lower() in IMAGE_SUFFIXES or name == "metadata.jsonl" for name in names):
            yield folder
            return
    raise UserError(f"{folder} holds no .tar, .parquet or .arrow file and no images: name a folder that does")


def _readable(path: Path) -> Path:
    if path.suffix not in (".tar", *_TABLES):
        raise UserError(f"{path} is not a .tar, .parquet or .arrow file (unpack .tar.gz first; for images name their folder)")
    return path


def _identity(shard: Shard) -> str:
    place = getattr(shard, "path", None) or getattr(shard, "folder", None)
    return os.path.realpath(place) if place else shard.signature()
