"""Tables with an image and a text column: local parquet and arrow files, and Hugging Face datasets (streamed)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flowt2i.data.sample import RawSample, clean_key
from flowt2i.errors import UserError, nearest

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
TEXT_COLUMNS = ("text", "caption", "prompt", "json", "txt", "captions", "description")
KEY_COLUMNS = ("__key__", "key", "id")
_ROWS, _BYTES = 64, 64 << 20  # read at a time, at most: pictures are large


class TableShard:
    """One parquet or arrow file. The key is that of a key column, or `FILE-ROW`."""

    costly = False

    def __init__(self, path: Path, image_column: str = "", text_column: str = "") -> None:
        self.path, self.name = Path(path), str(path)
        self._wanted = image_column, text_column
        try:
            names = self._schema().names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as {self.path.suffix[1:]} ({_line(error)}): remove it or fetch it again") from error
        self.image, self.text, self.key = _columns(names, image_column, text_column, str(path))

    def samples(self, start: int = 0) -> Iterator[RawSample]:
        """Samples from row `start` on; a file that breaks off ends in a sample with a reason."""
        row = 0
        columns = [name for name in (self.image, self.text, self.key) if name]
        try:
            for batch in self._batches(columns):
                if row + len(batch) <= start:
                    row += len(batch)
                    continue
                rows = batch.slice(max(0, start - row))
                row = max(row, start)
                for item in _items(rows):
                    key = item.get(self.key) if self.key else None
                    row += 1
                    yield _sample(item, self.image, self.text, f"{self.path.stem}-{row - 1:08d}" if key is None else key, self.name)
        except (pa.ArrowException, OSError) as error:
            if row >= start:
                yield RawSample("", self.name, reason="corrupt table", detail=_line(error))

    def estimate(self) -> int:
        """Number of rows, from the file's own metadata."""
        try:
            if self.path.suffix == ".parquet":
                return pq.read_metadata(self.path).num_rows
            return sum(len(batch) for batch in self._batches([self.text]))
        except (pa.ArrowException, OSError):
            return 0

    def forget(self) -> None:
        """Nothing is kept."""

    def signature(self) -> str:
        """Name and size."""
        return f"{self.path.name}:{self.path.stat().st_size}"

    def _schema(self) -> pa.Schema:
        return pq.read_schema(self.path) if self.path.suffix == ".parquet" else _open_arrow(self.path).schema

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if self.path.suffix == ".parquet":
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_rows_at_a_time(file.metadata), columns=columns):
                    yield _as_bytes(batch)
            return
        reader = _open_arrow(self.path)
        whole = (reader.get_batch(i) for i in range(reader.num_record_batches)) if isinstance(reader, pa.RecordBatchFileReader) else reader
        for batch in whole:
            chosen = _as_bytes(batch.select(columns))
            chosen.validate(full=True)  # offsets in a hostile file point anywhere, and pyarrow believes them
            for start in range(0, len(chosen), _ROWS):
                yield chosen.slice(start, _ROWS)


class HubShard:
    """A dataset of the Hugging Face hub, streamed: pictures pass through and are never kept on disk."""

    costly = True

    def __init__(self, id: str, split: str, files: str = "", image_column: str = "", text_column: str = "") -> None:
        self.id, self.name, self.split, self.files = id, id, split, files
        self._wanted = image_column, text_column
        self._dataset: Any = None

    def samples(self, start: int = 0) -> Iterator[RawSample]:
        """Samples from row `start` on (the hub is read up to there again). UserError when the network fails."""
        dataset = self._open()
        image, text, key = _columns(list(dataset.features or next(iter(dataset))), *self._wanted, self.id)
        number = start
        try:
            for item in dataset.skip(start) if start else dataset:
                name = item.get(key) if key else None
                yield _sample(item, image, text, f"{self.id.replace('/', '-')}-{number:08d}" if name is None else name, self.name)
                number += 1
        except (OSError, ConnectionError) as error:
            why = f"reading {self.id} from the hub failed at row {number} ({_line(error)})"
            raise UserError(f"{why}: rerun the same command to continue") from error

    def estimate(self) -> int | None:
        """Number of rows where the hub knows it."""
        splits = self._open().info.splits
        return splits[self.split].num_examples or None if splits and self.split in splits else None

    def forget(self) -> None:
        """Close the stream."""
        self._dataset = None

    def signature(self) -> str:
        """The id: what lies behind it is the hub's business."""
        return hub_signature(self.id, self.split, self.files)

    def _open(self) -> Any:
        if self._dataset is None:
            dataset = open_hub(self.id, self.split, self.files)
            if dataset.features is None:
                dataset = dataset._resolve_features()
            from datasets import Image

            for name, feature in (dataset.features or {}).items():
                if isinstance(feature, Image):
                    dataset = dataset.cast_column(name, Image(decode=False))  # bytes, decoded with our own checks in the workers
            self._dataset = dataset
        return self._dataset


def hub_signature(id: str, split: str, files: str) -> str:
    """No file's or folder's: theirs end in numbers."""
    return f"{id}:{split}:{files}"


def open_hub(id: str, split: str, files: str = "") -> Any:
    """The dataset `id` (or only its `files`, a glob), streamed; UserError within seconds where there is no network or no such dataset."""
    advice = f"pass local files instead (tars, parquet or a folder of images), or `scenes`; there is no file or folder {id!r} here"
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        raise UserError(f"{id} would have to be downloaded from the Hugging Face hub, but HF_HUB_OFFLINE is set: {advice}")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:  # one short request first: `datasets` itself would try again and again for minutes
        huggingface_hub.HfApi().dataset_info(id, timeout=5)
    except HFValidationError as error:
        raise UserError(f"{id!r} is neither a file or folder here nor an id of the Hugging Face hub: {advice}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise UserError(f"the Hugging Face hub has no dataset {id!r} that can be read (HTTP {status}): {advice}") from error
    except Exception as error:  # whatever HTTP library the hub client uses has its own errors
        raise UserError(f"the Hugging Face hub cannot be reached for {id!r} ({type(error).__name__}): {advice}") from error
    import datasets

    with contextlib.suppress(AttributeError):
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(id, split=split, streaming=True, data_files={split: files} if files else None)
    except Exception as error:
        raise UserError(f"the hub dataset {id!r} cannot be streamed ({_line(error)}): check its split and files, or {advice}") from error


def _as_bytes(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Texts as bytes: a file may say that they are UTF-8 where they are not, and one bad caption must not end the table."""
    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    return pa.RecordBatch.from_arrays([column.cast(kinds.get(column.type, column.type)) for column in batch.columns], names=batch.schema.names)


def _items(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    for row in range(len(batch)):
        item: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns):
            with contextlib.suppress(UnicodeDecodeError):  # a text inside a list or an object
                item[name] = column[row].as_py()
        yield item


def _rows_at_a_time(metadata: Any) -> int:
    """Few where rows are large, so that what is decompressed at a time stays bounded."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_ROWS, int(_BYTES / max(1, largest))))


def _open_arrow(path: Path) -> Any:
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _columns(names: list[str], image: str, text: str, where: str) -> tuple[str, str, str]:
    """Names of the image, text and key column (key: '' where there is none)."""
    found = []
    for what, wanted, known in (("image", image, IMAGE_COLUMNS), ("text", text, TEXT_COLUMNS)):
        if wanted and wanted not in names:
            raise UserError(f"{where} has no column {wanted!r}{nearest(wanted, names)}: name it with --{what}-column")
        name = wanted or next((name for name in known if name in names), "")
        if not name:
            raise UserError(f"{where} has no {what} column among {', '.join(names)}: name it with --{what}-column")
        found.append(name)
    return found[0], found[1], next((name for name in KEY_COLUMNS if name in names), "")


def _sample(item: dict[str, Any], image: str, text: str, key: Any, source: str) -> RawSample:
    key = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
    picture = item.get(image)
    if isinstance(picture, dict):
        picture = picture.get("bytes")  # a path beside it would point to a file on somebody else's disk
    if not isinstance(picture, bytes):
        return RawSample(clean_key(str(key)), source, reason="missing image")
    return RawSample(clean_key(str(key)), source, picture, (item.get(text),))


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
