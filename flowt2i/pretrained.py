"""Finding pretrained nets in folders, in the local cache, or on the Hugging Face hub: tensors only, nothing unpickled; one clear line where there are none."""

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowt2i.errors import UserError, nearest

ALIASES = {"sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse"}
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"]
# What from_pretrained raises on broken or foreign files (OSError: absent, ValueError/KeyError: unknown architecture,
# RuntimeError: shapes, ImportError: a tokenizer's optional package, AttributeError/TypeError: nonsense in config.json).
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the multi-line chatter and weight-loading bars of the Hugging Face libraries; errors still raise."""
    from transformers.utils import logging as hf_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers", "huggingface_hub")]
    levels, bar = [logger.level for logger in loggers], hf_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if bar:
            hf_logging.enable_progress_bar()


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of a folder: `stem.safetensors`, or every shard that its index names; [] where any is missing."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):  # "../x", or a pickle
            raise ValueError("names that are not those of safetensors in this folder")
        files = [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read as an index of weights: fetch it again") from error
    return files if all(file.is_file() for file in files) else []


def find_pretrained(id: str, *, stem: str, what: str, instead: str, tokenizer: bool = False, also: str = "") -> Path:
    """Folder that holds `config.json` and safetensors `stem` of a pretrained net.

    `id` is a folder or a hub id; what the hub cache already holds is used without asking the network.
    `what` names the thing in messages, `instead` the choice that needs no download.
    `tokenizer`: a hub copy must also have tokenizer files; `also`: and this file. UserError, one line, where it cannot be had.
    """
    path = Path(id).expanduser()
    if not id:
        raise UserError(f"{what}: empty name; pass a folder, a hub id or {instead!r}")
    if not path.is_dir():
        if looks_like_path(id):
            lack = "not a folder" if path.exists() else "no such folder"
            raise UserError(f"{what}: {lack}: {id}; pass the folder that holds config.json and {stem}.safetensors")
        return _from_hub(id, stem=stem, what=what, instead=instead, tokenizer=tokenizer, also=also)
    folder = path.resolve()
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file() and stem.startswith("diffusion"):
        folder = folder / "vae"  # a whole diffusers pipeline was given
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} {id!r} has no config.json: pass a folder saved with save_pretrained")
    if not weight_files(folder, stem):
        raise UserError(_no_weights(what, id, stem, {file.name for file in folder.iterdir()}))
    return folder


def full_id(id: str) -> str:
    """What to write down: the absolute path of a folder, so that it is found from elsewhere too; a hub id as it is."""
    path = Path(id).expanduser()
    return str(path.resolve()) if path.is_dir() else id


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a pretrained net."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object: fetch it again")
    return config


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, short enough for a one-line message."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:157] + "..."


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or a .pth file; of the latter tensors only, nothing else is unpickled."""
    if not path.is_file():
        raise UserError(f"no file of weights at {path}")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip raise nearly anything on broken or foreign files
        raise UserError(f"{path} cannot be read as weights (tensors only, nothing is unpickled): {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds something else than named tensors")
    return found


def looks_like_path(id: str) -> bool:
    """Is this meant as a place on this machine, rather than as a hub id?"""
    path = Path(id).expanduser()
    inside = path.parent != Path() and path.parent.is_dir()  # data/vae, where data/ exists
    return id.startswith((".", "/", "~")) or "\\" in id or id.count("/") > 1 or inside or path.exists()


def _no_weights(what: str, id: str, stem: str, names: set[str]) -> str:
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if not pickled:
        return f"{what} {id!r} has no (or not all) weights as {stem}.safetensors: fetch them again, or check that it is the right folder"
    return f"{what} {id!r} has only pickled weights ({pickled[0]}), which are never opened: convert them to safetensors with save_pretrained"


def _from_hub(id: str, *, stem: str, what: str, instead: str, tokenizer: bool, also: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    weights = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors"]
    patterns = ["config.json", "preprocessor_config.json", *weights, *(TOKENIZER_FILES if tokenizer else [])]
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        folder = Path(snapshot_download(id, allow_patterns=patterns, local_files_only=True))
        has_tokenizer = any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))
        complete = (folder / "config.json").is_file() and weight_files(folder, stem) and (folder / also).exists()
        if complete and (has_tokenizer or not tokenizer):
            return folder
    guess = nearest(id, [instead, *ALIASES]) if "/" not in id else ""
    guess = guess if "did you mean" in guess else ""
    files = f"config.json, *.safetensors{', tokenizer files' if tokenizer else ''}{f', {also}' if also else ''}"
    ways = f"download {id} ({files}) on another machine and pass the folder, or use {instead!r}, which needs no download"
    with hub_told(f"{what} {id!r}", ways, guess), quiet():
        names = {file.rfilename for file in HfApi().model_info(id, timeout=5).siblings or []}
        if "config.json" not in names or not names & set(weights[:2]):
            raise UserError(_no_weights(what, id, stem, names))
        return Path(snapshot_download(id, allow_patterns=patterns))


@contextlib.contextmanager
def hub_told(thing: str, ways: str, guess: str = "", sending: bool = False) -> Iterator[None]:
    """Turn what goes wrong between us and the hub into one line about `thing`: `ways` says what else can be done.

    sending: something goes to the hub, rather than being sought there.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    unreachable: tuple[type[Exception], ...] = (LocalEntryNotFoundError, OfflineModeIsEnabled, *_network_errors())
    absent = "" if sending else f" is not on this machine{guess} and"
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{thing} is neither a folder here nor a possible hub id: pass a folder or 'owner/name'") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if sending:
            way = "log in with `hf auth login` as one who may write there" if status in (401, 403) else ways
            raise UserError(f"{thing}: the hub refused it ({status}: {first_line(error)}): {way}") from error
        if status in (401, 403, 404):
            login = "check the name, or log in with `hf auth login` if it is private or gated"
            raise UserError(f"{thing}: the hub has no such model, or not for you ({status}){guess}: {login}") from error
        raise UserError(f"{thing}{absent} the hub answers with error {status}: {ways}") from error
    except unreachable as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(f"{thing}{absent or ':'} {why}: {ways}") from error
    except OSError as error:  # disk full, no right to write the cache
        raise UserError(f"{thing} could not be {'sent' if sending else 'downloaded'} ({first_line(error)}): {ways}") from error


def _network_errors() -> list[type[Exception]]:
    # huggingface_hub lets the errors of its HTTP library through; which library that is depends on its version.
    found: list[type[Exception]] = []
    for name in ("httpx2", "httpx"):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(name).HTTPError)
    return found
