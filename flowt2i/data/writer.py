"""One unit of a dataset while it is filled: drop what it holds twice, encode, tokenize, split, write."""

import hashlib
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowt2i.data.decode import Decoded
from flowt2i.data.encode import Encoder
from flowt2i.data.locks import turn
from flowt2i.data.options import PrepareOptions
from flowt2i.data.settle import is_heldout
from flowt2i.data.units import (
    SPLITS,
    Drop,
    Shapes,
    Unit,
    UnitId,
    load_unit,
    make_batch,
    measure_rows,
    part_path,
    save_unit,
    sha256_of,
    write_part,
)
from flowt2i.shapes import Shape


class UnitWriter:
    """One unit while it is filled. What it writes depends on the unit's samples alone."""

    def __init__(self, folder: Path, options: PrepareOptions, encoder: Encoder, tokenizer: Any, unit: UnitId, buckets: bool = False) -> None:
        self.folder, self.options, self.encoder, self.tokenizer, self.unit, self.buckets = folder, options, encoder, tokenizer, unit, buckets
        self.read = 0
        self.shards: list[tuple[str, int]] = []
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.digests: list[bytes] = []
        self.seen: set[bytes] = set()
        self.dropped: list[Drop] = []
        self.shapes = Shapes([], [])
        self.waiting: dict[Shape, list[tuple[int, np.ndarray]]] = {}  # number and pixels [3, H, W] of what is to be encoded, by its size
        self.stored: dict[int, np.ndarray] = {}  # by number, each [...]
        self.stages = {"decode": 0.0, "encode": 0.0, "tokenize": 0.0, "write": 0.0}
        self.started = time.perf_counter()

    def add(self, decoded: Decoded) -> None:
        """Take in a run."""
        row = 0
        for key, source, caption, (reason, detail) in zip(decoded.keys, decoded.sources, decoded.captions, decoded.problems):
            place = self._count(source)
            if caption is not None:
                digest = decoded.digests[row]
                row += 1
                if not (self.options.drop_duplicates and digest in self.seen):
                    self.seen.add(digest)
                    self.digests.append(digest)
                    self.keys.append(key)
                    self.captions.append(caption)
                    self._wait(decoded.pixels[row - 1], decoded.sizes[row - 1])
                    continue
                reason = "duplicate"
            self.dropped.append(Drop(at=place, source=source, key=key, reason=reason, detail=detail))

    def _wait(self, pixels: np.ndarray, original: Shape) -> None:
        size = pixels.shape[2], pixels.shape[1]
        self.shapes.sizes.append(size)
        self.shapes.originals.append(original)
        waiting = self.waiting.setdefault(size, [])
        waiting.append((len(self.keys) - 1, pixels))
        if len(waiting) == self.options.batch_size:
            self._encode(size)

    def _count(self, source: str) -> int:
        if self.shards and self.shards[-1][0] == source:
            self.shards[-1] = (source, self.shards[-1][1] + 1)
        else:
            self.shards.append((source, 1))
        self.read += 1
        return self.read - 1

    def _encode(self, size: Shape) -> None:
        start = time.perf_counter()
        numbers, pixels = zip(*self.waiting.pop(size))
        self.stored.update(zip(numbers, self.encoder(np.stack(pixels))))
        self.stages["encode"] += time.perf_counter() - start

    def close(self, last: bool) -> Unit:
        """Write the unit; `last` says that its group ends here."""
        for size in sorted(self.waiting):
            self._encode(size)
        start = time.perf_counter()
        cut_before = self.tokenizer.truncated
        with warnings.catch_warnings():  # the number of captions cut is in the report
            warnings.simplefilter("ignore")
            tokens = self.tokenizer(self.captions) if self.captions else []
        self.stages["tokenize"] += time.perf_counter() - start
        start = time.perf_counter()
        codec = self.encoder.codec
        stored = [np.ascontiguousarray(self.stored.pop(number)) for number in range(len(self.keys))]  # a VAE may give channels last
        hashes = [hashlib.sha256(row.data).hexdigest()[:32] for row in stored]
        out = np.array([is_heldout(key, self.options.heldout) for key in self.keys], bool)
        trained = [row for row, left_out in zip(stored, out) if not left_out]
        moments = measure_rows(codec.spec, trained)  # before anything is written: NaN is refused here
        batches = {}
        for split, chosen in zip(SPLITS, (np.flatnonzero(~out), np.flatnonzero(out))):
            if len(chosen):
                pick = lambda values, chosen=chosen: [values[i] for i in chosen]
                shapes = Shapes(pick(self.shapes.sizes), pick(self.shapes.originals)) if self.buckets else None
                rows = pick(stored) if self.buckets else np.stack(pick(stored))
                batches[split] = make_batch(codec.spec, pick(self.keys), pick(self.captions), pick(tokens), pick(hashes), rows, shapes)
        self.stages["write"] += time.perf_counter() - start
        group, piece = self.unit
        unit = Unit(
            group=group,
            piece=piece,
            last=last,
            shards=self.shards,
            keys=self.keys,
            digests=b"".join(self.digests).hex(),
            dropped=self.dropped,
            truncated=self.tokenizer.truncated - cut_before,
            moments=moments,
            files={},
            seconds=time.perf_counter() - self.started,
            stages=self.stages,
        )
        return self._commit(unit, batches)

    def _commit(self, unit: Unit, batches: dict[str, pa.RecordBatch]) -> Unit:
        """Parts, then the record; another worker may have been faster, and have completed the dataset since."""
        with turn(self.folder):
            if there := load_unit(self.folder, *unit.id):
                return there
            if (self.folder / "dataset.json").exists():  # completed without this unit: it lies beyond the limit
                return unit
            for split, batch in batches.items():
                path = part_path(self.folder, split, *unit.id)
                write_part(path, batch)
                unit.files[split] = sha256_of(path)
            save_unit(self.folder, unit)
        return unit
