"""Our models on the Hugging Face hub: fetched as safetensors, JSON and text only, sent as a whole folder."""

import contextlib
from pathlib import Path

from flowt2i import box
from flowt2i.errors import UserError
from flowt2i.exported import ENCODER, MARK, SCORES, VAE, format_of
from flowt2i.pretrained import hub_told, looks_like_path, quiet
from flowt2i.training import checkpoint

# A README is not fetched: nothing reads it. A pickle never is.
PATTERNS = ["*.safetensors", "*.json", "*.txt"]
# All that an export of any format may hold: what an earlier one left goes with the next push, and nothing else.
WRITTEN = [
    *("README.md", MARK, SCORES, checkpoint.MANIFEST, "samples.png", "config.json", "dataset.json", "model.safetensors", "model_index.json", "sampling.json"),
    *("pipeline.py", "sample.py", "velocity.onnx*", "text_encoder.onnx*"),
    *(f"{part}/*" for part in ("tokenizer", "transformer", "scheduler", VAE, ENCODER)),
]


def local(model: str | Path) -> Path:
    """Folder of a model named by a path, by the name of a packaged model (`flowt2i models`) or by a hub id.

    A name that exists here, or looks like a path, is never looked for elsewhere. What the hub's cache holds whole is used where the hub cannot be
    reached. UserError in one line where the model cannot be had.
    """
    id = str(model)
    if packaged := box.find(id):
        return packaged
    if looks_like_path(id) or id.count("/") != 1:
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    ways = f"give a run folder, a checkpoint or an exported model, or download {id} on another machine and pass its folder"
    with hub_told(f"model {id!r}", ways), quiet():
        # the mark of an export first: nobody waits for gigabytes of another program's model only to hear that it is not one of ours
        folder = Path(snapshot_download(id, allow_patterns=[MARK], etag_timeout=5))
        if not (folder / MARK).exists():
            raise UserError(f"model {id!r} on the hub was not written by `flowt2i export` (it has no {MARK}): give another id")
        if format_of(folder) == "flowt2i":
            with contextlib.suppress(LocalEntryNotFoundError):
                folder = Path(snapshot_download(id, allow_patterns=PATTERNS, etag_timeout=5))
            if not checkpoint.is_whole(folder):  # a download was broken off, and the hub cannot be reached now; or it was pushed like that
                raise UserError(f"model {id!r} was not fetched whole: run this again where the hub can be reached, or give a folder of your own")
    return folder


def check_id(id: str) -> None:
    """UserError where a model cannot be called so on the hub: "owner/name", never a name alone."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(id if id.count("/") == 1 else "")
    except HFValidationError as error:
        raise UserError(f"--push {id!r} is no name of the hub's: give 'owner/name' of letters, digits, '-', '_' and '.'") from error


def check_login(id: str) -> None:
    """Before the work: can this machine send to the hub? UserError where it is offline or nobody is logged in."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(f"--push {id}: nobody is logged in to the hub here: run `hf auth login` (or set HF_TOKEN), or leave out --push")
    with hub_told(f"--push {id}", "leave out --push and send the folder later with `hf upload`", sending=True), quiet():
        HfApi().whoami()


def push(folder: Path, id: str, private: bool = False) -> str:
    """Make the repository `id` where there is none and send the folder to it, in place of an earlier export and beside other files.

    Returns its address. UserError in one line where that fails, or where `private` is asked of a repository that is public.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="flowt2i")
    with hub_told(f"--push {id}", f"the export is complete: send it later with `hf upload {id} {folder}`", sending=True), quiet():
        address = api.create_repo(id, exist_ok=True, private=private or None)
        if private and not api.repo_info(address.repo_id).private:
            raise UserError(f"--push {id} --private: this repository is public, and nothing was sent: make it private on the hub, or give another name")
        old = WRITTEN if api.file_exists(address.repo_id, MARK) else None
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="flowt2i export", delete_patterns=old)
    return str(address)
