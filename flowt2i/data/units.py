"""Units: the pieces in which a dataset is written, each complete or absent, so that a killed preparation can continue.

A unit is a fixed number of consecutive samples of the source. Its Arrow parts are written under other names, synced and
renamed; its record, written last in the same way, makes it count. What has no record is written again.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from flowt2i.description import CodecSpec
from flowt2i.errors import UserError

SPLITS = ("train", "heldout")


class Moments(BaseModel):
    """Sums from which per-channel statistics are merged: of values, of squares and of variances inside a sample (VAE)."""

    count: int = 0  # values in a channel
    total: list[float] = []
    square: list[float] = []
    inside: list[float] = []


class Unit(BaseModel):
    """Record of a finished unit."""

    model_config = ConfigDict(extra="forbid")

    number: int
    next: tuple[int, int] | None  # shard and sample at which the next unit starts; None: the limit is reached
    read: int
    rows: dict[str, int]  # split -> samples
    dropped: list[dict[str, str]]  # source, key, reason, detail
    truncated: int  # captions cut to max_tokens
    longest: int  # tokens
    seen: str  # hex digests, 16 bytes each, of the samples kept
    moments: Moments
    seconds: float
    stages: dict[str, float]  # seconds spent waiting for decoding, in encoding, in tokenizing, in writing


def stored_column(codec: CodecSpec) -> tuple[str, pa.DataType]:
    """Name and type of one stored value: uint8 pixels, or float16 moments (mean and log-variance)."""
    return ("pixels", pa.uint8()) if codec.kind == "pixels" else ("moments", pa.float16())


def make_batch(
    codec: CodecSpec,
    keys: Sequence[str],
    captions: Sequence[str],
    tokens: Sequence[Sequence[int]],
    hashes: Sequence[str],
    stored: NDArray[Any],
) -> pa.RecordBatch:
    """One record batch of a part file; `stored` [N, ...] is not copied."""
    column, kind = stored_column(codec)
    flat = np.ascontiguousarray(stored).reshape(len(keys), math.prod(stored.shape[1:]))
    return pa.RecordBatch.from_arrays(
        [
            pa.array(keys, pa.string()),
            pa.array(captions, pa.string()),
            pa.array(tokens, pa.list_(pa.int32())),
            pa.array(hashes, pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1), kind), flat.shape[1]),
        ],
        names=["key", "caption", "tokens", "hash", column],
    )


def part_path(folder: Path, split: str, number: int) -> Path:
    """Where the part of a unit lies."""
    return folder / split / f"part-{number:05d}.arrow"


def write_part(path: Path, batch: pa.RecordBatch) -> None:
    """Write an Arrow stream file of one batch, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with _full_disk_told(path):
        with aside.open("wb") as file:
            with pa.ipc.new_stream(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)


def read_part(path: Path) -> pa.RecordBatch:
    """The one batch of a part file, memory-mapped. UserError where the file is missing or broken."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            return reader.read_next_batch()
    except (pa.ArrowException, OSError, StopIteration) as error:
        line = (str(error).splitlines() or ["no rows"])[0][:160]
        raise UserError(f"{path} cannot be read ({line}): delete the dataset folder and prepare the data again") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with _full_disk_told(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)


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


def unit_path(folder: Path, number: int) -> Path:
    """Where the record of a unit lies."""
    return folder / "units" / f"{number:05d}.json"


def save_unit(folder: Path, unit: Unit) -> None:
    """Make a unit count."""
    write_text(unit_path(folder, unit.number), unit.model_dump_json() + "\n")


def load_units(folder: Path) -> list[Unit]:
    """Records of all finished units, in order."""
    units: list[Unit] = []
    while (path := unit_path(folder, len(units))).exists():
        try:
            units.append(Unit.model_validate_json(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{path} is broken: delete {folder} and prepare the data again") from error
    return units


def measure(codec: CodecSpec, stored: NDArray[Any]) -> Moments:
    """Sums over stored samples [N, ...]: of pixels in whole numbers (exact), of VAE moments in float64. UserError on NaN or infinity."""
    channels = codec.shape[0]
    if codec.kind == "pixels":
        counts = np.stack([np.bincount(stored[:, c].reshape(-1), minlength=256) for c in range(channels)])
        values = np.arange(256)
        total, square = (counts * values).sum(1), (counts * values**2).sum(1)
        return Moments(count=int(counts[0].sum()), total=total.tolist(), square=square.tolist(), inside=[0.0] * channels)
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


class _full_disk_told:
    """Turn `no space left` into a UserError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and (error.errno in (28, 122) or "No space left" in str(error)):
            raise UserError(f"no space left to write {self.path}: free some and rerun the same command to continue") from error
