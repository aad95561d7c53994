"""From finished units to a finished dataset: statistics, the description, the report, and what `datasets` wants to see."""

import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from flowt2i.data.options import PrepareOptions
from flowt2i.data.units import (
    SPLITS,
    Moments,
    Unit,
    load_units,
    make_batch,
    measure,
    part_path,
    read_part,
    save_unit,
    stored_column,
    write_json,
    write_part,
    write_text,
)
from flowt2i.description import CodecSpec, DatasetDescription, TextSpec
from flowt2i.errors import UserError

PROMPTS = 16  # held-out captions kept in the description for previews
LEAST_FOR_HELDOUT = 20  # from this many samples on, at least one is held out


def finish(folder: Path, options: PrepareOptions, codec: CodecSpec, text: TextSpec, workers: int) -> dict[str, Any]:
    """Complete a dataset whose units are all written; return the report. `dataset.json` comes last and makes it complete."""
    units = load_units(folder)
    if options.heldout > 0:
        units = _hold_one_out(folder, codec, units)
    report = _report(folder, units, workers)
    write_text(folder / "dropped.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for unit in units for row in _rows(unit)))
    write_json(folder / "report.json", report)
    if not report["train"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in report["dropped"].items()) or "the source is empty"
        raise UserError(f"no sample to train on: {report['read']} read, {report['kept']} kept ({reasons}); see {folder / 'dropped.jsonl'}")
    mean, std = statistics(codec, [unit.moments for unit in units])
    for channel, value in enumerate(std):
        if not value > 1e-4:
            raise UserError(f"channel {channel} of the latents is constant: the images are all alike or the codec {codec.id!r} is broken")
    pairs, prompts = _survey(folder, units)
    for split in SPLITS:
        _write_hf(folder, split, [unit for unit in units if unit.rows[split]], codec, pairs)
    write_json(folder / "dataset_dict.json", {"splits": list(SPLITS)})
    description = DatasetDescription(
        source=", ".join(options.sources),
        codec=codec,
        text=text,
        latent_mean=mean,
        latent_std=std,
        train_count=report["train"],
        heldout_count=report["heldout"],
        heldout_fraction=options.heldout,
        longest_caption=max(unit.longest for unit in units),
        prompts=prompts,
        fingerprint=pairs,
    )
    write_text(folder / "dataset.json", description.model_dump_json(indent=2) + "\n")
    return report


def clear(folder: Path) -> None:
    """Remove what an earlier attempt left that kept no sample."""
    for name in ("units", "tokenizer", *SPLITS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("options.json", "plan.json", "report.json", "dropped.jsonl", "dataset_dict.json"):
        (folder / name).unlink(missing_ok=True)


def statistics(codec: CodecSpec, parts: list[Moments]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of raw latents (pixels in [-1, 1]); of a VAE's samples, not of their means only."""
    count = sum(part.count for part in parts)
    means, stds = [], []
    for channel in range(codec.shape[0]):
        total, square, inside = (math.fsum(getattr(part, name)[channel] for part in parts) for name in ("total", "square", "inside"))
        mean = total / count
        std = math.sqrt(max(0.0, square / count - mean * mean + inside / count))
        means.append(mean / 127.5 - 1 if codec.kind == "pixels" else mean)
        stds.append(std / 127.5 if codec.kind == "pixels" else std)
    return tuple(means), tuple(stds)


def _hold_one_out(folder: Path, codec: CodecSpec, units: list[Unit]) -> list[Unit]:
    """Move the training sample with the least key hash to the held-out split where chance left that empty.

    In an order that a kill cannot spoil: held-out part, train part, record; done again from wherever it stopped.
    """
    kept = sum(sum(unit.rows.values()) for unit in units)
    if kept < LEAST_FOR_HELDOUT or any(unit.rows["heldout"] for unit in units):
        return units
    begun = [unit for unit in units if part_path(folder, "heldout", unit.number).exists()]
    if begun:
        unit = begun[0]
        key = read_part(part_path(folder, "heldout", unit.number)).column("key")[0].as_py()
    else:
        filled = [unit for unit in units if unit.rows["train"]]
        keys = [(hashlib.sha256(key.encode()).digest(), key, u) for u in filled for key in _train(folder, u).column("key").to_pylist()]
        _, key, unit = min(keys, key=lambda item: item[0])
    batch = _train(folder, unit)
    if len(batch) == unit.rows["train"]:
        row = batch.column("key").to_pylist().index(key)
        rest = np.delete(np.arange(len(batch)), row)
        write_part(part_path(folder, "heldout", unit.number), batch.take([row]))
        batch = batch.take(rest)
        write_part(part_path(folder, "train", unit.number), batch)
    column, _ = stored_column(codec)
    shape = (codec.shape[0] * (1 if column == "pixels" else 2), *codec.shape[1:])
    stored = batch.column(column).flatten().to_numpy(zero_copy_only=False).reshape(len(batch), *shape)
    unit = unit.model_copy(update={"rows": {"train": len(batch), "heldout": 1}, "moments": measure(codec, stored)})
    save_unit(folder, unit)
    return [unit if other.number == unit.number else other for other in units]


def _train(folder: Path, unit: Unit) -> Any:
    return read_part(part_path(folder, "train", unit.number))


def _rows(unit: Unit) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if value or name != "detail"} for row in unit.dropped]


def _report(folder: Path, units: list[Unit], workers: int) -> dict[str, Any]:
    counts = {split: sum(unit.rows[split] for unit in units) for split in SPLITS}
    read, seconds = sum(unit.read for unit in units), sum(unit.seconds for unit in units)
    stages: Counter[str] = Counter()
    for unit in units:
        stages.update(unit.stages)
    return {
        "read": read,
        "kept": sum(counts.values()),
        "dropped": dict(Counter(row["reason"] for unit in units for row in unit.dropped).most_common()),
        "bytes": sum(path.stat().st_size for split in SPLITS for path in (folder / split).glob("*.arrow")),
        "seconds": round(seconds, 3),
        "images_per_s": round(read / seconds, 1) if seconds else 0.0,
        **counts,
        "truncated_captions": sum(unit.truncated for unit in units),
        "stages": {name: round(value, 3) for name, value in stages.items()},
        "workers": workers,
    }


def _survey(folder: Path, units: list[Unit]) -> tuple[str, tuple[str, ...]]:
    """The fingerprint of the data, and some of its captions for previews: held-out ones where there are any."""
    lines: list[str] = []
    captions: dict[str, list[str]] = {split: [] for split in SPLITS}
    for unit in units:
        for split in SPLITS:
            if unit.rows[split]:
                batch = read_part(part_path(folder, split, unit.number))
                lines += [f"{key}\t{digest}\n" for key, digest in zip(batch.column("key").to_pylist(), batch.column("hash").to_pylist())]
                if split == "heldout" or len(captions["train"]) < 1000:
                    captions[split] += batch.column("caption").to_pylist()
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode())
    choice = list(dict.fromkeys(captions["heldout"])) or list(dict.fromkeys(captions["train"]))
    return digest.hexdigest(), tuple(choice[i * len(choice) // PROMPTS] for i in range(PROMPTS)) if len(choice) > PROMPTS else tuple(choice)


def _write_hf(folder: Path, split: str, units: list[Unit], codec: CodecSpec, fingerprint: str) -> None:
    """What `datasets.load_from_disk` reads beside the Arrow files."""
    files = [part_path(folder, split, unit.number) for unit in units]
    column, kind = stored_column(codec)
    shape = (codec.shape[0] * (1 if column == "pixels" else 2), *codec.shape[1:])
    if not files:  # a split without samples is a part without rows
        files = [part_path(folder, split, 0)]
        write_part(files[0], make_batch(codec, [], [], [], [], np.zeros((0, *shape), kind.to_pandas_dtype())))
    text = {"dtype": "string", "_type": "Value"}
    values = {"dtype": "uint8" if column == "pixels" else "float16", "_type": "Value"}
    features = {
        "key": text,
        "caption": text,
        "tokens": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
        "hash": text,
        column: {"feature": values, "length": math.prod(shape), "_type": "List"},
    }
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
