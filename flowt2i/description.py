"""The one saved description that travels from `prepare` to `train` to `generate`.

`DATA/dataset.json` holds a `DatasetDescription`; its codec, text and latent statistics are copied into every
checkpoint and exported model, so that what sampling decodes is what training encoded. A mismatch is refused by
naming the field (`require_same`), never patched over.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flowt2i.errors import UserError
from flowt2i.shapes import Shape


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodecSpec(_Spec):
    """How an image becomes what the flow runs on."""

    kind: Literal["pixels", "vae"]
    id: str = "pixels"  # Hugging Face id or folder of the AutoencoderKL; "pixels" where no net is used
    fingerprint: str = "pixels"  # sha256 of config and weights: another VAE under the same name is noticed
    image_size: int = 64  # pixels, square
    shape: tuple[int, int, int] = (3, 64, 64)  # C, h, w of what the flow runs on

    @property
    def factor(self) -> int:
        """Pixels along a side of what the flow runs on."""
        return self.image_size // self.shape[1]

    def latent_shape(self, size: Shape) -> tuple[int, int, int]:
        """C, h, w of a picture of this (width, height) in pixels."""
        return self.shape[0], size[1] // self.factor, size[0] // self.factor


class TextSpec(_Spec):
    """How a caption becomes token ids, and which encoder reads them."""

    kind: Literal["builtin", "hf"]
    id: str = "builtin"  # Hugging Face id or folder of the frozen encoder
    fingerprint: str = "builtin"  # sha256 of tokenizer (builtin) or of config and weights (hf)
    max_tokens: int = 128
    vocab_size: int = 0
    dim: int = 0  # width of the frozen encoder's output; 0 for builtin (the model config decides)
    pad_id: int = 0
    null_tokens: tuple[int, ...] = ()  # token ids of the empty caption, used by caption dropout and guidance


class Bucket(_Spec):
    """One shape of the pictures of a dataset, and how many have it."""

    width: int = Field(ge=1)  # pixels
    height: int = Field(ge=1)
    train: int = Field(ge=0)
    heldout: int = Field(ge=0)

    @property
    def size(self) -> Shape:
        return self.width, self.height


class DatasetDescription(_Spec):
    """What `DATA/dataset.json` says. Training and sampling obey it."""

    format: int = 1
    source: str = ""  # what was read, for people
    hub_sources: tuple[str, ...] = ()  # those of them that are datasets on the hub; all else lies on somebody's disk, under names of their own
    codec: CodecSpec
    text: TextSpec
    latent_mean: tuple[float, ...]  # [C], of pixels scaled to [-1, 1] or of raw VAE latents (train split)
    latent_std: tuple[float, ...]  # [C]
    train_count: int
    heldout_count: int
    heldout_fraction: float
    longest_caption: int = 128  # tokens, over both splits
    prompts: tuple[str, ...] = ()  # a few held-out captions that previews may use
    fingerprint: str = ""  # sha256 of sorted (key, content hash): two folders with one fingerprint hold the same data
    buckets: tuple[Bucket, ...] = ()  # the shapes of the pictures, by width and height; none: all are squares of `codec.image_size`

    @property
    def sizes(self) -> list[Shape]:
        """(width, height) in pixels of the pictures: of each bucket, or of the square."""
        return [bucket.size for bucket in self.buckets] or [(self.codec.image_size, self.codec.image_size)]

    @property
    def home(self) -> Shape:
        """(width, height) that is drawn where nothing else is said: the square, or, where buckets have none, the shape of most training pictures."""
        square = (self.codec.image_size, self.codec.image_size)
        return square if square in self.sizes else max(self.buckets, key=lambda bucket: (bucket.train, bucket.size)).size

    @property
    def is_scenes(self) -> bool:
        """Whether this is the built-in data, whose captions the exact checker understands."""
        return self.source == "scenes"

    @classmethod
    def load(cls, folder: Path) -> "DatasetDescription":
        """Read `folder/dataset.json`; UserError where it is missing or not one of ours."""
        path = Path(folder) / "dataset.json"
        if not Path(folder).exists():
            raise UserError(f"no dataset at {folder}: run `flowt2i prepare SOURCE --out {folder}` first")
        if not path.exists():
            raise UserError(f"{folder} has no dataset.json: it is not a prepared dataset (or preparation did not finish: rerun the same prepare command)")
        try:
            return cls.model_validate_json(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not a dataset description this version reads ({str(error).splitlines()[0]}): prepare the data again") from error

    def save(self, folder: Path) -> None:
        """Write `folder/dataset.json`."""
        (Path(folder) / "dataset.json").write_text(self.model_dump_json(indent=2) + "\n")


def require_same(ours: _Spec, theirs: _Spec, what: str) -> None:
    """Raise UserError naming the first field in which two specs differ (`id` may differ: a folder can move)."""
    for name in type(ours).model_fields:
        a, b = getattr(ours, name), getattr(theirs, name)
        if name != "id" and a != b:
            raise UserError(f"{what} differ in {name!r}: {_short(a)} against {_short(b)}; use data prepared with the same settings, or start a new run")


def fingerprint_files(paths: list[Path]) -> str:
    """sha256 over the names and bytes of some files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
