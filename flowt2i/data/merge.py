"""`flowt2i prepare A B … --merge --out DATA`: one dataset from folders that workers wrote on machines without a common disk.

By manifest: what each folder's plan and options say must agree, every unit must be there once, and what is copied must have the
sha256 that its record states.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowt2i.data.finish import clear, load_report
from flowt2i.data.locks import locked, turn
from flowt2i.data.options import PrepareOptions
from flowt2i.data.plan import Plan, finished
from flowt2i.data.prepare import complete
from flowt2i.data.settle import Settling
from flowt2i.data.share import Share
from flowt2i.data.units import SPLITS, Unit, UnitId, copy_file, load_unit, load_units, part_path, save_unit, write_json, write_text
from flowt2i.errors import UserError


@dataclass
class _Part:
    """What one worker wrote."""

    folder: Path
    options: dict[str, Any]
    plan: Plan
    units: dict[UnitId, Unit]


def merge(folders: list[Path], out: Path, progress: bool = True) -> dict[str, Any]:
    """Copy all units to `out`, complete the dataset there and return its report; done again, it goes on.

    UserError: a folder that no worker wrote or that is complete, folders that disagree, a unit missing, in two folders, or damaged.
    """
    parts = [_read(folder) for folder in folders]
    if not parts:
        raise UserError("nothing to merge: name the folders that the workers wrote")
    first = parts[0]
    for other in parts[1:]:
        _check_same(first, other)
    home = _homes(parts)
    options = PrepareOptions.model_validate(first.options | {"out": out})
    missing = Settling(options, len(first.plan.groups))
    missing.advance(lambda group, piece: home[group, piece].units[group, piece] if (group, piece) in home else None)
    if missing.next is not None:
        raise UserError(f"{_name(first.plan, missing.next)} is in none of the folders: run the worker that lacks it again, then merge")
    if finished(out, options):
        return load_report(out)
    with locked(out, Share()):
        with turn(out):
            if not (out / "plan.json").exists():
                _begin(first, out)
            elif not (out / "dataset.json").exists():
                _check_goes_on(out, first)
            for (group, piece), part in home.items():
                if load_unit(out, group, piece) is None:
                    _copy_unit(part, part.units[group, piece], out)
        report = complete(out, options, first.plan)
    assert report is not None
    if progress:
        print(f"{len(home)} units of {len(parts)} folders merged: {report['kept']} of {report['read']} samples kept in {out}", file=sys.stderr)
    return report


def _read(folder: Path) -> _Part:
    from flowt2i.text import load_tokenizer

    if (folder / "dataset.json").exists():
        raise UserError(f"{folder} is a complete dataset: merge takes what `prepare --worker I/N` wrote, before anything completed it")
    if not (folder / "plan.json").exists() or not (folder / "options.json").exists():
        raise UserError(f"{folder} is not a folder that `prepare --worker I/N` wrote: there is no plan.json and options.json")
    plan = Plan.load(folder)
    try:
        options = json.loads((folder / "options.json").read_text())
        PrepareOptions.model_validate({**options, "out": folder})
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{folder / 'options.json'} is broken: prepare {folder} again") from error
    load_tokenizer(plan.text, folder)  # is it the one of the plan?
    return _Part(folder, options, plan, load_units(folder))


def _check_same(one: _Part, other: _Part) -> None:
    """The source may lie elsewhere on each machine; its shards have the same names and sizes."""
    both = f"{one.folder} and {other.folder}"
    for name, value in one.options.items():
        if name not in ("sources", "codec", "text") and other.options.get(name) != value:
            raise UserError(f"{both} were prepared with different {name}: {value!r} and {other.options.get(name)!r}")
    for name in Plan.model_fields:
        mine, theirs = getattr(one.plan, name), getattr(other.plan, name)
        if name in ("codec", "text"):  # a net may lie in another folder, but must be the same net
            mine, theirs = (spec.model_copy(update={"id": ""}) for spec in (mine, theirs))
        if mine != theirs:
            raise UserError(f"{both} were prepared with different {'sources' if name == 'shards' else name}: they cannot be one dataset")


def _check_goes_on(out: Path, first: _Part) -> None:
    """What a merge that broke off began must be what is to be merged now."""
    try:
        _check_same(_read(out), first)
    except UserError as error:
        raise UserError(f"{out} holds another merge that broke off ({error}): name another --out, or delete {out}") from error


def _homes(parts: list[_Part]) -> dict[UnitId, _Part]:
    """In which folder each unit is."""
    home: dict[UnitId, _Part] = {}
    for part in parts:
        for unit in part.units:
            if unit in home:
                raise UserError(f"{_name(part.plan, unit)} is in both {home[unit].folder} and {part.folder}: leave one of them out")
            home[unit] = part
    return dict(sorted(home.items()))


def _name(plan: Plan, unit: UnitId) -> str:
    group, piece = unit
    first = plan.shards[sum(plan.groups[:group])] if group < len(plan.groups) else "?"
    return f"unit {group:05d}-{piece:05d} (from {first.rsplit(':', 1)[0]}, sample {piece * plan.unit_rows} on)"


def _begin(part: _Part, out: Path) -> None:
    clear(out)
    write_json(out / "options.json", part.options)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for file in sorted((part.folder / "tokenizer").iterdir()):
        if file.is_file() and not file.is_symlink():
            copy_file(file, out / "tokenizer" / file.name)
    write_text(out / "plan.json", part.plan.model_dump_json(indent=2) + "\n")


def _copy_unit(part: _Part, unit: Unit, out: Path) -> None:
    for split, digest in unit.files.items():
        if split not in SPLITS:
            raise UserError(f"unit {unit.id} in {part.folder} names a file {split[:40]!r}: prepare {part.folder} again")
        path, target = part_path(part.folder, split, *unit.id), part_path(out, split, *unit.id)
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path} is missing or no regular file: copy {part.folder} again")
        if copy_file(path, target) != digest:
            target.unlink()
            raise UserError(f"{path} is damaged (another sha256 than its record says): copy {part.folder} again")
    save_unit(out, unit)
