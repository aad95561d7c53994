"""`flowt2i prepare`: captioned images from any source to one folder that training memory-maps.

Samples flow through in a fixed order: read (headers only), decoded in worker processes, encoded and tokenized here, written unit
by unit. A unit depends on nothing but its own samples, so a killed run continues with the units that have no record, several
workers may share the units, and the bytes are the same. When all are there, the dataset is completed from their records.
"""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowt2i.data.decode import decode_in_order
from flowt2i.data.encode import Encoder
from flowt2i.data.finish import finish, load_report, told
from flowt2i.data.locks import locked, turn
from flowt2i.data.options import PrepareOptions
from flowt2i.data.plan import Plan, Say, finished, make_plan, open_codec, project, rules_of
from flowt2i.data.sample import RawSample, Shard
from flowt2i.data.settle import Settling
from flowt2i.data.sources import open_sources
from flowt2i.data.tables import hub_signature
from flowt2i.data.units import Unit, UnitId, load_unit, load_units
from flowt2i.data.walk import RUN, Run, walk
from flowt2i.data.writer import UnitWriter


def prepare(options: PrepareOptions, progress: bool = True) -> dict[str, Any]:
    """Write the dataset `options` describe and return its report; where it is there already, only return the report.

    One worker of several (`options.share()`) does its units; whoever finds all units done completes the dataset, and the others
    return how far they came: `worker`, `units`, `complete` (False). `progress` prints the projection and a progress bar to stderr.
    UserError: unreadable source, other options in the same folder, no space, nothing kept, constant or NaN latents.
    """
    folder, share = options.out, options.share()
    say: Say = (lambda line: print(line, file=sys.stderr, flush=True)) if progress else (lambda line: None)
    if finished(folder, options):
        say(f"{folder} is already prepared: nothing to do")
        return load_report(folder)
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
        follow_links=options.follow_links,
    )
    encoder = Encoder(open_codec(options), options.batch_size)
    with locked(folder, share):
        with turn(folder):
            plan, tokenizer = make_plan(folder, options, shards, encoder.codec)
        done = load_units(folder)
        project(folder, options, shards, encoder, plan, done, say)
        _write_units(folder, options, plan.grouped(shards), plan, encoder, tokenizer, done, progress)
        report = complete(folder, options, plan)
    if report is None:
        units = len(load_units(folder))
        say(f"worker {share} is done; {units} units are there, others are not: whoever finishes last completes {folder}")
        return {"worker": str(share), "units": units, "complete": False}
    say(f"{report['kept']} of {report['read']} samples kept in {folder}, {time.perf_counter() - started:.1f} s")
    for line in told(report):
        say(line)
    return report


def complete(folder: Path, options: PrepareOptions, plan: Plan) -> dict[str, Any] | None:
    """Complete the dataset where all its units are there, and return the report; None where some are missing."""
    with turn(folder):
        if (folder / "dataset.json").exists():  # another worker was faster
            return load_report(folder)
        settling = Settling(options, len(plan.groups))
        settling.advance(lambda group, piece: load_unit(folder, group, piece))
        if settling.next is not None:
            return None
        hub = tuple(source for source in options.sources if hub_signature(source, options.hub_split, options.hub_files) in plan.shards)
        return finish(folder, options, plan.codec, plan.text, settling, hub, plan.buckets)


def _write_units(
    folder: Path,
    options: PrepareOptions,
    groups: list[list[Shard]],
    plan: Plan,
    encoder: Encoder,
    tokenizer: Any,
    done: dict[UnitId, Unit],
    progress: bool,
) -> None:
    share = options.share()
    settling = Settling(options, len(groups))  # tells when the limit is reached
    own: set[str] = set()  # digests that this worker kept: all that is known of the limit where the others' units lie on another disk
    waiting: deque[Run] = deque()

    def find(group: int, piece: int) -> Unit | None:
        unit = done.get((group, piece)) or load_unit(folder, group, piece)
        if unit:
            done[unit.id] = unit
        return unit

    def full() -> bool:
        if options.limit:
            settling.advance(find)
        return settling.full or bool(options.limit and len(own) >= options.limit)

    def feed() -> Iterator[list[RawSample]]:
        for run in walk(groups, plan.unit_rows, share, find):
            waiting.append(run)
            yield run.samples

    if full():
        return
    read = sum(unit.read for unit in done.values())
    left = None if plan.estimate is None else -(-max(0, plan.estimate - read) // share.of)
    small = left is not None and left <= 4 * RUN  # not worth starting processes
    total = None if plan.estimate is None else plan.estimate if share.alone else left
    bar = tqdm(total=total, initial=read if share.alone else 0, unit="img", disable=not progress, file=sys.stderr, smoothing=0.1, dynamic_ncols=True)
    results = decode_in_order(feed(), rules_of(options, plan.buckets), 1 if small else options.processes())
    with contextlib.closing(results), bar:
        writer: UnitWriter | None = None
        clock = time.perf_counter()
        for decoded in results:
            run = waiting.popleft()
            writer = writer or UnitWriter(folder, options, encoder, tokenizer, run.unit, buckets=bool(plan.buckets))
            writer.stages["decode"] += time.perf_counter() - clock
            writer.add(decoded)
            bar.update(len(run.samples))
            if run.closes:
                unit = writer.close(run.last)
                own.update(unit.digests[i : i + 32] for i in range(0, len(unit.digests), 32))
                writer = None
                if full():
                    break
            clock = time.perf_counter()
