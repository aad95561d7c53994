"""What `prepare` settles before the work: is the folder free, what will be read, which tokenizer, how large and how long."""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flowt2i import shapes
from flowt2i.data.captions import read_caption
from flowt2i.data.decode import Rules, decode
from flowt2i.data.encode import Encoder
from flowt2i.data.finish import clear
from flowt2i.data.locks import others_at_work
from flowt2i.data.options import PrepareOptions
from flowt2i.data.sample import Dropped, Shard
from flowt2i.data.units import Unit, UnitId, full_disk_told, load_units, write_json, write_text
from flowt2i.data.walk import RUN
from flowt2i.description import CodecSpec, TextSpec
from flowt2i.errors import UserError
from flowt2i.human import duration, size
from flowt2i.shapes import Shape

Say = Callable[[str], None]

PATCH = 8  # of the presets on pixels: the step of the sides of derived buckets
FEW = 32  # samples timed for the projection
TOKENIZER_CAPTIONS, COSTLY_CAPTIONS = 20_000, 2_000  # captions the built-in tokenizer learns from; fewer where each means a download
MAX_UNITS = 400  # parts of a large dataset: each costs an open file in training
MAX_UNIT_BYTES = 256 << 20  # held in memory while a unit is filled


class Plan(BaseModel):
    """What the first run settled and every later one and every other worker obeys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: list[str]  # signatures, in order
    groups: list[int]  # number of shards in each group of consecutive ones; a unit does not reach beyond its group
    estimate: int | None  # samples to read; None: unknown
    unit_rows: int = Field(ge=1)
    codec: CodecSpec
    text: TextSpec
    buckets: tuple[Shape, ...] = ()  # (width, height) of the shapes that pictures may have; none: all are squares

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read `folder/plan.json`; UserError where it is missing or not one of ours."""
        path = folder / "plan.json"
        try:
            plan = cls.model_validate_json(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or broken: delete {folder} and prepare the data again") from error
        if min(plan.groups, default=1) < 1 or sum(plan.groups) != len(plan.shards):
            raise UserError(f"{path} is broken (its groups do not add up): delete {folder} and prepare the data again")
        return plan

    def grouped(self, shards: list[Shard]) -> list[list[Shard]]:
        """The shards by group."""
        rest = iter(shards)
        return [list(itertools.islice(rest, count)) for count in self.groups]


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
        if not isinstance(before, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken: delete {folder} and prepare again") from error
    done = (folder / "dataset.json").exists()
    if (name := _changed(before, options)) and (done or _kept(load_units(folder))):
        theirs, ours = before.get(name), options.lasting()[name]
        raise UserError(f"{folder} was prepared with {name}={theirs!r}, not {ours!r}: use the same options or another --out")
    return done


def open_codec(options: PrepareOptions) -> Any:
    """The codec, on the device where it will work."""
    from flowt2i.codec import load_codec

    codec = load_codec(options.codec, options.image_size)
    if codec.spec.kind == "pixels":
        return codec
    import torch

    best = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"  # torchrun: a GPU for each rank
    device = options.device if options.device != "auto" else best
    try:
        return codec.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({(str(error).splitlines() or ['?'])[0][:120]}): try --device cpu") from error


def make_plan(folder: Path, options: PrepareOptions, shards: list[Shard], codec: Any) -> tuple[Plan, Any]:
    """The plan, made by the first run, and the tokenizer. To be called in one's `turn`."""
    from flowt2i.data.like import tokenizer_of
    from flowt2i.text import load_tokenizer, make_tokenizer

    signatures = [shard.signature() for shard in shards]
    if (folder / "plan.json").exists():
        plan = Plan.load(folder)
        why = _outdated(folder, options, plan, signatures, codec)
        kept = _kept(load_units(folder))
        if why and kept:
            raise UserError(f"{why}: restore it, or use another --out")
        others = others_at_work(folder, options.share())
        if why and others:
            raise UserError(f"other workers are at work in {folder}, and {why}: stop them, or name another --out")
        if not why and (kept or others or not options.share().alone):
            return plan, load_tokenizer(plan.text, folder)
    clear(folder)  # no sample was kept yet, so nothing is lost by starting again, with other options or a mended source
    if options.like and options.text == "builtin":
        tokenizer = tokenizer_of(options.like)
    else:
        tokenizer = make_tokenizer(options.text, captions=_prefix(options, shards), max_tokens=options.max_tokens, vocab_size=options.vocab_size)
    shapes_asked = buckets_of(options, codec.spec)
    sizes = _estimates(shards)
    total = None if None in sizes else sum(size or 0 for size in sizes)
    estimate = min(total, options.limit) if total is not None and options.limit else options.limit if total is None else total
    row_bytes = int(np.prod(codec.stored_shape)) * codec.stored_dtype.itemsize
    rows = options.unit_rows or max(1000, -(-(estimate or 0) // MAX_UNITS))
    if options.limit and not options.unit_rows:  # a unit is worked on to its end, so that what lies beyond the limit is in vain
        rows = min(rows, max(RUN, -(-options.limit // 8)))
    rows = max(1, min(rows, MAX_UNIT_BYTES // row_bytes))
    plan = Plan(shards=signatures, groups=_group(sizes, rows), estimate=estimate, unit_rows=rows, codec=codec.spec, text=tokenizer.spec, buckets=shapes_asked)
    write_json(folder / "options.json", options.lasting())
    with full_disk_told(folder / "tokenizer"):
        tokenizer.save(folder)
    write_text(folder / "plan.json", plan.model_dump_json(indent=2) + "\n")
    return plan, tokenizer


def buckets_of(options: PrepareOptions, codec: CodecSpec) -> tuple[Shape, ...]:
    """The shapes that pictures may have, as `--buckets` asks for them. UserError where it asks for what cannot be."""
    from flowt2i.data.like import patch_of

    patch = patch_of(options.like) if options.like else 0
    unit = codec.factor * (patch or 1)
    if options.image_size % unit:
        near = shapes.nearest_multiple(options.image_size, unit)
        ways = f"its sides are multiples of {unit}; take {near}, or give its data for --like"
        raise UserError(f"--image-size {options.image_size} cannot be made by {options.like}: {ways}")
    if not options.buckets:
        if options.bucket_step:
            raise UserError("--bucket-step says how to derive buckets: add --buckets auto, or leave it out")
        return ()
    if "scenes" in options.sources:
        raise UserError("the built-in scenes are squares: leave --buckets out")
    if options.bucket_step and options.buckets != "auto":
        raise UserError("--buckets lists the shapes, and --bucket-step says how to derive them: leave one of them out")
    if options.bucket_step % unit:
        near = shapes.nearest_multiple(options.bucket_step, unit)
        raise UserError(f"--bucket-step {options.bucket_step} is not a multiple of {unit}, which codec and patch make: take {near}")
    if options.buckets == "auto":
        usual = math.gcd(PATCH, options.image_size) if codec.kind == "pixels" and not patch else 1
        unit = options.bucket_step or unit * usual
    return tuple(shapes.buckets(options.buckets, options.image_size, unit, options.max_aspect))


def _outdated(folder: Path, options: PrepareOptions, plan: Plan, signatures: list[str], codec: Any) -> str:
    """What changed since the plan was made; '' where nothing did."""
    if plan.shards != signatures:
        changed = next((a for a, b in zip(signatures, plan.shards) if a != b), "their number")
        return f"the source changed since {folder} was begun ({changed})"
    if plan.codec.fingerprint != codec.spec.fingerprint:
        return f"the codec {options.codec!r} changed since {folder} was begun"
    if name := _changed(json.loads((folder / "options.json").read_text()), options):
        return f"{name} changed since {folder} was begun"
    return ""


def _changed(before: dict[str, Any], options: PrepareOptions) -> str:
    return PrepareOptions.differing(before, options.lasting())


def _kept(units: dict[UnitId, Unit]) -> int:
    return sum(len(unit.keys) for unit in units.values())


def _group(sizes: list[int | None], rows: int) -> list[int]:
    """How many consecutive shards make a group: as many as fill a unit, since each part costs an open file; large ones stand alone."""
    groups: list[int] = []
    filled = rows + 1
    for guess in sizes:
        more = rows + 1 if guess is None else guess
        if groups and filled + more <= rows:
            groups[-1] += 1
            filled += more
        else:
            groups.append(1)
            filled = more
    return groups


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


def _estimates(shards: list[Shard]) -> list[int | None]:
    """About how many samples each shard has: tars beyond the eighth are judged by their size, not opened."""
    found: list[int | None] = []
    bytes_seen = samples_seen = opened = 0
    for shard in shards:
        size = Path(shard.name).stat().st_size if shard.name.endswith(".tar") else 0
        if size and opened >= 8:
            found.append(round(samples_seen * size / max(1, bytes_seen)))
            continue
        count = shard.estimate()
        shard.forget()
        found.append(count)
        if size:
            bytes_seen, samples_seen, opened = bytes_seen + size, samples_seen + (count or 0), opened + 1
    return found


def project(folder: Path, options: PrepareOptions, shards: list[Shard], encoder: Encoder, plan: Plan, done: dict[UnitId, Unit], say: Say) -> None:
    """Say how large the dataset will be and how long it will take; UserError where the disk cannot hold it."""
    share, read = options.share(), sum(unit.read for unit in done.values())
    if done:
        say(f"continuing after {read} samples in {len(done)} units")
    row_bytes = int(np.prod(encoder.codec.stored_shape)) * encoder.codec.stored_dtype.itemsize + 250  # key, caption, tokens, hash and record
    free = shutil.disk_usage(folder).free
    if plan.estimate is None:
        say(f"the number of samples is unknown: {row_bytes / 1000:.1f} kB each, room for {free // row_bytes:,} (see --limit)")
        return
    left = max(0, plan.estimate - read)
    if left * row_bytes > free:
        raise UserError(f"{folder} would grow by {size(left * row_bytes)}, the disk has {size(free)} left: use another --out or --limit")
    left = -(-left // share.of)
    seconds = 0.0 if done else _time_per_sample(options, shards, encoder, plan) * left
    who = "" if share.alone else f"worker {share}: about "
    say(f"{who}{left:,} samples to read, {size(left * row_bytes)} to write" + (f", {duration(seconds)} to work" if seconds else ""))


def _time_per_sample(options: PrepareOptions, shards: list[Shard], encoder: Encoder, plan: Plan) -> float:
    """Seconds a sample will take, from a few that are decoded and encoded here."""
    few = list(itertools.islice(itertools.chain.from_iterable(shard.samples() for shard in shards), FEW))
    if not few:
        return 0.0
    rules = rules_of(options, plan.buckets)
    decode(few, rules)  # the first time fills caches
    start = time.perf_counter()
    found = decode(few, rules).pixels
    seconds = (time.perf_counter() - start) / len(few) / options.processes()
    pixels = np.stack([picture for picture in found if picture.shape == found[0].shape]) if found else np.zeros(0)
    if len(pixels) and encoder.codec.spec.kind == "vae":
        for _ in range(2):  # the first call warms up
            start = time.perf_counter()
            encoder(pixels[: options.batch_size])
        seconds += (time.perf_counter() - start) / len(pixels[: options.batch_size])
    return seconds + 1e-4


def rules_of(options: PrepareOptions, buckets: tuple[Shape, ...] = ()) -> Rules:
    """The options that workers need."""
    return Rules(options.image_size, options.min_side, options.max_aspect, options.min_caption, options.max_caption, buckets)
