"""`prepare --like MODEL`: data that a model can go on with, of its codec and its reading of captions. Or like other prepared data."""

from pathlib import Path
from typing import Any

from flowt2i import exported, hub, shapes
from flowt2i.config import load_config
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.text import CaptionTokenizer, load_tokenizer
from flowt2i.training import checkpoint


def _folder(like: str) -> Path:
    """Of prepared data, a checkpoint, or an exported model. UserError where there is none of them."""
    path = hub.local(like)
    return path if (path / "train").is_dir() and (path / "dataset.json").exists() else checkpoint.find(path)


def liken(fields: dict[str, Any]) -> dict[str, Any]:
    """The options with codec, text encoder, limit of tokens and, where they are not given, picture size and buckets of `like`.

    UserError where one given is another.
    """
    like = str(fields["like"])
    folder = _folder(like)
    description = DatasetDescription.load(folder)
    taken: dict[str, Any] = {
        "codec": exported.taken_along(folder, exported.VAE) or description.codec.id,
        "text": exported.taken_along(folder, exported.ENCODER) or description.text.id,
        "max_tokens": description.text.max_tokens,
    }
    for name, value in taken.items():
        if str(fields.get(name, value)) != str(value):
            raise UserError(f"--{name.replace('_', '-')} {fields[name]} is not that of --like {like} ({value}): leave one of them out")
    if "vocab_size" in fields and description.text.kind == "builtin":
        raise UserError(f"--vocab-size says how to learn a tokenizer, and --like {like} has one: leave one of them out")
    size = description.codec.image_size
    if description.buckets and int(fields.get("image_size", size)) == size and not fields.get("bucket_step"):
        taken["buckets"] = ",".join(map(shapes.name, description.sizes)) if "buckets" not in fields else fields["buckets"]
    return {"image_size": size, **fields, **taken}


def patch_of(like: str) -> int:
    """The patch of a model; 0 of prepared data, which have none."""
    folder = _folder(like)
    if not (folder / "config.json").exists():
        return 0
    codec = DatasetDescription.load(folder).codec
    return load_config(folder / "config.json").model.resolve(codec.kind, codec.shape).patch


def tokenizer_of(like: str) -> CaptionTokenizer:
    """The built-in tokenizer of a model or of prepared data."""
    folder = _folder(like)
    return load_tokenizer(DatasetDescription.load(folder).text, folder)
