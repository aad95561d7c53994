"""What `prepare` settles before the work: is the folder free, what will be read, which tokenizer, how large and how long."""

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowt2i.data.captions import read_caption
from flowt2i.data.decode import Rules, decode
from flowt2i.data.finish import clear
from flowt2i.data.options import PrepareOptions
from flowt2i.data.sample import Dropped, Shard
from flowt2i.data.units import Unit, load_units, write_json
from flowt2i.description import CodecSpec, TextSpec
from flowt2i.errors import UserError

FEW = 32  # samples timed for the projection
TOKENIZER_CAPTIONS, COSTLY_CAPTIONS = 20_000, 2_000  # captions the built-in tokenizer learns from; fewer where each means a download
MAX_UNITS = 400  # parts of a large dataset: each costs an open file in training
MAX_UNIT_BYTES = 256 << 20  # held in memory while a unit is filled


def finished(folder: Path, options: PrepareOptions) -> bool:
    """Is the dataset complete? UserError where the folder holds something else, or samples prepared with other options."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder to write to")
    for source in options.sources:
        if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"{folder} lies inside the source {source}: name a folder outside of it with --out")
    if not folder.exists() or all(entry.name.startswith(".") for entry in folder.iterdir()):
        return False
    path = folder / "options.json"
    if not path.exists():
        raise UserError(f"{folder} is not empty and not a dataset that prepare began: name another folder")
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is broken: delete {folder} and prepare again") from error
    done = (folder / "dataset.json").exists()
    for name, value in options.lasting().items():
        if before.get(name) != value and (done or _kept(load_units(folder))):
            raise UserError(f"{folder} was prepared with {name}={before.get(name)!r}, not {value!r}: use the same options or another --out")
    return done


def open_codec(options: PrepareOptions) -> Any:
    """The codec, on the device where it will work."""
    from flowt2i.codec import load_codec

    codec = load_codec(options.codec, options.image_size)
    if codec.spec.kind == "pixels":
        return codec
    import torch

    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return codec.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({(str(error).splitlines() or ['?'])[0][:120]}): try --device cpu") from error


def make_plan(folder: Path, options: PrepareOptions, shards: list[Shard], codec: Any) -> tuple[list[Unit], dict[str, Any], Any]:
    """Finished units, the plan (made in the first run, obeyed in every later one) and the tokenizer."""
    from flowt2i.text import load_tokenizer, make_tokenizer

    path = folder / "plan.json"
    signatures = [shard.signature() for shard in shards]
    units = load_units(folder)
    if path.exists() and _kept(units):
        plan = json.loads(path.read_text())
        if plan["shards"] != signatures:
            changed = next((a for a, b in zip(signatures, plan["shards"]) if a != b), "their number")
            raise UserError(f"the source changed since {folder} was begun ({changed}): restore it, or use another --out")
        if CodecSpec.model_validate(plan["codec"]).fingerprint != codec.spec.fingerprint:
            raise UserError(f"the codec {options.codec!r} changed since {folder} was begun: restore it, or use another --out")
        return units, plan, load_tokenizer(TextSpec.model_validate(plan["text"]), folder)
    clear(folder)  # no sample was kept yet, so nothing is lost by starting again, with other options or a mended source
    tokenizer = make_tokenizer(
        options.text, captions=_prefix(options, shards), max_tokens=options.max_tokens, vocab_size=options.vocab_size
    )
    estimate = _estimate(shards, options.limit)
    row_bytes = int(np.prod(codec.stored_shape)) * codec.stored_dtype.itemsize
    rows = options.unit_rows or max(1000, -(-(estimate or 0) // MAX_UNITS))
    plan = {
        "shards": signatures,
        "estimate": estimate,
        "unit_rows": max(1, min(rows, MAX_UNIT_BYTES // row_bytes)),
        "codec": codec.spec.model_dump(mode="json"),
        "text": tokenizer.spec.model_dump(mode="json"),
    }
    write_json(folder / "options.json", options.lasting())
    tokenizer.save(folder)
    write_json(path, plan)
    return [], plan, tokenizer


def _kept(units: list[Unit]) -> int:
    return sum(sum(unit.rows.values()) for unit in units)


def _prefix(options: PrepareOptions, shards: list[Shard]) -> list[str]:
    """The captions the built-in tokenizer learns from; none where another one is used."""
    if options.text != "builtin":
        return []
    captions: list[str] = []
    for shard in shards:
        limit = min(COSTLY_CAPTIONS if shard.costly else TOKENIZER_CAPTIONS, options.limit or TOKENIZER_CAPTIONS)
        for sample in itertools.islice(shard.samples(), max(0, limit - len(captions))):
            with contextlib.suppress(Dropped):
                if not sample.reason:
                    captions.append(read_caption(sample, options.min_caption, options.max_caption))
    return captions


def _estimate(shards: list[Shard], limit: int | None) -> int | None:
    """About how many samples will be read: tars beyond the eighth are judged by their size, not opened."""
    total = bytes_seen = samples_seen = opened = 0
    for shard in shards:
        size = Path(shard.name).stat().st_size if shard.name.endswith(".tar") else 0
        if size and opened >= 8:
            total += round(samples_seen * size / bytes_seen)
            continue
        found = shard.estimate()
        shard.forget()
        if found is None:
            return limit
        total += found
        if size:
            bytes_seen, samples_seen, opened = bytes_seen + size, samples_seen + found, opened + 1
    return min(total, limit) if limit else total


def project(
    folder: Path,
    options: PrepareOptions,
    shards: list[Shard],
    codec: Any,
    units: list[Unit],
    plan: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Say how large the dataset will be and how long it will take; UserError where the disk cannot hold it."""
    done = sum(unit.read for unit in units)
    if units:
        say(f"continuing after {done} samples in {len(units)} units")
    row_bytes = int(np.prod(codec.stored_shape)) * codec.stored_dtype.itemsize + 250  # key, caption, tokens, hash and record
    free = shutil.disk_usage(folder).free
    total = plan["estimate"]
    if total is None:
        say(f"the number of samples is unknown: {row_bytes / 1000:.1f} kB each, room for {free // row_bytes:,} (see --limit)")
        return
    left = max(0, total - done)
    if left * row_bytes > free:
        raise UserError(f"{folder} would grow by {_size(left * row_bytes)}, the disk has {_size(free)} left: use another --out or --limit")
    seconds = 0.0 if units else _time_per_sample(options, shards, codec) * left
    say(f"{left:,} samples to read, {_size(left * row_bytes)} to write" + (f", {_duration(seconds)} to work" if seconds else ""))


def _time_per_sample(options: PrepareOptions, shards: list[Shard], codec: Any) -> float:
    """Seconds a sample will take, from a few that are decoded and encoded here."""
    import torch

    few = list(itertools.islice(itertools.chain.from_iterable(shard.samples() for shard in shards), FEW))
    if not few:
        return 0.0
    decode(few, rules_of(options))  # the first time fills caches
    start = time.perf_counter()
    pixels = decode(few, rules_of(options)).pixels
    seconds = (time.perf_counter() - start) / len(few) / options.processes()
    if len(pixels) and codec.spec.kind == "vae":
        for _ in range(2):  # the first call warms up
            start = time.perf_counter()
            codec.encode(torch.from_numpy(pixels[: options.batch_size]))
        seconds += (time.perf_counter() - start) / len(pixels[: options.batch_size])
    return seconds + 1e-4


def rules_of(options: PrepareOptions) -> Rules:
    """The options that workers need."""
    return Rules(options.image_size, options.min_side, options.max_aspect, options.min_caption, options.max_caption)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second `prepare` off the folder; the system frees the lock when the process ends, however it ends."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): name another folder with --out") from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another prepare is writing to {folder}: wait for it, or name another --out") from error
    try:
        yield
    finally:
        lock.release()


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
