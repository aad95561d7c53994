"""One unit of a dataset while it is filled: filter duplicates, encode, tokenize, split, write."""

import hashlib
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from flowt2i.data.decode import Decoded
from flowt2i.data.options import PrepareOptions
from flowt2i.data.sources import HELDOUT_PREFIX
from flowt2i.data.units import SPLITS, Unit, make_batch, measure, part_path, save_unit, write_part


class UnitWriter:
    """One unit while it is filled."""

    def __init__(self, folder: Path, options: PrepareOptions, codec: Any, tokenizer: Any, number: int) -> None:
        self.folder, self.options, self.codec, self.tokenizer, self.number = folder, options, codec, tokenizer, number
        self.read = 0
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.digests: list[bytes] = []
        self.dropped: list[dict[str, str]] = []
        self.pixels: list[np.ndarray] = []  # waiting to be encoded
        self.stored: list[np.ndarray] = []
        self.stages = {"decode": 0.0, "encode": 0.0, "tokenize": 0.0, "write": 0.0}
        self.started = time.perf_counter()

    def add(self, decoded: Decoded, seen: set[bytes], room: int | None) -> int:
        """Take in a run, at most `room` kept samples of it; return how many samples were read."""
        row = used = 0
        for key, source, caption, (reason, detail) in zip(decoded.keys, decoded.sources, decoded.captions, decoded.problems):
            if room is not None and room <= 0:
                break
            used += 1
            if caption is not None:
                digest = decoded.digests[row]
                row += 1
                if not (self.options.drop_duplicates and digest in seen):
                    seen.add(digest)
                    self.digests.append(digest)
                    self.keys.append(key)
                    self.captions.append(caption)
                    self.pixels.append(decoded.pixels[row - 1])
                    room = room - 1 if room is not None else None
                    continue
                reason = "duplicate"
            self.dropped.append({"source": source, "key": key, "reason": reason, "detail": detail})
        self.read += used
        while len(self.pixels) >= self.options.batch_size:
            self._encode(self.options.batch_size)
        return used

    def _encode(self, count: int) -> None:
        import torch

        start = time.perf_counter()
        self.stored.append(self.codec.encode(torch.from_numpy(np.stack(self.pixels[:count]))))
        del self.pixels[:count]
        self.stages["encode"] += time.perf_counter() - start

    def close(self, position: tuple[int, int] | None) -> int:
        """Write the unit; `position` is where the next one starts. Returns how many samples it keeps."""
        if self.pixels:
            self._encode(len(self.pixels))
        start = time.perf_counter()
        cut_before = self.tokenizer.truncated
        with warnings.catch_warnings():  # the number of captions cut is in the report
            warnings.simplefilter("ignore")
            tokens = self.tokenizer(self.captions) if self.captions else []
        self.stages["tokenize"] += time.perf_counter() - start
        start = time.perf_counter()
        shape = self.codec.stored_shape
        stored = np.concatenate(self.stored) if self.stored else np.zeros((0, *shape), self.codec.stored_dtype)
        stored = np.ascontiguousarray(stored)  # a VAE may give channels last
        hashes = [hashlib.sha256(row.data).hexdigest()[:32] for row in stored]
        out = np.array([is_heldout(key, self.options.heldout) for key in self.keys], bool)
        rows = {}
        for split, chosen in zip(SPLITS, (np.flatnonzero(~out), np.flatnonzero(out))):
            rows[split] = len(chosen)
            if len(chosen):
                pick = lambda values, chosen=chosen: [values[i] for i in chosen]
                batch = make_batch(self.codec.spec, pick(self.keys), pick(self.captions), pick(tokens), pick(hashes), stored[chosen])
                write_part(part_path(self.folder, split, self.number), batch)
        moments = measure(self.codec.spec, stored[~out])
        self.stages["write"] += time.perf_counter() - start
        save_unit(
            self.folder,
            Unit(
                number=self.number,
                next=position,
                read=self.read,
                rows=rows,
                dropped=self.dropped,
                truncated=self.tokenizer.truncated - cut_before,
                longest=max(map(len, tokens), default=0),
                seen=b"".join(self.digests).hex(),
                moments=moments,
                seconds=time.perf_counter() - self.started,
                stages=self.stages,
            ),
        )
        return len(self.keys)


def is_heldout(key: str, fraction: float) -> bool:
    """Is a sample held out? Decided by its key alone, so that the same sample is on the same side in any dataset."""
    if key.startswith(HELDOUT_PREFIX):
        return True
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64
