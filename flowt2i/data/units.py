"""Units: the pieces in which a dataset is written, each complete or absent, so that a killed preparation can continue.

A unit is a piece (a fixed number of consecutive samples) of a group of shards. What it holds depends on nothing outside of it,
so who makes it, when and in which order does not matter. Its Arrow parts are written under other names, synced and renamed; its
record, written last in the same way, makes it count. What has no record is written again.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from flowt2i.description import CodecSpec
from flowt2i.errors import UserError
from flowt2i.shapes import Shape

SPLITS = ("train", "heldout")
SIZE, ORIGINAL = "size", "original_size"  # columns of a dataset of several shapes


class Moments(BaseModel):
    """Sums from which per-channel statistics are merged: of values, of squares and of variances inside a sample (VAE)."""

    count: int = 0  # values in a channel
    total: list[float] = []
    square: list[float] = []
    inside: list[float] = []


class Drop(BaseModel):
    """A sample that was left out."""

    at: int  # its place in the unit
    source: str
    key: str
    reason: str
    detail: str = ""


UnitId = tuple[int, int]  # group and piece


class Unit(BaseModel):
    """Record of a finished unit: all that is needed to settle what of it stays in the dataset (`settle.py`)."""

    model_config = ConfigDict(extra="forbid")

    group: int
    piece: int
    last: bool  # the group ends with it
    shards: list[tuple[str, int]]  # name and number of samples of what was read, in order
    keys: list[str]  # of the samples kept, in order
    digests: str  # hex, 16 bytes each: picture and caption of the samples kept
    dropped: list[Drop]  # in order
    truncated: int  # captions cut to max_tokens
    moments: Moments  # of the samples that are not held out
    files: dict[str, str]  # split -> sha256 of its part
    seconds: float
    stages: dict[str, float]  # seconds spent waiting for decoding, in encoding, in tokenizing, in writing

    @property
    def id(self) -> UnitId:
        return self.group, self.piece

    @property
    def read(self) -> int:
        """Number of samples read."""
        return sum(count for _, count in self.shards)

    def source_at(self, place: int) -> str:
        """Name of the shard from which the sample at this place came."""
        for name, count in self.shards:
            if place < count:
                return name
            place -= count
        raise IndexError(place)


def stored_column(codec: CodecSpec) -> tuple[str, pa.DataType]:
    """Name and type of one stored value: uint8 pixels, or float16 moments (mean and log-variance)."""
    return ("pixels", pa.uint8()) if codec.kind == "pixels" else ("moments", pa.float16())


@dataclass(slots=True)
class Shapes:
    """Of samples of several shapes: (width, height) in pixels that each has, and that its picture had before, [N] each."""

    sizes: list[Shape]
    originals: list[Shape]

    def columns(self) -> dict[str, pa.Array]:
        pairs = lambda values: pa.FixedSizeListArray.from_arrays(pa.array([side for pair in values for side in pair], pa.int32()), 2)
        return {SIZE: pairs(self.sizes), ORIGINAL: pairs(self.originals)}


def make_batch(
    codec: CodecSpec,
    keys: Sequence[str],
    captions: Sequence[str],
    tokens: Sequence[Sequence[int]],
    hashes: Sequence[str],
    stored: NDArray[Any] | Sequence[NDArray[Any]],
    shapes: Shapes | None = None,
) -> pa.RecordBatch:
    """One record batch of a part file. stored: [N, ...], not copied; with `shapes` one array for each sample."""
    column, kind = stored_column(codec)
    columns = {
        "key": pa.array(keys, pa.string()),
        "caption": pa.array(captions, pa.string()),
        "tokens": pa.array(tokens, pa.list_(pa.int32())),
        "hash": pa.array(hashes, pa.string()),
    }
    if shapes is None:
        flat = np.ascontiguousarray(stored).reshape(len(keys), math.prod(stored.shape[1:]))  # type: ignore[union-attr]
        columns[column] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1), kind), flat.shape[1])
    else:
        ends = np.cumsum([0, *(array.size for array in stored)], dtype=np.int32)
        values = np.concatenate([np.zeros(0, kind.to_pandas_dtype()), *(array.reshape(-1) for array in stored)])
        columns[column] = pa.ListArray.from_arrays(pa.array(ends), pa.array(values, kind))
        columns |= shapes.columns()
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


class Rows:
    """What a part stores of each sample, [channels, h, w] and of any shape: views into its memory."""

    def __init__(self, codec: CodecSpec, batch: pa.RecordBatch) -> None:
        column, _ = stored_column(codec)
        lists = batch.column(column)
        self.values = lists.values.to_numpy(zero_copy_only=True)
        self.ends = lists.offsets.to_numpy()
        self.sizes = sizes_of(batch)
        self.shapes = [stored_shape(codec, (width, height)) for width, height in self.sizes.tolist()]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.ends[row] : self.ends[row + 1]].reshape(self.shapes[row])

    def fit(self) -> bool:
        """Whether every sample is as long as its shape says."""
        return bool((np.diff(self.ends) == [math.prod(shape) for shape in self.shapes]).all())


def stored_rows(codec: CodecSpec, batch: pa.RecordBatch) -> NDArray[Any] | Rows:
    """What a part stores, sample by sample: [N, channels, h, w], or `Rows` where it has several shapes."""
    if SIZE in batch.schema.names:
        return Rows(codec, batch)
    column, _ = stored_column(codec)
    return batch.column(column).flatten().to_numpy(zero_copy_only=True).reshape(len(batch), *stored_shape(codec))


def stored_shape(codec: CodecSpec, size: Shape | None = None) -> tuple[int, int, int]:
    """Shape of what is stored of a picture of this (width, height); of the square, where none is given."""
    channels, height, width = codec.latent_shape(size) if size else codec.shape
    return channels * (1 if codec.kind == "pixels" else 2), height, width


def sizes_of(batch: pa.RecordBatch, column: str = "size") -> NDArray[np.int64]:
    """(width, height) in pixels of the samples of a part of several shapes: int64 [N, 2]."""
    return batch.column(column).flatten().to_numpy().astype(np.int64).reshape(-1, 2)


def part_path(folder: Path, split: str, group: int, piece: int = 0) -> Path:
    """Where the part of a unit lies; sorted names give the order of the source."""
    return folder / split / f"part-{group:05d}-{piece:05d}.arrow"


def write_part(path: Path, batch: pa.RecordBatch) -> None:
    """Write an Arrow stream file of one batch, whole or not at all."""
    with _written_aside(path, batch.nbytes) as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)


def read_part(path: Path) -> pa.RecordBatch:
    """The one batch of a part file, memory-mapped. UserError where the file is missing or broken."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            batch = reader.read_next_batch()
            batch.validate()  # cheap; `merge` and the sha256 of the records look closer
            return batch
    except (pa.ArrowException, OSError, StopIteration) as error:
        line = (str(error).splitlines() or ["no rows"])[0][:160]
        raise UserError(f"{path} cannot be read ({line}): delete the dataset folder and prepare the data again") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    data = text.encode("utf-8")
    with _written_aside(path, len(data)) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last (where the system can)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy_file(source: Path, target: Path) -> str:
    """Copy a file, whole or not at all; return the sha256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as read, _written_aside(target, source.stat().st_size) as file:
        while chunk := read.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unit_path(folder: Path, group: int, piece: int) -> Path:
    """Where the record of a unit lies."""
    return folder / "units" / f"{group:05d}-{piece:05d}.json"


def save_unit(folder: Path, unit: Unit) -> None:
    """Make a unit count."""
    write_text(unit_path(folder, *unit.id), unit.model_dump_json() + "\n")


def load_unit(folder: Path, group: int, piece: int) -> Unit | None:
    """The record of a unit; None where it is not finished. UserError where the record is broken or not what its name says."""
    path = unit_path(folder, group, piece)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete {folder} and prepare the data again") from error
    try:
        unit = Unit.model_validate_json(text)
    except ValueError as error:
        raise UserError(f"{path} is broken: delete {folder} and prepare the data again") from error
    if unit.id != (group, piece) or len(unit.digests) != 32 * len(unit.keys) or unit.read != len(unit.keys) + len(unit.dropped):
        raise UserError(f"{path} does not hold what its name says: delete {folder} and prepare the data again")
    return unit


def load_units(folder: Path) -> dict[UnitId, Unit]:
    """Records of all finished units, in order. The files named are found by the plan's numbers, never by what a record says."""
    units: dict[UnitId, Unit] = {}
    for path in sorted((folder / "units").glob("?????-?????.json")):
        with contextlib.suppress(ValueError):
            group, piece = map(int, path.stem.split("-"))
            if unit_path(folder, group, piece) == path and (unit := load_unit(folder, group, piece)):
                units[unit.id] = unit
    return units


def measure(codec: CodecSpec, stored: NDArray[Any]) -> Moments:
    """Sums over stored samples [N, ...]: of pixels in whole numbers (exact), of VAE moments in float64. UserError on NaN or infinity."""
    channels = codec.shape[0]
    if codec.kind == "pixels":
        axes = (0, 2, 3)
        total = stored.sum(axes, dtype=np.int64)
        square = np.square(stored, dtype=np.uint16).sum(axes, dtype=np.int64)  # 255 squared still fits
        return Moments(count=stored[:, 0].size, total=total.tolist(), square=square.tolist(), inside=[0.0] * channels)
    mean, logvar = (part.astype(np.float64) for part in np.split(stored, 2, axis=1))
    if not (np.isfinite(mean).all() and np.isfinite(logvar).all()):
        raise UserError(f"the codec {codec.id!r} gives NaN or infinite latents: use another codec")
    axes = (0, 2, 3)
    return Moments(
        count=mean[:, 0].size,
        total=mean.sum(axes).tolist(),
        square=(mean**2).sum(axes).tolist(),
        inside=np.exp(np.clip(logvar, -30, 20)).sum(axes).tolist(),
    )


def measure_rows(codec: CodecSpec, rows: Iterable[NDArray[Any]]) -> Moments:
    """The same of samples of several shapes."""
    groups: dict[tuple[int, ...], list[NDArray[Any]]] = {}
    for row in rows:
        groups.setdefault(row.shape, []).append(row)
    parts = [measure(codec, np.stack(groups[shape])) for shape in sorted(groups)]
    add = lambda name: [sum(values) for values in zip(*(getattr(part, name) for part in parts))]
    return Moments(count=sum(part.count for part in parts), total=add("total"), square=add("square"), inside=add("inside"))


@contextlib.contextmanager
def _written_aside(path: Path, size: int) -> Iterator[Any]:
    """A file to write `size` bytes to, that appears as `path` when all is written; UserError where there is no room."""
    # A name of its own: two workers may well write the same unit, and the bytes are the same whoever is last.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with full_disk_told(path, size):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except Exception:
            with contextlib.suppress(OSError):  # a full disk needs the room, and what is half written is worth nothing
                aside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def full_disk_told(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn `no space left`, `quota exceeded` and `file too large` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers and pyarrow have errors of their own for it
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
            why = "the file may not grow so large" if number == errno.EFBIG else "no space left"
            need = f" ({size:,} bytes)" if size else ""
            raise UserError(f"{why} to write {path}{need}: free some and rerun the same command to continue") from error
        raise
