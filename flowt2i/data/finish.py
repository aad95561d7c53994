"""From finished units to a finished dataset: what stays, statistics, the description, the report, and what `datasets` wants to see."""

import contextlib
import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowt2i import shapes
from flowt2i.data.options import PrepareOptions
from flowt2i.data.settle import Settled, Settling, is_heldout
from flowt2i.data.units import (
    ORIGINAL,
    SIZE,
    SPLITS,
    Moments,
    Shapes,
    make_batch,
    measure_rows,
    part_path,
    read_part,
    sizes_of,
    stored_column,
    stored_rows,
    stored_shape,
    write_json,
    write_part,
    write_text,
)
from flowt2i.description import Bucket, CodecSpec, DatasetDescription, TextSpec
from flowt2i.errors import UserError
from flowt2i.shapes import Shape

PROMPTS = 16  # held-out captions kept in the description for previews


def finish(
    folder: Path, options: PrepareOptions, codec: CodecSpec, text: TextSpec, settling: Settling, hub: tuple[str, ...], buckets: tuple[Shape, ...] = ()
) -> dict[str, Any]:  # fmt: skip
    """Complete a dataset whose units are all there; return the report. `dataset.json` comes last and makes it complete. hub: which sources came from there.

    Killed anywhere and done again it does the same: records are not changed, and a part is either as its unit wrote it or as it stays.
    """
    settling.hold_one_out()
    units = settling.units
    for settled in units:
        _settle_parts(folder, settled, options)
    _remove_strangers(folder, units)
    found = _survey_shapes(folder, units, buckets) if buckets else ()
    report = _report(folder, units, options) | (_told_shapes(folder, units, codec, buckets, found) if buckets else {})
    lines = (json.dumps(drop.model_dump(exclude={"at"} if drop.detail else {"at", "detail"}), ensure_ascii=False) for unit in units for drop in unit.dropped)
    write_text(folder / "dropped.jsonl", "".join(line + "\n" for line in lines))
    write_json(folder / "report.json", report)
    if not report["train"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report["dropped"].items()) or "the source is empty"
        shutil.rmtree(folder / "units", ignore_errors=True)  # so that a mended source is read again
        raise UserError(f"no sample to train on: {report['read']} read, {report['kept']} kept ({reasons}); see {folder / 'dropped.jsonl'}")
    mean, std = statistics(codec, [_moments(folder, settled, codec, options) for settled in units])
    for channel, value in enumerate(std):
        if not value > 1e-4:
            raise UserError(f"channel {channel} of the latents is constant: the images are all alike or the codec {codec.id!r} is broken")
    pairs, prompts, longest = _survey(folder, units)
    for split in SPLITS:
        _write_hf(folder, split, [settled for settled in units if settled.chosen(split)], codec, pairs, bool(buckets))
    write_json(folder / "dataset_dict.json", {"splits": list(SPLITS)})
    description = DatasetDescription(
        source=", ".join(options.sources),
        hub_sources=hub,
        codec=codec,
        text=text,
        latent_mean=mean,
        latent_std=std,
        train_count=report["train"],
        heldout_count=report["heldout"],
        heldout_fraction=options.heldout,
        longest_caption=longest,
        prompts=prompts,
        fingerprint=pairs,
        buckets=found,
    )
    write_text(measured_path(folder), description.model_dump_json(indent=2) + "\n")
    write_text(folder / "dataset.json", description.model_dump_json(indent=2) + "\n")
    return report


def load_report(folder: Path) -> dict[str, Any]:
    """`report.json` of a complete dataset; UserError where it is missing or not one of ours."""
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not isinstance(report.get("dropped"), dict):
            raise ValueError("not a report")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is missing or broken: restore it, or prepare the data again") from error
    return report


def measured_path(folder: Path) -> Path:
    """A second copy of the description, with which training compares `dataset.json`: an edit by hand is noticed."""
    return folder / "units" / "description.json"


def clear(folder: Path) -> None:
    """Remove what an earlier attempt left that kept no sample."""
    for name in ("units", "tokenizer", *SPLITS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("plan.json", "report.json", "dropped.jsonl", "dataset_dict.json", "options.json"):
        (folder / name).unlink(missing_ok=True)


def statistics(codec: CodecSpec, parts: list[Moments]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of raw latents (pixels in [-1, 1]); of a VAE's samples, not of their means only."""
    parts = [part for part in parts if part.count]
    count = sum(part.count for part in parts)
    means, stds = [], []
    for channel in range(codec.shape[0]):
        total, square, inside = (math.fsum(getattr(part, name)[channel] for part in parts) for name in ("total", "square", "inside"))
        mean = total / count
        std = math.sqrt(max(0.0, square / count - mean * mean + inside / count))
        means.append(mean / 127.5 - 1 if codec.kind == "pixels" else mean)
        stds.append(std / 127.5 if codec.kind == "pixels" else std)
    return tuple(means), tuple(stds)


def _as_written(settled: Settled, split: str, options: PrepareOptions) -> list[int]:
    """Numbers of the samples that the unit wrote into a split."""
    return [number for number, key in enumerate(settled.unit.keys) if is_heldout(key, options.heldout) == (split == "heldout")]


def _settle_parts(folder: Path, settled: Settled, options: PrepareOptions) -> None:
    """Write those parts anew of which something is left out or moved; from train to held out only, so held out comes first."""
    before = {split: _as_written(settled, split, options) for split in SPLITS}
    for split in reversed(SPLITS):
        path, chosen = part_path(folder, split, *settled.unit.id), settled.chosen(split)
        if chosen == before[split] or _keys(path) == [settled.unit.keys[number] for number in chosen]:  # the same, or settled before a kill
            continue
        if not chosen:
            path.unlink()
            continue
        home = split if set(chosen) <= set(before[split]) else "train"
        batch = read_part(part_path(folder, home, *settled.unit.id))
        write_part(path, batch.take(pa.array([before[home].index(number) for number in chosen])))


def _keys(path: Path) -> list[str]:
    return read_part(path).column("key").to_pylist() if path.exists() else []


def _remove_strangers(folder: Path, units: list[Settled]) -> None:
    """Remove parts beyond the limit, parts without a record, and what killed runs left half written."""
    ours = {part_path(folder, split, *settled.unit.id) for settled in units for split in SPLITS if settled.chosen(split)}
    for split in SPLITS:
        for path in (folder / split).glob("part-*.arrow"):
            if path not in ours:
                path.unlink()
    for place in (folder, folder / "units", *(folder / split for split in SPLITS)):
        for path in place.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _moments(folder: Path, settled: Settled, codec: CodecSpec, options: PrepareOptions) -> Moments:
    if settled.train == _as_written(settled, "train", options):
        return settled.unit.moments
    if not settled.train:
        return Moments()
    rows = stored_rows(codec, read_part(part_path(folder, "train", *settled.unit.id)))
    return measure_rows(codec, [rows[number] for number in range(len(rows))])


def _report(folder: Path, units: list[Settled], options: PrepareOptions) -> dict[str, Any]:
    counts = {split: sum(len(settled.chosen(split)) for settled in units) for split in SPLITS}
    read, seconds = sum(settled.read for settled in units), sum(settled.unit.seconds for settled in units)
    stages: Counter[str] = Counter()
    for settled in units:
        stages.update(settled.unit.stages)
    return {
        "read": read,
        "kept": sum(counts.values()),
        "dropped": dict(Counter(drop.reason for settled in units for drop in settled.dropped).most_common()),
        "bytes": sum(path.stat().st_size for split in SPLITS for path in (folder / split).glob("*.arrow")),
        "seconds": round(seconds, 3),
        "images_per_s": round(read / seconds, 1) if seconds else 0.0,
        **counts,
        "truncated_captions": sum(settled.unit.truncated for settled in units),
        "stages": {name: round(value, 3) for name, value in stages.items()},
        "workers": options.processes(),
    }


def _survey(folder: Path, units: list[Settled]) -> tuple[str, tuple[str, ...], int]:
    """The fingerprint of the data, some of its captions for previews (held-out ones where there are any), and the longest caption in tokens."""
    lines: list[str] = []
    captions: dict[str, list[str]] = {split: [] for split in SPLITS}
    longest = 0
    for settled in units:
        for split in SPLITS:
            if settled.chosen(split):
                batch = read_part(part_path(folder, split, *settled.unit.id))
                lines += [f"{key}\t{digest}\n" for key, digest in zip(batch.column("key").to_pylist(), batch.column("hash").to_pylist())]
                longest = max(longest, int(np.diff(batch.column("tokens").offsets.to_numpy()).max()))
                if split == "heldout" or len(captions["train"]) < 1000:
                    captions[split] += batch.column("caption").to_pylist()
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode())
    choice = list(dict.fromkeys(captions["heldout"])) or list(dict.fromkeys(captions["train"]))
    prompts = tuple(choice[i * len(choice) // PROMPTS] for i in range(PROMPTS)) if len(choice) > PROMPTS else tuple(choice)
    return digest.hexdigest(), prompts, longest


def _survey_shapes(folder: Path, units: list[Settled], buckets: tuple[Shape, ...]) -> tuple[Bucket, ...]:
    """The buckets that pictures fell into, and how many; one that none did is left out."""
    counts = {split: Counter(size for sizes, _ in _shapes(folder, units, split) for size in sizes) for split in SPLITS}
    found = (Bucket(width=w, height=h, train=counts["train"][w, h], heldout=counts["heldout"][w, h]) for w, h in buckets)
    return tuple(bucket for bucket in found if bucket.train or bucket.heldout)


def _shapes(folder: Path, units: list[Settled], split: str) -> Iterator[tuple[list[Shape], list[Shape]]]:
    """Of each part of a split, the (width, height) that its pictures have, and had."""
    for settled in units:
        if settled.chosen(split):
            batch = read_part(part_path(folder, split, *settled.unit.id))
            sizes, originals = ([(int(w), int(h)) for w, h in sizes_of(batch, column)] for column in (SIZE, ORIGINAL))
            yield sizes, originals


def _told_shapes(folder: Path, units: list[Settled], codec: CodecSpec, buckets: tuple[Shape, ...], found: tuple[Bucket, ...]) -> dict[str, Any]:
    """What the report says of buckets: how many pictures each has, which had none, and the mean share of a picture that crops left."""
    pairs = [pair for split in SPLITS for sizes, originals in _shapes(folder, units, split) for pair in zip(sizes, originals)]
    square = (codec.image_size, codec.image_size)
    mean = lambda shares: round(math.fsum(shares) / max(1, len(pairs)), 4)
    return {
        "buckets": {shapes.name(bucket.size): {"train": bucket.train, "heldout": bucket.heldout} for bucket in found},
        "empty_buckets": [shapes.name(size) for size in buckets if size not in [bucket.size for bucket in found]],
        "pixels_kept": {
            "buckets": mean(shapes.kept(*original, size) for size, original in pairs),
            "square": mean(shapes.kept(*original, square) for _, original in pairs),
        },
    }


def told(report: dict[str, Any]) -> list[str]:
    """What a report says of buckets, in lines for people; none where there are no buckets."""
    if "buckets" not in report:
        return []
    counts = ", ".join(f"{name} {sum(of.values()):,}" for name, of in report["buckets"].items())
    kept = report["pixels_kept"]
    lines = [f"buckets: {counts}", f"of the pictures' area {kept['buckets']:.1%} is kept, by square crops it would be {kept['square']:.1%}"]
    return lines + ([f"no picture fell into {', '.join(report['empty_buckets'])}: left out"] if report["empty_buckets"] else [])


def _write_hf(folder: Path, split: str, units: list[Settled], codec: CodecSpec, fingerprint: str, buckets: bool = False) -> None:
    """What `datasets.load_from_disk` reads beside the Arrow files."""
    files = [part_path(folder, split, *settled.unit.id) for settled in units]
    column, kind = stored_column(codec)
    shape = stored_shape(codec)
    if not files:  # a split without samples is a part without rows
        files = [part_path(folder, split, 0)]
        write_part(files[0], make_batch(codec, [], [], [], [], np.zeros((0, *shape), kind.to_pandas_dtype()), Shapes([], []) if buckets else None))
    text = {"dtype": "string", "_type": "Value"}
    values = {"dtype": "uint8" if column == "pixels" else "float16", "_type": "Value"}
    features: dict[str, Any] = {
        "key": text,
        "caption": text,
        "tokens": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
        "hash": text,
        column: {"feature": values, "length": math.prod(shape), "_type": "List"},
    }
    if buckets:
        features[column] = {"feature": values, "_type": "List"}
        features |= {name: {"feature": {"dtype": "int32", "_type": "Value"}, "length": 2, "_type": "List"} for name in (SIZE, ORIGINAL)}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    write_json(folder / split / "dataset_info.json", info)
    state: dict[str, Any] = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": hashlib.sha256(f"{fingerprint}/{split}".encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    write_json(folder / split / "state.json", state)
