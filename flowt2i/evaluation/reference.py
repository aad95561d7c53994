"""Features of real pictures, made once and kept with the data: DATA/references/HASH/ with reference.safetensors and reference.json."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from flowt2i.codec import Codec, PixelCodec, codec_from_spec, stored_to_images
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import pictures
from flowt2i.evaluation.nets import RESIZE, FeatureNet, resize
from flowt2i.files import save_tensors
from flowt2i.pipeline import Pipeline
from flowt2i.shapes import Shape
from flowt2i.training.distributed import World

MOST = 50_000  # pictures; of more, these many at even distances
SPLITS = ("heldout", "train")
SQUEEZED = ", squeezed to squares"
DIVIDED = ("fingerprint", "train_count", "heldout_count", "heldout_fraction")  # of a description: which pictures, and which of them are held out


class Identity(BaseModel):
    """All that the features of a reference depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    net: str  # name
    net_fingerprint: str  # weights, size, scaling
    resize: str  # to the net's size
    resolution: int  # side of the pictures before that
    count: int
    source: Literal["heldout", "train", "folder"]
    source_hash: str  # of the split of a dataset, or of the pictures of a folder
    made: str  # how the pictures came to their resolution

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class Reference:
    """Features float32 [count, dim] of real pictures in an order that is fixed and mixed, and what they are of.

    originals(rows): those pictures, uint8 [B, S, S, 3], where they are at hand (not latents, and not a reference given by its folder).
    """

    def __init__(self, identity: Identity, features: Tensor, originals: Callable[[range], np.ndarray] | None = None):
        self.identity, self.features, self.originals = identity, features, originals

    def parted(self, n: int) -> tuple[Tensor, Tensor]:
        """The first `n` pictures, half of all at most, and the rest: [m, dim] and [count - m, dim]. What real pictures score in place of drawn ones."""
        m = min(n, len(self.features) // 2)
        return self.features[:m], self.features[m:]

    def save(self, folder: Path) -> None:
        """Write FOLDER/HASH, whole or not at all."""
        target = folder / self.identity.hash
        aside = folder / f".{self.identity.hash}.{os.getpid()}"
        try:
            aside.mkdir(parents=True)
            save_tensors({"features": self.features.contiguous()}, aside / "reference.safetensors")
            facts = self.identity.model_dump() | {"features_sha256": _sha256(aside / "reference.safetensors")}
            (aside / "reference.json").write_text(json.dumps(facts, indent=2) + "\n")
            if not target.exists():
                aside.rename(target)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a disk that is full
            why = getattr(error, "strerror", None) or error
            warnings.warn(f"the reference could not be kept in {folder} ({why}) and is made anew each time", stacklevel=2)
        finally:  # still there where another evaluation was quicker, or the disk is full
            shutil.rmtree(aside, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """UserError where it is not one, or was changed."""
        try:
            facts = json.loads((folder / "reference.json").read_text())
            written = facts.pop("features_sha256")
            identity = Identity.model_validate(facts)
            features = load_file(folder / "reference.safetensors")["features"]
        except (OSError, ValidationError, ValueError, SafetensorError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder} is not a reference this version reads: delete it, and it is made again") from error
        problem = ""
        if features.ndim != 2 or len(features) != identity.count:
            problem = f"count is {identity.count}, but it holds features {list(features.shape)}"
        elif not torch.isfinite(features).all():
            problem = "it holds numbers that are not finite"
        elif _sha256(folder / "reference.safetensors") != written:
            problem = "its features are not those that were written"
        if problem:
            raise UserError(f"{folder} is broken: {problem}; delete it, and it is made again")
        return cls(identity, features)

    def check(self, where: str, wanted: dict[str, Any]) -> None:
        """Refuse by name what differs from `wanted`, fields of an identity."""
        for name, want in wanted.items():
            have = getattr(self.identity, name)
            if have != want:
                raise UserError(f"reference {where} has another {name}: {have!r}, and {want!r} is needed; give --reference heldout, or make one that fits")

    def check_width(self, where: str, net: FeatureNet) -> None:
        if self.features.shape[1] != net.dim:
            raise UserError(f"{where} is broken: {self.features.shape[1]} numbers a picture, and {net.name} gives {net.dim}; delete it, and it is made again")


def get(where: str, net: FeatureNet, resolution: int, data: Path | None, world: World, progress: bool = True, pipeline: Pipeline | None = None) -> Reference:
    """The reference `heldout` or `train` (of a prepared dataset), of a folder of images, or a finished one by its folder.

    Found in DATA/references (FOLDER/.references without a dataset), or made, over all ranks, and kept there. A pipeline with the VAE of the data lends it.
    """
    if where not in SPLITS and (Path(where) / "reference.json").exists():
        reference = Reference.load(Path(where))
        reference.check(where, {"net": net.name, "net_fingerprint": net.fingerprint, "resize": RESIZE, "resolution": resolution})
        reference.check_width(where, net)
        return reference
    if where in SPLITS:
        if data is None:
            raise UserError(f"the reference {where!r} needs the dataset: give --data DIR, or --reference FOLDER of images")
        return _of_split(where, net, resolution, data, world, progress, pipeline)
    return _of_folder(Path(where), net, resolution, data, world, progress)


def _of_split(split: str, net: FeatureNet, resolution: int, data: Path, world: World, progress: bool, pipeline: Pipeline | None) -> Reference:
    dataset = ImageTextDataset(data, split)
    spec = dataset.description.codec
    if spec.image_size != resolution:
        raise UserError(f"reference {split} of {data} has another resolution: {spec.image_size} pixels, and the pictures that are scored have {resolution}")
    rows = spread(len(dataset))
    identity = Identity(
        net=net.name, net_fingerprint=net.fingerprint, resize=RESIZE, resolution=resolution, count=len(rows), source=split,  # type: ignore[arg-type]
        source_hash=data_hash(dataset),
        made=("as prepared" if spec.kind == "pixels" else f"decoded by VAE {spec.fingerprint[:12]}") + (SQUEEZED if dataset.description.buckets else ""),
    )  # fmt: skip
    if spec.kind == "pixels":
        originals = lambda part: real_images(dataset, PixelCodec(spec.image_size), rows[part.start : part.stop])
        return _kept_or_made(identity, originals, net, data / "references", world, progress, originals)
    if (found := _kept(data / "references", identity)) is not None:
        return found
    same = pipeline is not None and pipeline.description.codec.fingerprint == spec.fingerprint
    decoder = pipeline.codec if same and pipeline else codec_from_spec(spec).to(world.device)
    return _kept_or_made(identity, lambda part: real_images(dataset, decoder, rows[part.start : part.stop]), net, data / "references", world, progress)


def _of_folder(folder: Path, net: FeatureNet, resolution: int, data: Path | None, world: World, progress: bool) -> Reference:
    files = pictures.list_images(folder)
    files = [files[k] for k in spread(len(files))]
    identity = Identity(
        net=net.name, net_fingerprint=net.fingerprint, resize=RESIZE, resolution=resolution, count=len(files), source="folder",
        source_hash=hash_files(files, progress and world.main), made=f"centre crop, bicubic antialiased to {resolution}",
    )  # fmt: skip
    originals = lambda part: pictures.read_squares(files[part.start : part.stop], resolution)
    return _kept_or_made(identity, originals, net, data / "references" if data else folder / ".references", world, progress, originals)


def _kept_or_made(
    identity: Identity, images: Callable[[range], np.ndarray], net: FeatureNet, home: Path, world: World, progress: bool,
    originals: Callable[[range], np.ndarray] | None = None,
) -> Reference:  # fmt: skip
    """images(rows): the pictures of the reference, in its order."""
    found = world.on_main(lambda: _kept(home, identity) is not None)
    if found:
        kept = Reference.load(home / identity.hash)
        kept.check_width(str(home / identity.hash), net)
        return Reference(identity, kept.features, originals)
    work = lambda part: net(images(part)).numpy()
    made = pictures.over_ranks(world, identity.count, work, (net.dim,), np.float32, progress, f"reference of {identity.count:,} pictures")
    reference = Reference(identity, torch.from_numpy(made), originals)
    world.on_main(lambda: reference.save(home))
    return reference


def spread(count: int) -> np.ndarray:
    """Which of `count` pictures a score looks at, in a fixed mixed order (data lies sorted by source): all, or `MOST` at even distances. int64."""
    chosen = np.arange(count) if count <= MOST else np.linspace(0, count - 1, MOST).round().astype(np.int64)
    return np.random.Generator(np.random.Philox(0)).permutation(chosen)


def captioned(captions: Sequence[str]) -> np.ndarray:
    """Rows of a split that are asked for, from its captions: those that say something, in the order of `spread`. int64."""
    return np.array([k for k in spread(len(captions)).tolist() if captions[k].strip()], np.int64)


def data_hash(dataset: ImageTextDataset) -> str:
    """sha256 of what a score of this split depends on: pictures, how they are divided, the captions of the split."""
    digest = hashlib.sha256(json.dumps([dataset.split, *(getattr(dataset.description, name) for name in DIVIDED)]).encode())
    digest.update(json.dumps(dataset.captions()).encode())
    return digest.hexdigest()


def same_data(a: DatasetDescription, b: DatasetDescription) -> bool:
    """Whether two descriptions, of a model and of a dataset, are of the same pictures, divided alike."""
    return all(getattr(a, name) == getattr(b, name) for name in DIVIDED)


def real_images(dataset: ImageTextDataset, codec: Codec, rows: np.ndarray) -> np.ndarray:
    """Pictures `rows` of a prepared dataset as its codec shows them (a VAE's from the mean of their latents, 64 at a time): uint8 [N, S, S, 3].

    Pictures of other shapes are squeezed to the square: feature nets do so anyway, and what is drawn is too (`pictures.draw`).
    """
    if not dataset.description.buckets:
        return stored_to_images(codec, dataset.fetch(rows).stored)
    rows, side = np.asarray(rows, np.int64), dataset.description.codec.image_size
    images, bucket = np.zeros((len(rows), side, side, 3), np.uint8), dataset.bucket_of()[rows]
    for number in np.unique(bucket):
        here = bucket == number
        images[here] = resize(stored_to_images(codec, dataset.fetch(rows[here]).stored), side)
    return images


def sizes_of(dataset: ImageTextDataset, rows: np.ndarray) -> list[Shape] | None:
    """(width, height) of pictures `rows` of a dataset; None where all are squares."""
    return [dataset.description.sizes[number] for number in dataset.bucket_of()[rows]] if dataset.description.buckets else None


def hash_files(files: list[Path], progress: bool = False) -> str:
    """sha256 over the bytes of files, in order."""
    digest = hashlib.sha256()
    for file in tqdm(files, desc="looking at the reference", unit="image", disable=not progress, leave=False):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _kept(home: Path, identity: Identity) -> Reference | None:
    folder = home / identity.hash
    if not (folder / "reference.json").exists():
        return None
    found = Reference.load(folder)
    found.check(str(folder), json.loads(identity.model_dump_json()))
    return found
