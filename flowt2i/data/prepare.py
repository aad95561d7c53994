"""`flowt2i prepare`: captioned images from any source to one folder that training memory-maps.

Samples flow through in a fixed order: read (headers only), decoded in worker processes, filtered, encoded and tokenized here,
written unit by unit. A killed run continues at the first unit without a record and writes the same bytes.
"""

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowt2i.data.decode import decode_in_order
from flowt2i.data.finish import finish
from flowt2i.data.options import PrepareOptions
from flowt2i.data.plan import finished, locked, make_plan, open_codec, project, rules_of
from flowt2i.data.sample import RawSample, Shard
from flowt2i.data.sources import open_sources
from flowt2i.data.units import Unit
from flowt2i.data.writer import UnitWriter

RUN = 32  # samples handed to a worker at a time


def prepare(options: PrepareOptions, progress: bool = True) -> dict[str, Any]:
    """Write the dataset `options` describe and return its report; where it is there already, only return the report.

    `progress` prints the projection and a progress bar to stderr. UserError: unreadable source, other options in the same
    folder, no space, nothing kept, constant or NaN latents.
    """
    folder = options.out
    say: Callable[[str], None] = (lambda line: print(line, file=sys.stderr, flush=True)) if progress else (lambda line: None)
    if finished(folder, options):
        say(f"{folder} is already prepared: nothing to do")
        return json.loads((folder / "report.json").read_text())
    started = time.perf_counter()
    shards = open_sources(
        options.sources,
        count=min(options.count, options.limit or options.count),
        seed=options.seed,
        heldout=options.heldout,
        split=options.hub_split,
        files=options.hub_files,
        image_column=options.image_column,
        text_column=options.text_column,
    )
    codec = open_codec(options)
    with locked(folder):
        units, plan, tokenizer = make_plan(folder, options, shards, codec)
        project(folder, options, shards, codec, units, plan, say)
        _write_units(folder, options, shards, codec, tokenizer, units, plan, progress)
        report = finish(folder, options, codec.spec, tokenizer.spec, options.processes())
    say(f"{report['kept']} of {report['read']} samples kept in {folder}, {time.perf_counter() - started:.1f} s")
    return report


@dataclass(slots=True)
class _Run:
    samples: list[RawSample]
    next: tuple[int, int] | None  # where the sample after this run lies; None: there is none
    closes: bool  # the unit ends here


def _runs(shards: list[Shard], start: tuple[int, int], unit_rows: int) -> Iterator[_Run]:
    """All samples from `start` on, in runs that do not cross a unit."""
    held: _Run | None = None  # one run is held back, so that the last is known to be the last
    samples: list[RawSample] = []
    room = unit_rows
    for number, shard in enumerate(shards[start[0] :], start[0]):
        first = start[1] if number == start[0] else 0
        for index, sample in enumerate(shard.samples(first), first + 1):
            samples.append(sample)
            room -= 1
            if len(samples) == RUN or not room:
                if held:
                    yield held
                held = _Run(samples, (number, index), not room)
                samples, room = [], room or unit_rows
        shard.forget()
    if samples:
        if held:
            yield held
        held = _Run(samples, None, True)
    if held:
        held.next, held.closes = None, True
        yield held


def _write_units(
    folder: Path,
    options: PrepareOptions,
    shards: list[Shard],
    codec: Any,
    tokenizer: Any,
    units: list[Unit],
    plan: dict[str, Any],
    progress: bool,
) -> None:
    start = units[-1].next if units else (0, 0)
    if start is None:
        return
    kept = sum(sum(unit.rows.values()) for unit in units)
    done = sum(unit.read for unit in units)
    seen = {bytes.fromhex(unit.seen[i : i + 32]) for unit in units for i in range(0, len(unit.seen), 32)}
    waiting: deque[_Run] = deque()

    def feed() -> Iterator[list[RawSample]]:
        for run in _runs(shards, start, plan["unit_rows"]):
            waiting.append(run)
            yield run.samples

    small = plan["estimate"] is not None and plan["estimate"] - done <= 4 * RUN  # not worth starting processes
    results = decode_in_order(feed(), rules_of(options), 1 if small else options.processes())
    bar = tqdm(total=plan["estimate"], initial=done, unit="img", disable=not progress, file=sys.stderr, smoothing=0.1, dynamic_ncols=True)
    with contextlib.closing(results), bar:
        writer = UnitWriter(folder, options, codec, tokenizer, len(units))
        clock = time.perf_counter()
        for decoded in results:
            writer.stages["decode"] += time.perf_counter() - clock
            run = waiting.popleft()
            room = options.limit - kept - len(writer.keys) if options.limit else None
            bar.update(writer.add(decoded, seen, room))
            full = options.limit is not None and kept + len(writer.keys) >= options.limit
            if run.closes or full:
                kept += writer.close(None if full else run.next)
                writer = UnitWriter(folder, options, codec, tokenizer, writer.number + 1)
            if full:
                break
            clock = time.perf_counter()
