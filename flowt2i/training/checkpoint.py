"""Checkpoints: complete or absent, safetensors and JSON only, self-contained.

    RUN/checkpoints/step_00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors
        state.json         step, images seen, EMA updates, steps to go, precision
        config.json  dataset.json  tokenizer/      all that sampling needs beside the weights
        manifest.json      size and sha256 of every file above: written last

A save writes into `.step_….tmp`, syncs, and renames; old ones go only after the new one is proved. One of the same step (damaged,
or it would not be written again) is first renamed to `.step_….old`; whatever moment a kill chose, `recover` and `newest_good` find it.
Tensors are whole, however training held them (see `parallel`): any number of ranks, DDP or FSDP2, loads what any other wrote.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from flowt2i import box, exported
from flowt2i.errors import UserError
from flowt2i.files import save_tensors
from flowt2i.human import size
from flowt2i.training.lora import has_adapters, merged
from flowt2i.training.parallel import share_like

MANIFEST = "manifest.json"
WEIGHTS = ("model.safetensors", "ema.safetensors")  # one of them at least


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def _beside(path: Path, what: str) -> Path:
    """The hidden name of a checkpoint that is being written or goes: `step_*` names complete ones only."""
    return path.with_name(f".{path.name}.{what}")


def list_steps(run: Path, whole: bool = True) -> list[int]:
    """Steps of the checkpoints of a run, ascending. whole: only those with a manifest, which is written last (copying a run may have cut one)."""
    found = []
    for path in (run / "checkpoints").glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdigit() and ((path / MANIFEST).exists() or not whole):
            found.append(int(number))
    return sorted(found)


def save(run: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, str], copies: dict[str, Path]) -> Path:
    """Write a checkpoint. tensors: file stem -> named tensors; texts: file name -> content; copies: name -> folder to copy in.

    UserError where the disk has no room or fails, saying how much is needed; the earlier checkpoints stay as they are.
    """
    target = folder(run, step)
    aside, old = _beside(target, "tmp"), _beside(target, "old")
    needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values()) + (1 << 20)
    try:
        if not target.parent.exists():
            target.parent.mkdir(parents=True)
            _sync_folder(run)
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise UserError(f"no room for a checkpoint in {target.parent}: {size(needed)} needed, {size(free)} free; {_then(target, 'free some')}")
        aside.mkdir()
        for stem, named in tensors.items():
            save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, aside / f"{stem}.safetensors")
        for name, text in texts.items():
            (aside / name).write_text(text)
        for name, source in copies.items():
            if source.exists():
                shutil.copytree(source, aside / name)
        write_manifest(aside)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(aside, target)
        _sync_folder(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a disk that is full
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"could not write the checkpoint {target}: {getattr(error, 'strerror', None) or error} ({size(needed)} needed); {_then(target, 'mend it')}"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    return target


def _then(path: Path, mend: str) -> str:
    """What to do where a checkpoint could not be written."""
    return f"earlier ones are untouched: {mend} and run again with --resume latest" if _has_others(path) else f"{mend} and run again"


def _has_others(path: Path) -> bool:
    """Whether there are checkpoints beside this one."""
    return any(folder(path.parents[1], step) != path for step in list_steps(path.parents[1]))


def prove(path: Path) -> None:
    """UserError where a checkpoint just written does not read back as it was written."""
    problem = damage(path)
    if problem:
        untouched = "; earlier ones are untouched" if _has_others(path) else ""
        raise UserError(f"the checkpoint {path} does not read back ({problem}): look after this disk{untouched}")


def recover(run: Path) -> None:
    """Clear up what a killed save left. Only for the one that holds the run's lock."""
    for old in (run / "checkpoints").glob(".step_*.old"):
        name = old.with_name(old.stem.removeprefix("."))
        if name.exists():  # its replacement stands
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, name)
    for aside in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(aside, ignore_errors=True)


def write_manifest(path: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Sync everything under a folder and record size and sha256 of its files, the manifest itself last. leave_out: names that may change later."""
    entries = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name not in (MANIFEST, *leave_out)):
        entries[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    with (path / MANIFEST).open("w") as handle:
        json.dump(entries, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    for inner in sorted(p for p in path.rglob("*") if p.is_dir()):
        _sync_folder(inner)
    _sync_folder(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint or an exported model, or None: every file of the manifest is there, with its size and sha256."""
    try:
        entries = _read_manifest(path)
        if lacking := next((name for name in entries if not (path / name).exists()), None):
            return f"{lacking} is missing"
        for name, entry in entries.items():
            file = path / name
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def is_whole(path: Path) -> bool:
    """Are all files of the manifest there, whatever they hold? It costs nothing beside `damage`."""
    try:
        return all((path / name).exists() for name in _read_manifest(path))
    except (OSError, ValueError, RecursionError):
        return False


def _read_manifest(path: Path) -> dict[str, Any]:
    """Entries by name; ValueError where they lead out of the folder, or do not vouch for what is loaded from it."""
    entries = json.loads((path / MANIFEST).read_text())
    if not isinstance(entries, dict):
        raise ValueError("it is not a table of files")
    for name in map(PurePosixPath, entries):
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{str(name)!r} is not in this folder")
    loaded = ["config.json", *(name for name in WEIGHTS if (path / name).exists())]
    if lacking := next((name for name in loaded if name not in entries), None):
        raise ValueError(f"it says nothing of {lacking}")
    if not entries.keys() & set(WEIGHTS):
        raise ValueError("it names no weights")
    return entries


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint that is undamaged; warns about each that is passed over. None where there never was one.

    UserError where there are some and none is good: starting again from step 0 must be the user's own decision.
    """
    paths = [folder(run, step) for step in reversed(list_steps(run, whole=False))]
    paths += sorted((run / "checkpoints").glob(".step_*.old"), reverse=True)  # a save was killed while it replaced this one
    for path in paths:
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({problem}): passing over it", stacklevel=2)
    if paths:
        raise UserError(f"all {len(paths)} checkpoints in {run / 'checkpoints'} are damaged: remove them to start again, or choose another --out")
    return None


def set_aside(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints of a run after `step` to `superseded_…`: training goes on from there on another branch. Returns the new names."""
    moved = []
    for later in (s for s in list_steps(run, whole=False) if s > step):
        name = folder(run, later).with_name(f"superseded_{later:08d}")
        shutil.rmtree(name, ignore_errors=True)
        os.replace(folder(run, later), name)
        moved.append(name)
    return moved


def home(found: Path) -> Path:
    """The run of a checkpoint, or the folder of an exported model itself: where what belongs to it is kept."""
    return found.parents[1] if found.parent.name == "checkpoints" else found


def find(path: Path) -> Path:
    """The checkpoint or model folder meant by a path: itself, or the newest good one of a run. UserError otherwise."""
    path = Path(path)
    if not path.exists():
        ways = "give a run folder, a checkpoint, an exported model or the name of a packaged one (see `flowt2i models`)"
        raise UserError(f"no model at {path}{box.nearly(path)}: {ways}")
    if path.is_file():
        raise UserError(f"{path} is a file: give a run folder, a checkpoint or an exported model (pickled .pt files are never loaded)")
    format = exported.format_of(path)
    if format not in ("", "flowt2i"):
        raise UserError(f"{path} was exported for {format}: load it as its README.md says, or export the run once more with --format flowt2i")
    if format or ((path / "config.json").exists() and any((path / name).exists() for name in WEIGHTS)):
        problem = damage(path)
        if problem:
            raise UserError(f"the packaged model {path.name!r} is damaged ({problem}): {box.AGAIN}" if box.holds(path) else f"{path} is damaged: {problem}")
        return path
    newest = newest_good(path)
    if newest is None:
        raise UserError(f"{path} holds no checkpoint yet: train longer, or give another folder{box.hidden_by(path)}")
    return newest


def prune(run: Path, keep_recent: int, keep_every: int) -> None:
    """Remove all but the newest `keep_recent` checkpoints and those at multiples of `keep_every`."""
    for step in list_steps(run)[:-keep_recent]:
        if not keep_every or step % keep_every:
            gone = _beside(folder(run, step), "tmp")  # a kill in the middle must not leave half of one; `recover` clears these
            os.replace(folder(run, step), gone)
            shutil.rmtree(gone, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a safetensors file; UserError where it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def load_into(model: nn.Module, path: Path) -> None:
    """Load the weights of a file, strictly (`load_named`). A model without adapters takes those of the file merged."""
    tensors = load_tensors(path)
    load_named(model, tensors if has_adapters(model) else merged(tensors), path)


def load_named(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Load named tensors, which come from `path`; UserError names the first missing, surplus or misshapen one."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise UserError(f"{path} lacks {name!r}: it belongs to a model of another configuration")
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{path}: {name!r} has shape {tuple(tensors[name].shape)}, this model wants {tuple(tensor.shape)}")
    surplus = sorted(set(tensors) - set(own))
    if surplus:
        raise UserError(f"{path} holds {surplus[0]!r}, which this model does not have: it belongs to a model of another configuration")
    model.load_state_dict({name: share_like(tensor, own[name]) for name, tensor in tensors.items()})


def total_bytes(folder: Path) -> int:
    """Of all files under a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
