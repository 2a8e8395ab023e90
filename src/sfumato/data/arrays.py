"""Collections that are one big array, `.npz` (images, labels) and idx: read row by row in bounded memory."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from sfumato.data.decoding import MAX_PIXELS
from sfumato.data.records import LazyRecords, Record, Source, bad_source, file_stamp, fingerprint, names_of

MAX_LABEL_BYTES = 1_000_000_000
DEFLATE_LIMIT = 1100  # deflate cannot shrink anything more than 1032-fold
_AS_NPZ = "save it with np.savez(path, images=uint8 [N, H, W] or [N, H, W, C], labels=integers or text [N])"


class _Rows:
    """Rows of a C-ordered array inside a stream; reading in order never rewinds the stream."""

    def __init__(
        self,
        spec: str,
        open_stream: Callable[[], IO[bytes]],
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        self.spec, self.offset, self.shape, self.dtype = spec, offset, shape, dtype
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._open, self._stream = open_stream, None

    def read(self, index: int) -> np.ndarray:
        start = self.offset + index * self.row_bytes
        try:
            if self._stream is None:
                self._stream = self._open()
            if self._stream.tell() != start:
                self._stream.seek(start)
            raw = self._stream.read(self.row_bytes)
        except MemoryError:
            raise
        except Exception:  # gzip and zipfile let through what zlib and lzma raise on damaged data
            raw = b""
        if len(raw) != self.row_bytes:
            raise bad_source(
                self.spec, f"is damaged or cut short at image {index + 1}", "fetch or write it again"
            )
        return np.frombuffer(raw, self.dtype).reshape(self.shape[1:])


def open_npz(spec: str, path: Path) -> Source:
    """`images`: uint8 or uint16 [N, H, W] or [N, H, W, 1|3|4]; `labels`, optional: integers or text [N]."""
    try:
        archive = zipfile.ZipFile(path)
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise bad_source(spec, f"is not a readable .npz file ({error})", _AS_NPZ) from None
    if "images" not in members:
        found = ", ".join(sorted(members)) or "nothing"
        raise bad_source(spec, f"has no array named 'images' (it has {found})", _AS_NPZ)
    offset, shape, dtype = _npy_header(spec, path, archive, members["images"], "images")
    _check_images(spec, shape, dtype)
    rows = _Rows(spec, lambda: archive.open(members["images"]), offset, shape, dtype)
    labels = None
    if "labels" in members:
        labels = _npz_labels(spec, path, archive, members["labels"], shape[0])
    return _source(spec, "npz", path, [path], rows, labels, "an .npz array of images")


def _npy_header(
    spec: str, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str
) -> tuple[int, tuple[int, ...], np.dtype]:
    if member.flag_bits & 1:
        raise bad_source(spec, "is encrypted", "decrypt it first")
    try:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            readers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, fortran, dtype = readers[version](stream)
            offset = stream.tell()
    except MemoryError:
        raise
    except Exception:
        raise bad_source(spec, f"has a damaged array '{name}'", _AS_NPZ) from None
    if dtype.hasobject:
        raise bad_source(spec, f"stores '{name}' as Python objects, which are never unpickled", _AS_NPZ)
    if fortran and len(shape) > 1:
        raise bad_source(spec, f"stores '{name}' in Fortran order", "save np.ascontiguousarray of it")
    declared = math.prod(shape) * dtype.itemsize
    if offset + declared != member.file_size or member.file_size > DEFLATE_LIMIT * path.stat().st_size:
        raise bad_source(spec, f"declares another size for '{name}' than it holds", "write it again")
    return offset, tuple(shape), dtype


def _npz_labels(
    spec: str, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int
) -> list[str | int]:
    _, shape, dtype = _npy_header(spec, path, archive, member, "labels")
    if dtype.kind not in "iuU" or shape not in ((count,), (count, 1)):
        raise bad_source(
            spec,
            f"has labels of type {dtype} that are not one for each image",
            "give one integer or text each",
        )
    if member.file_size > MAX_LABEL_BYTES:
        raise bad_source(spec, "has labels of more than 1 GB", _AS_NPZ)
    try:
        with archive.open(member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False).ravel().tolist()
    except MemoryError:
        raise
    except Exception:
        raise bad_source(spec, "has a damaged array 'labels'", _AS_NPZ) from None


def open_idx(spec: str, path: Path, *, label_names: Sequence[str] | None = None) -> Source:
    """An idx file of uint8 images [N, H, W] or [N, H, W, C], gzipped or not; labels from the file beside it.

    The labels' file has the same name with "labels" for "images" and idx1 for idx3, with or without ".gz".
    label_names: the name of each label number; by default the numbers themselves.
    """
    opener, offset, shape = _idx_header(spec, path)
    rows = _Rows(spec, opener, offset, shape, np.dtype(np.uint8))
    _check_images(spec, shape, rows.dtype)
    files = [path]
    labels: list[str | int] | None = None
    beside = _labels_beside(path)
    if beside is not None:
        files.append(beside)
        opener, offset, label_shape = _idx_header(spec, beside)
        if label_shape != (shape[0],):
            raise bad_source(
                spec, f"has not as many images as '{beside.name}' has labels", "put its own labels beside it"
            )
        labels = _Rows(spec, opener, offset, (1, shape[0]), np.dtype(np.uint8)).read(0).tolist()
    if label_names is not None:
        if labels is None or max(labels, default=0) >= len(label_names):  # type: ignore[operator, type-var]
            raise bad_source(spec, "has no labels, or labels beyond the known names", "fetch the files again")
        labels = [label_names[int(label)] for label in labels]
    return _source(spec, "idx", path, files, rows, labels, "an idx file of images", label_names)


def _idx_header(spec: str, path: Path) -> tuple[Callable[[], IO[bytes]], int, tuple[int, ...]]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            zipped = stream.read(2) == b"\x1f\x8b"
        opener = partial(_open_plain, path, zipped)
        with opener() as stream:
            magic = stream.read(4)
            dimensions = magic[3] if len(magic) == 4 and magic[:2] == b"\0\0" else 0
            raw = stream.read(4 * dimensions)
    except (OSError, EOFError) as error:
        raise bad_source(spec, f"cannot be read: '{path.name}' ({error})", "fetch it again") from None
    except Exception:
        raise bad_source(spec, f"has a damaged file '{path.name}'", "fetch it again") from None
    if not 1 <= dimensions <= 4 or magic[2] != 0x08 or len(raw) != 4 * dimensions:
        raise bad_source(
            spec, f"has no idx file of bytes in '{path.name}'", "give train-images-idx3-ubyte or the like"
        )
    shape = struct.unpack(f">{dimensions}I", raw)
    offset = 4 + 4 * dimensions
    declared = offset + math.prod(shape)
    if (declared > DEFLATE_LIMIT * size) if zipped else (declared != size):
        raise bad_source(spec, f"declares another size in '{path.name}' than it has", "fetch it again")
    return opener, offset, shape


def _open_plain(path: Path, zipped: bool) -> IO[bytes]:
    return gzip.GzipFile(path, "rb") if zipped else open(path, "rb")  # type: ignore[return-value]


def _labels_beside(path: Path) -> Path | None:
    name = path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    stem = name.removesuffix(".gz")
    if name == path.name:
        return None
    return next((path.parent / n for n in (name, stem, stem + ".gz") if (path.parent / n).is_file()), None)


def _check_images(spec: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise bad_source(spec, f"holds images of type {dtype}", "scale them to 0..255 and save them as uint8")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3, 4)):
        raise bad_source(
            spec, f"holds images of shape {['N', *shape[1:]]}", "save them as [N, H, W] or [N, H, W, 1|3|4]"
        )
    if 0 in shape:
        raise bad_source(spec, "holds no images", _AS_NPZ)
    if shape[1] * shape[2] > MAX_PIXELS:
        raise bad_source(
            spec, f"holds images of more than {MAX_PIXELS // 1_000_000} million pixels", "shrink them"
        )


def _source(
    spec: str, kind: str, path: Path, files: list[Path], rows: _Rows, labels: Sequence[str | int] | None,
    description: str, label_names: Sequence[str] | None = None,
) -> Source:  # fmt: skip
    def make(index: int) -> Record:
        label = None if labels is None else str(labels[index])
        return Record(f"image {index + 1}", label, None, None, lambda: rows.read(index))

    names = None if labels is None else tuple(label_names) if label_names else names_of(labels)
    stamp = fingerprint([kind, *(file_stamp(file) for file in files)])
    return Source(spec, kind, LazyRecords(rows.shape[0], make), names, stamp, description, path.resolve())
