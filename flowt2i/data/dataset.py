"""What training reads: a prepared folder, memory-mapped, any samples by number, many thousands a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from flowt2i.data.finish import measured_path
from flowt2i.data.units import SIZE, SPLITS, Rows, read_part, sizes_of, stored_column, stored_rows, stored_shape
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError, nearest
from flowt2i.shapes import name as name_of


class Batch(NamedTuple):
    """Samples as they are stored; `codec.stored_to_latents` makes latents of them."""

    stored: torch.Tensor  # uint8 [B, 3, H, W] (pixels) or float16 [B, 2C, h, w] (VAE: mean and log-variance)
    ids: torch.Tensor  # int64 [B, T], padded with the tokenizer's pad token
    mask: torch.Tensor  # bool [B, T], True where a token is real
    index: torch.Tensor  # type: ignore[assignment]  # int64 [B], numbers of the samples


class _Part(NamedTuple):
    """Views into one memory-mapped part."""

    stored: NDArray[Any] | Rows  # [rows, ...], or one array of its own shape a row
    tokens: NDArray[np.int32]  # of all rows, end to end
    ends: list[int]  # row i has tokens[ends[i] : ends[i + 1]]
    keys: pa.Array
    captions: pa.Array
    buckets: NDArray[np.int64]  # [rows], numbers into `description.sizes`


class ImageTextDataset(torch.utils.data.Dataset):
    """One split of a prepared folder.

    `fetch(indices)` gives a Batch; `__getitems__` is the same, for a DataLoader with `collate_fn=ImageTextDataset.collate`.
    T is the longest caption of the batch, rounded up to a multiple of `pad_to`.
    The samples of a batch are of one shape (`by_bucket`). Maps are opened on first use and again after a fork or pickling.
    UserError: no such folder, unfinished or broken dataset, unknown split, empty split.
    """

    def __init__(self, folder: str | Path, split: str = "train", pad_to: int = 8) -> None:
        self.folder, self.split, self.pad_to = Path(folder), split, pad_to
        if split not in SPLITS:
            raise UserError(f"no split {split!r}{nearest(split, SPLITS)}")
        self.description = DatasetDescription.load(self.folder)
        _check_sane(self.folder, self.description)
        _check_unchanged(self.folder, self.description)
        self._length = self.description.train_count if split == "train" else self.description.heldout_count
        if not self._length:
            raise UserError(f"the {split} split of {folder} is empty: prepare more samples, or with a larger --heldout")
        self._parts: list[_Part] | None = None
        self._part_of: NDArray[np.int64] = np.zeros(0, np.int64)  # first sample number of each part, and the end
        self._open()

    def __len__(self) -> int:
        return self._length

    def fetch(self, indices: Sequence[int] | NDArray[np.integer] | torch.Tensor, pictures: bool = True) -> Batch:
        """The samples with these numbers, in this order; they may repeat. Without `pictures` their captions alone (`stored` is empty).

        IndexError outside [0, len), ValueError for pictures of several shapes.
        """
        numbers = np.asarray(indices, np.int64).reshape(-1)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self._length):
            raise IndexError(f"sample numbers must lie in [0, {self._length}), got {numbers.min()} to {numbers.max()}")
        parts = self._open()
        where = np.searchsorted(self._part_of, numbers, side="right") - 1
        rows = (numbers - self._part_of[where]).tolist()
        places = [(parts[p], row) for p, row in zip(where.tolist(), rows)]
        first = places[0] if places else (parts[0], 0)
        like = first[0].stored[first[1]]
        stored = np.empty((len(numbers) if pictures else 0, *like.shape), like.dtype)
        if pictures and self.description.buckets and len({int(part.buckets[row]) for part, row in places}) > 1:
            raise ValueError("the samples of a batch must be of one shape: see `by_bucket`")
        tokens = []
        for i, (part, row) in enumerate(places):
            if pictures:
                stored[i] = part.stored[row]
            tokens.append(part.tokens[part.ends[row] : part.ends[row + 1]])
        lengths = np.array([len(line) for line in tokens], np.int64)
        width = max(1, -(-int(lengths.max(initial=1)) // self.pad_to)) * self.pad_to
        mask = np.arange(width) < lengths[:, None]
        ids = np.full(mask.shape, self.description.text.pad_id, np.int64)
        if tokens:
            ids[mask] = np.concatenate(tokens)
        return Batch(torch.from_numpy(stored), torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(numbers.copy()))

    __getitems__ = fetch

    def __getitem__(self, index: int) -> Batch:
        return self.fetch([index])

    @staticmethod
    def collate(batch: Any) -> Batch:
        """For DataLoader(collate_fn=…): `__getitems__` made the batch already."""
        return batch

    def key(self, index: int) -> str:
        """The key of a sample, as in the source."""
        part, row = self._place(index)
        return part.keys[row].as_py()

    def caption(self, index: int) -> str:
        """The caption of a sample."""
        part, row = self._place(index)
        return part.captions[row].as_py()

    def captions(self) -> list[str]:
        """All captions, in order."""
        return [text for part in self._open() for text in part.captions.to_pylist()]

    def token_lengths(self) -> NDArray[np.int64]:
        """Number of caption tokens of every sample, in order: int64 [len]."""
        return np.concatenate([np.diff(part.ends) for part in self._open()])

    def bucket_of(self) -> NDArray[np.int64]:
        """Which shape every sample has, by its number in `description.sizes`: int64 [len]."""
        return np.concatenate([part.buckets for part in self._open()])

    def by_bucket(self, count: int = 0) -> list[NDArray[np.int64]]:
        """Numbers of the samples (of the first `count` of them) of each shape, in the order of `description.sizes`."""
        buckets = self.bucket_of()[: count or None]
        return [np.flatnonzero(buckets == number) for number in range(len(self.description.sizes))]

    def _place(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        parts = self._open()
        number = int(np.searchsorted(self._part_of, index, side="right")) - 1
        return parts[number], index - int(self._part_of[number])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None}  # maps are not pickled; another process opens its own

    def _open(self) -> list[_Part]:
        if self._parts is None:
            _allow_open_files()
            parts = [self._view(path) for path in sorted((self.folder / self.split).glob("part-*.arrow"))]
            parts = [part for part in parts if len(part.stored)]
            counts = [len(part.stored) for part in parts]
            if sum(counts) != self._length:
                where = self.folder / self.split
                raise UserError(f"{where} has {sum(counts)} samples, dataset.json says {self._length}: prepare the data again")
            told = [getattr(bucket, self.split) for bucket in self.description.buckets]
            found = np.bincount(np.concatenate([part.buckets for part in parts]), minlength=len(told)).tolist()
            if told and told != found:
                raise UserError(f"{self.folder / self.split} has {found} samples in its buckets, dataset.json says {told}: prepare the data again")
            self._part_of = np.concatenate([[0], np.cumsum(counts)])
            self._parts = parts
        return self._parts

    def _view(self, path: Path) -> _Part:
        codec = self.description.codec
        column, _ = stored_column(codec)
        batch = read_part(path)
        sizes = self.description.sizes
        buckets = np.zeros(len(batch), np.int64)
        told = f"{path} does not hold what dataset.json says ({column} of {', '.join(map(name_of, sizes[:4]))} pixels): prepare the data again"
        wanted = {"key", "caption", "tokens", column} | ({SIZE} if self.description.buckets else set())
        if wanted - set(batch.schema.names) or (SIZE in batch.schema.names) != bool(self.description.buckets):
            raise UserError(told)
        if not self.description.buckets:
            if getattr(batch.schema.field(column).type, "list_size", 0) != int(np.prod(stored_shape(codec))):
                raise UserError(told)
        else:
            if not (pa.types.is_list(batch.schema.field(column).type) and batch.schema.field(SIZE).type == pa.list_(pa.int32(), 2)):
                raise UserError(told)
            numbers = {size: number for number, size in enumerate(sizes)}
            buckets = np.array([numbers.get((int(w), int(h)), -1) for w, h in sizes_of(batch)], np.int64)
            if (buckets < 0).any() or not Rows(codec, batch).fit():
                raise UserError(told)
        tokens = batch.column("tokens")
        return _Part(
            stored=stored_rows(codec, batch),
            tokens=tokens.values.to_numpy(zero_copy_only=True),
            ends=tokens.offsets.to_pylist(),
            keys=batch.column("key"),
            captions=batch.column("caption"),
            buckets=buckets,
        )


def _check_sane(folder: Path, description: DatasetDescription) -> None:
    """UserError where `dataset.json` says what preparation never writes."""
    channels = description.codec.shape[0]
    mean, std = description.latent_mean, description.latent_std
    if not (len(mean) == len(std) == channels and np.isfinite(mean).all() and np.isfinite(std).all() and min(std) > 0):
        raise UserError(f"{folder / 'dataset.json'}: latent_mean and latent_std are not {channels} finite numbers (std above 0): prepare the data again")


def _check_unchanged(folder: Path, description: DatasetDescription) -> None:
    """UserError naming the field of `dataset.json` that is not as preparation left it (names and places of things may change)."""
    path = measured_path(folder)
    if not path.exists():  # made by an older version, or the records were removed to save space
        return
    try:
        measured = DatasetDescription.model_validate_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken: prepare the data again") from error
    now, then = _flat(description), _flat(measured)
    for name, value in now.items():
        if value != then[name]:
            said = f"{name} is {_short(value)}, but preparation found {_short(then[name])}"
            raise UserError(f"{folder / 'dataset.json'} was changed after preparation: {said}; restore it, or prepare the data again")


def _flat(description: DatasetDescription) -> dict[str, Any]:
    fields = description.model_dump(exclude={"source": True, "prompts": True, "codec": {"id"}, "text": {"id"}})
    inner = {f"{part}.{name}": value for part in ("codec", "text") for name, value in fields.pop(part).items()}
    return {**inner, **fields}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _allow_open_files() -> None:
    """Raise the soft limit of open files to the hard one: every part is an open file."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 65536)) if hard > 0 else soft, hard))
    except (ImportError, ValueError, OSError):
        pass
