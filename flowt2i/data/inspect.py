"""`flowt2i inspect`: what is in a prepared dataset, in numbers and in a contact sheet."""

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from flowt2i.codec import codec_from_spec, stored_to_images
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.data.finish import load_report
from flowt2i.data.units import SPLITS, read_part
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.grid import framed, grid
from flowt2i.shapes import name

COLUMNS, ROWS = 8, 6  # of the contact sheet
BINS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # lower edges of the histograms


def inspect(folder: str | Path, out: str | Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """Statistics of a prepared dataset, printed unless `quiet`, and a contact sheet (`out`, default `folder/contact.png`).

    UserError where the folder is no finished dataset. Where a VAE cannot be loaded the sheet is left out, and `contact` says why.
    """
    folder = Path(folder)
    description = DatasetDescription.load(folder)
    result = measure(folder, description)
    result["contact"] = contact_sheet(folder, Path(out) if out else folder / "contact.png")
    if not quiet:
        print(table(result))
    return result


def measure(folder: Path, description: DatasetDescription) -> dict[str, Any]:
    """Counts, caption lengths, common words, duplicates, sizes and latent statistics."""
    captions: list[str] = []
    tokens: list[int] = []
    hashes: Counter[str] = Counter()
    size = 0
    for path in sorted(path for split in SPLITS for path in (folder / split).glob("part-*.arrow")):
        batch = read_part(path)
        size += path.stat().st_size
        captions += batch.column("caption").to_pylist()
        tokens += np.diff(batch.column("tokens").offsets.to_numpy()).tolist()
        hashes.update(batch.column("hash").to_pylist())
    words = [len(caption.split()) for caption in captions]
    by_length = sorted(set(captions), key=lambda text: (len(text), text))
    common = Counter(word for caption in captions for word in re.findall(r"[^\W\d_]{2,}", caption.lower()))
    return {
        "folder": str(folder),
        "source": description.source,
        "codec": description.codec.id,
        "image_size": description.codec.image_size,
        "shape": list(description.codec.shape),
        "buckets": {name(bucket.size): {"train": bucket.train, "heldout": bucket.heldout} for bucket in description.buckets},
        "text": description.text.id,
        "max_tokens": description.text.max_tokens,
        "train": description.train_count,
        "heldout": description.heldout_count,
        "dropped": load_report(folder)["dropped"] if (folder / "report.json").exists() else {},
        "bytes": size,
        "bytes_per_sample": round(size / len(captions), 1),
        "latent_mean": [round(value, 4) for value in description.latent_mean],
        "latent_std": [round(value, 4) for value in description.latent_std],
        "caption_tokens": _lengths(tokens),
        "caption_words": _lengths(words),
        "longest_caption": by_length[-1],
        "shortest_caption": by_length[0],
        "distinct_captions": len(by_length),
        "common_words": dict(common.most_common(20)),
        "duplicate_images": sum(count - 1 for count in hashes.values()),
    }


def contact_sheet(folder: Path, out: Path) -> str:
    """Draw samples spread evenly over the training split; return the path, or why there is no sheet."""
    dataset = ImageTextDataset(folder)
    spec = dataset.description.codec
    try:
        codec = codec_from_spec(spec)
    except UserError as error:
        return f"no contact sheet: {error}"
    count = min(len(dataset), COLUMNS * ROWS)
    numbers = [i * len(dataset) // count for i in range(count)]
    images = framed([stored_to_images(codec, dataset.fetch([number]).stored)[0] for number in numbers])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scale = max(1, round(128 / spec.image_size))
        grid(images, [dataset.caption(i) for i in numbers], COLUMNS, scale).save(out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}): name another file with --out") from error
    return str(out)


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in result["dropped"].items()) or "none"
    common = ", ".join(f"{word} {count:,}" for word, count in list(result["common_words"].items())[:12])
    size = f"{result['bytes'] / 1e6:.1f} MB, {result['bytes_per_sample']:,.0f} bytes a sample"
    rows = {
        "dataset": f"{result['folder']}  (from {result['source']})",
        "samples": f"{result['train']:,} for training, {result['heldout']:,} held out; dropped: {dropped}",
        "size": f"{size}; images that repeat another: {result['duplicate_images']:,}",
        "codec": f"{result['codec']}, images of {result['image_size']} pixels stored as {' x '.join(map(str, result['shape']))}",
        **({"buckets": ", ".join(f"{shape} {sum(of.values()):,}" for shape, of in result["buckets"].items())} if result["buckets"] else {}),
        "latents": f"mean {_numbers(result['latent_mean'])}, standard deviation {_numbers(result['latent_std'])}",
        "text": f"{result['text']}, at most {result['max_tokens']} tokens; {result['distinct_captions']:,} distinct captions",
        "tokens": _summary(result["caption_tokens"]),
        "words": _summary(result["caption_words"]),
        "common": common,
        "shortest": result["shortest_caption"],
        "longest": result["longest_caption"] if len(result["longest_caption"]) <= 300 else result["longest_caption"][:297] + "...",
        "contact": result["contact"],
    }
    lines = [f"{name:<9} {value}" for name, value in rows.items()]
    return "\n".join([*lines, "", "caption length in tokens", *_bars(result["caption_tokens"]["histogram"])])


def _lengths(values: list[int]) -> dict[str, Any]:
    histogram: Counter[str] = Counter()
    for low, high in zip((0, *BINS), (*BINS, 1 << 60)):
        count = sum(low <= value < high for value in values)
        name = str(low) if high == low + 1 else f"{low}-{high - 1}" if high < 1 << 60 else f"{low}+"
        if count:
            histogram[name] = count
    return {
        "min": min(values),
        "mean": round(statistics.fmean(values), 2),
        "median": statistics.median(values),
        "max": max(values),
        "histogram": dict(histogram),
    }


def _summary(lengths: dict[str, Any]) -> str:
    return f"{lengths['min']} to {lengths['max']} a caption, mean {lengths['mean']}, median {lengths['median']:g}"


def _bars(histogram: dict[str, int]) -> list[str]:
    most = max(histogram.values())
    return [f"{name:>9} {'█' * max(1, round(40 * count / most))} {count:,}" for name, count in histogram.items()]


def _numbers(values: list[float]) -> str:
    shown = ", ".join(f"{value:.3f}" for value in values[:8])
    return f"({shown}{', …' if len(values) > 8 else ''})"
