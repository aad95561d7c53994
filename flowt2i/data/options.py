"""What can be asked of `prepare`, each field with the line that `--help` shows."""

import glob
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowt2i.data.share import Share, parse_share
from flowt2i.data.sources import DEFAULT_SOURCE
from flowt2i.errors import UserError, nearest


class PrepareOptions(BaseModel):
    """Options of `prepare`. `PrepareOptions.of(**fields)` raises UserError where pydantic would raise ValidationError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[str] = Field(
        default_factory=lambda: [DEFAULT_SOURCE],
        description="tars (file, glob, {0..9} or folder), a folder of images, parquet or arrow files, a Hugging Face dataset id, `scenes`",
    )
    out: Path = Field(description="folder to write the dataset to")
    codec: str = Field("pixels", description="`pixels`, `sd-vae-ft-mse`, or the id or folder of an AutoencoderKL")
    text: str = Field("builtin", description="`builtin` (learned from the captions), `t5-small`, or the id or folder of a text encoder")
    like: str = Field(
        "", description="a model, or prepared data: take over its codec, text encoder, tokenizer and picture size, to train it on (`train --init`)"
    )
    image_size: int = Field(64, ge=8, le=2048, description="side of the square images in pixels")
    buckets: str = Field(
        "",
        description="shapes of about the square's area, each image in the nearest: `auto`, or a list such as 64x64,80x48,48x80 (width x height)",
    )
    bucket_step: int = Field(0, ge=0, le=512, description="sides of `--buckets auto` are multiples of this (0: of what codec and patch make)")
    limit: int | None = Field(None, ge=1, description="stop when this many samples are kept")
    heldout: float = Field(0.02, ge=0, le=0.5, description="share of samples held out of training, chosen by a hash of their keys")
    seed: int = Field(0, ge=0, description="seed of the built-in scenes")
    count: int = Field(40_000, ge=1, description="number of built-in scenes")
    min_side: int = Field(32, ge=1, description="drop images whose shorter side has fewer pixels")
    max_aspect: float = Field(3.0, ge=1, description="drop images whose longer side is more than this many times the shorter")
    min_caption: int = Field(1, ge=1, description="drop captions of fewer characters")
    max_caption: int = Field(2000, ge=1, description="drop captions of more characters")
    drop_duplicates: bool = Field(True, description="drop samples whose image and caption were there before")
    max_tokens: int = Field(128, ge=2, le=4096, description="cut captions to this many tokens")
    vocab_size: int = Field(4096, ge=258, le=65536, description="most tokens of the built-in tokenizer's vocabulary")
    image_column: str = Field("", description="image column of a table (default: found by name)")
    text_column: str = Field("", description="text column of a table (default: found by name)")
    hub_split: str = Field("train", description="split of a Hugging Face dataset to read")
    hub_files: str = Field("", description="files of a Hugging Face dataset to read, as a glob such as data_512_2M/*.tar (default: all)")
    batch_size: int = Field(64, ge=1, le=4096, description="images encoded by the VAE at a time")
    unit_rows: int = Field(0, ge=0, description="samples between two points at which a rerun can continue (0: by the size of the data)")
    workers: int = Field(0, ge=0, le=1024, description="processes that decode images (0: one for each core)")
    worker: str = Field("", description="I/N, with I from 0: do every N-th part of the work only, beside other workers (default: torchrun's rank)")
    follow_links: bool = Field(False, description="read images and captions of a folder through links that lead out of it")
    device: str = Field("auto", description="where the VAE runs: auto, cpu, cuda, cuda:1, …")

    @classmethod
    def of(cls, **fields: object) -> "PrepareOptions":
        """Checked options; UserError naming the first wrong field. With `like`, completed by what it says."""
        if fields.get("like"):
            from flowt2i.data.like import liken

            fields = liken(dict(fields))
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "options"
            if first["type"] == "extra_forbidden":
                raise UserError(f"prepare has no option {name!r}{nearest(name, cls.model_fields)}") from error
            raise UserError(f"{name}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error

    def share(self) -> Share:
        """Which part of the work is this process's."""
        return parse_share(self.worker)

    def processes(self) -> int:
        """Number of worker processes; the ranks of one machine share its cores."""
        if self.workers:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // (1 if self.worker else int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def lasting(self) -> dict[str, object]:
        """The fields that decide what is written, paths in one spelling: a rerun must have the same."""
        fields = self.model_dump(mode="json", exclude={"out", "workers", "worker", "device", "batch_size"})
        return one_spelling(fields)

    @classmethod
    def differing(cls, before: dict[str, Any], now: dict[str, Any]) -> str:
        """Name of the first of the lasting fields in which two preparations differ; '' where none does. One that was not known then had its default."""
        before = one_spelling(before)
        for name, value in now.items():
            default = cls.model_fields[name].get_default(call_default_factory=True)
            if before.get(name, default) != value:
                return name
        return ""


def one_spelling(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with what is a path on this machine made absolute: `a`, `./a/` and `/home/me/a` are one source."""
    fields = dict(fields)
    if isinstance(fields.get("sources"), list):
        fields["sources"] = [_absolute(source) for source in fields["sources"]]
    for name in ("codec", "text", "like"):
        if isinstance(fields.get(name), str) and Path(fields[name]).expanduser().is_dir():
            fields[name] = _absolute(fields[name])
    return fields


def _absolute(name: Any) -> Any:
    if not isinstance(name, str) or name == "scenes":
        return name
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return os.path.realpath(path)
    return os.path.abspath(path) if "{" in name or glob.has_magic(name) else name
