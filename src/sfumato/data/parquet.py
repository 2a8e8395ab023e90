"""Hugging Face's layout: parquet files with an `image` column of bytes and class names in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.data.decoding import MAX_FILE_BYTES, UnreadableImage
from sfumato.data.records import LazyRecords, Record, Source, bad_source, file_stamp, fingerprint, names_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH = 64
_LAYOUT = (
    "give one with a column 'image' of encoded files and, if you like, 'label', 'group_id' and 'caption'"
)


class _Images:
    """The image column of several files, read a few rows at a time; in order, each page is touched once."""

    def __init__(self, spec: str, files: list[pq.ParquetFile], column: str) -> None:
        self.spec, self.column = spec, column
        self._groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        self._sizes = [file.metadata.row_group(group).num_rows for file, group in self._groups]
        self._group, self._group_start, self._batch_start = -1, 0, 0
        self._batch: list[Any] = []
        self._batches: Any = iter(())

    def read(self, index: int) -> bytes:
        try:
            while not self._batch_start <= index < self._batch_start + len(self._batch):
                self._step(index)
        except (OSError, ValueError, StopIteration, KeyError) as error:
            problem = f"is damaged near image {index + 1} ({type(error).__name__})"
            raise bad_source(self.spec, problem, "fetch or write it again") from None
        return image_bytes(self._batch[index - self._batch_start], f"image {index + 1}")

    def _step(self, index: int) -> None:
        ends_at = self._group_start + (self._sizes[self._group] if self._group >= 0 else 0)
        if index < self._batch_start:
            self._open(0, 0)
        elif index >= ends_at:
            self._open(self._group + 1, ends_at)
        else:
            self._batch_start += len(self._batch)
            self._batch = next(self._batches).column(0).to_pylist()

    def _open(self, group: int, start: int) -> None:
        self._group, self._group_start, self._batch_start, self._batch = group, start, start, []
        file, inner = self._groups[group]
        self._batches = file.iter_batches(_BATCH, row_groups=[inner], columns=[self.column])


def image_bytes(value: object, where: str) -> bytes:
    """The encoded file inside one cell: bytes, or a struct with `bytes`."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise UnreadableImage(where, "has no image bytes")
    if len(value) > MAX_FILE_BYTES:
        raise UnreadableImage(where, f"is larger than {MAX_FILE_BYTES // 1_000_000} MB")
    return value


def open_parquet(spec: str, path: Path) -> Source:
    """One parquet file, or a folder of the shards of one split (also in its `data` folder)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [path] if path.is_file() else parquet_files(path)
    splits = {file.name.split("-", 1)[0] for file in paths if "-of-" in file.name}
    if len(splits) > 1:
        raise bad_source(
            spec, f"holds several splits ({', '.join(sorted(splits))})", "give one file or one split"
        )
    try:
        files = [pq.ParquetFile(file) for file in paths]
    except (OSError, pa.ArrowException) as error:
        first = str(error).splitlines()[0]
        raise bad_source(
            spec, f"is not a readable parquet file ({first})", "fetch or write it again"
        ) from None
    schema = files[0].schema_arrow
    if any(not file.schema_arrow.equals(schema) for file in files):
        raise bad_source(
            spec, "holds parquet files with different columns", "give the shards of one data set"
        )
    features = _features(schema)
    image = _image_column(spec, schema, features)
    # Each file is held open by pyarrow; reading checks every row group against its declared size.
    images = _Images(spec, files, image)
    label = next((n for n in ("label", "labels") if n in schema.names), None)
    columns = {
        name: _values(spec, files, name)
        for name in (label, "group_id", "caption")
        if name is not None and name in schema.names
    }
    labels, names = _labels(spec, columns.get(label or ""), features.get(label or ""))
    count = sum(file.metadata.num_rows for file in files)
    if count == 0:
        raise bad_source(spec, "holds no images", _LAYOUT)
    records = table_records(count, images.read, labels, columns.get("group_id"), columns.get("caption"))
    stamp = fingerprint(["parquet", *(file_stamp(file) for file in paths)])
    return Source(spec, "parquet", records, names, stamp, "a parquet table of images", path.resolve())


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, or else of its `data` folder, sorted; empty when there are none."""
    for place in (folder, folder / "data"):
        found = sorted(p for p in place.glob("*.parquet") if p.is_file() and not p.name.startswith("."))
        if found:
            return found
    return []


def open_hub(spec: str) -> Source:
    """`hf:NAME[:split]`, loaded through the `datasets` library (split "train" by default)."""
    name, _, split = spec.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError:
        raise bad_source(spec, "needs the 'datasets' library", "type: pip install datasets") from None
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # its loaders raise whatever the network and the data set make them raise
        first = (str(error).splitlines() or [""])[0][:200]
        problem = f"could not be loaded ({type(error).__name__}: {first})"
        raise bad_source(spec, problem, "check the name, the split and the connection") from None
    features = table.features
    image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise bad_source(spec, f"has no image column (it has {', '.join(features)})", "give a set of images")
    table = table.cast_column(image, datasets.Image(decode=False))
    label = next((column for column in ("label", "labels") if column in features), None)
    kind = (
        {"names": features[label].names}
        if label and isinstance(features[label], datasets.ClassLabel)
        else None
    )
    labels, names = _labels(spec, None if label is None else list(table[label]), kind)
    extra = {key: list(table[key]) if key in features else None for key in ("group_id", "caption")}

    def read(index: int) -> bytes:
        cell = table[index][image]
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            try:
                with open(cell["path"], "rb") as stream:
                    cell = stream.read(MAX_FILE_BYTES + 1)
            except OSError as error:
                raise UnreadableImage(f"image {index + 1}", f"cannot be opened ({error.strerror})") from None
        return image_bytes(cell, f"image {index + 1}")

    records = table_records(len(table), read, labels, extra["group_id"], extra["caption"])
    stamp = fingerprint(["hf", spec, table._fingerprint])
    return Source(spec, "hf", records, names, stamp, f"the data set {name} ({split or 'train'})")


def table_records(
    count: int,
    read: Callable[[int], Any],
    labels: Sequence[str] | None,
    groups: Sequence[object] | None = None,
    captions: Sequence[object] | None = None,
) -> LazyRecords:
    """Records of a table: `read(row)` gives the image, the lists the other columns."""

    def text(values: Sequence[object] | None, index: int) -> str | None:
        return None if values is None or values[index] is None else str(values[index])

    return LazyRecords(
        count,
        lambda index: Record(
            f"image {index + 1}",
            None if labels is None else labels[index],
            text(groups, index),
            text(captions, index),
            lambda: read(index),
        ),
    )


def _features(schema: pa.Schema) -> dict[str, Any]:
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return described if isinstance(described, dict) else {}


def _image_column(spec: str, schema: pa.Schema, features: dict[str, Any]) -> str:
    import pyarrow as pa

    def fits(name: str) -> bool:
        kind = schema.field(name).type
        inner = (
            kind.field("bytes").type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            else kind
        )
        return pa.types.is_binary(inner) or pa.types.is_large_binary(inner)

    declared = [n for n, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]
    for name in [*declared, "image", "img"]:
        if name in schema.names and fits(name):
            return name
    raise bad_source(spec, f"has no image column (it has {', '.join(schema.names)})", _LAYOUT)


def _values(spec: str, files: list[pq.ParquetFile], column: str) -> list[Any]:
    try:
        return [value for file in files for value in file.read(columns=[column]).column(0).to_pylist()]
    except (OSError, ValueError) as error:
        raise bad_source(
            spec, f"is damaged in column '{column}' ({type(error).__name__})", "fetch it again"
        ) from None


def _labels(
    spec: str, values: list[Any] | None, feature: dict[str, Any] | None
) -> tuple[list[str] | None, tuple[str, ...] | None]:
    if values is None or all(value is None or value == -1 for value in values):
        return None, None
    if not all(type(value) is type(values[0]) and isinstance(value, (int, str)) for value in values):
        raise bad_source(spec, "has labels that are missing or not all integers or all text", _LAYOUT)
    names = (feature or {}).get("names")
    if not names or isinstance(values[0], str):
        return [str(value) for value in values], names_of(values)
    if not 0 <= min(values) <= max(values) < len(names):
        raise bad_source(spec, f"has label numbers outside its {len(names)} class names", "correct the table")
    return [str(names[value]) for value in values], tuple(str(name) for name in names)
