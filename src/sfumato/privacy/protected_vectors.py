"""The only handle through which code reaches the vectors of a private image collection.

An index keeps them under INDEX/protected: unit vectors in segments (one more with each `add`, float32, memory-mapped)
and the state file of `query_state`. It gives nothing away by itself; the mechanisms of `private_query` and `codebook`
read its private attributes, and a test enforces that nothing else does.

No structure is trained on the vectors: they are searched exactly, or in lists around centroids made from *public*
vectors, so a record's place depends on that record alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from sfumato.data.cache import sync_directory
from sfumato.errors import InputError, LedgerError
from sfumato.privacy.mechanisms import _padded_batches
from sfumato.privacy.query_state import QueryState
from sfumato.privacy.vectors import _check_alone
from sfumato.progress import Progress

if TYPE_CHECKING:
    from sfumato.data.images import ProtectedImages

GRID = 1 << 22
"""Vectors are compared and summed in whole steps of 2^-22. Products of whole numbers are exact in float64, in any order
and any batch (all sums stay below 2^53), so what is computed of one record cannot depend on the others."""

_STATE = "state.db"
_AT_ONCE = 64  # images that go through the encoder together; the last ones are filled up with empty ones
_UNIT_LENGTH = 1e-3  # how far a length may be from 1
Encode = Callable[[np.ndarray], np.ndarray]


class ProtectedVectors:
    """Private unit vectors; no indexing, iteration, length, copy or pickle.

    folder: INDEX/protected. dimension: D.
    """

    def __init__(self, folder: Path, dimension: int) -> None:
        self.folder, self.dimension = folder, dimension
        self._state = QueryState(folder / _STATE)
        self._seen = -1
        with self._state.exclusive():
            self._refresh()

    @classmethod
    def create(cls, folder: Path, dimension: int) -> ProtectedVectors:
        """An empty collection in a new folder, closed to other users."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        QueryState.create(folder / _STATE)
        return cls(folder, dimension)

    def __repr__(self) -> str:
        return f"ProtectedVectors(dimension={self.dimension})"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("ProtectedVectors gives no access to its vectors: use a mechanism of sfumato.privacy")

    __iter__ = __len__ = __getitem__ = __contains__ = _refuse
    __array__ = __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return True

    def add_images(self, private: ProtectedImages, encode: Encode, what: str = "encoding") -> None:
        """Encode protected images and add them; ids are their names, units as declared there.

        encode: uint8 [B, H, W, C] -> float [B, D] unit vectors, each image by itself: it is tested on random images,
        and gets one image at a time where others make a difference in the last bit. No value leaves.
        """
        images, records = private._images, private._source.records
        vectors = np.empty((len(images), self.dimension), np.float32)
        size = _batch_size(encode, images.shape[1:])
        with Progress(what, total=100, unit="%") as progress:  # the count itself may be private
            for batch, padded in _padded_batches(private, np.arange(len(images)), size):
                vectors[batch] = np.asarray(encode(padded), np.float32)[: len(batch)]
                progress.advance((int(batch[-1]) + 1) * 100 // len(images) - progress.done)
        names = [records[int(row)].where for row in private._rows]
        if private.unit == "group":
            units = [f"group {records[int(row)].group}" for row in private._rows]
        else:
            units = [f"image {name}" for name in names]
        self.add(vectors, names, units)

    def add(self, vectors: np.ndarray, names: Sequence[str], units: Sequence[str]) -> None:
        """Add records: float [N, D] of length 1, an id and a unit for each.

        Raises InputError for vectors of another size, not finite or not of length 1, and for ids that are taken.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension or not len(vectors):
            raise InputError(
                f"the index holds vectors of {self.dimension} numbers and was given {list(vectors.shape)}; no "
                "budget was "
                "spent. Use the encoder that the index was built with"
            )
        if not len(vectors) == len(names) == len(units):
            raise InputError("each vector needs one id and one unit; no budget was spent")
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        wrong = ~(np.abs(lengths - 1) < _UNIT_LENGTH)  # also where it is not a number
        if wrong.any():
            raise InputError(
                f"the vector of {names[int(wrong.argmax())]!r} has length {lengths[int(wrong.argmax())]:.4g}, "
                "not 1; no "
                "budget was spent. Divide each vector by its length"
            )
        with self._state.exclusive():
            self._refresh()  # another process may have added where this one would write
            first = self._end
            for left in self.folder.glob("vectors-*.f32"):  # of deleted records, or of an interrupted call
                if _first_row(left) >= first:
                    left.unlink()
            path = self.folder / f"vectors-{first:012d}.f32"
            with open(path, "wb", opener=_private) as file:
                file.write(vectors.tobytes())
                file.flush()
                os.fsync(file.fileno())
            sync_directory(self.folder)
            self._state.add(first, names, units)
            self._refresh()

    def delete(self, names: Sequence[str]) -> None:
        """Remove records by id: their vectors are overwritten, and the answers kept so far are forgotten.

        What their units used of their budget stays used, should they come back. Killed in between, a record is still
        there as zeros, and the same call again removes it.
        """
        with self._state.exclusive():
            self._refresh()
            for row in self._state.rows_of(names):
                for first, block in self._segments:
                    if first <= row < first + len(block):
                        held = np.memmap(block.filename, np.float32, "r+", shape=block.shape)  # type: ignore[attr-defined]
                        held[row - first] = 0
                        held.flush()
            self._state.delete(names)
            self._refresh()

    def _refresh(self) -> None:
        """Read again what records there are, where another process may have changed that."""
        changes = self._state.changes()
        if changes == self._seen:
            return
        segments, end = [], 0
        rows, unit_of_row = self._state.records()
        for path in sorted(self.folder.glob("vectors-*.f32")):
            first = _first_row(path)
            if not rows.size or rows[-1] < first:  # of deleted records, or of a call that was interrupted
                break
            count = path.stat().st_size // (4 * self.dimension)
            if path.stat().st_size % (4 * self.dimension) or first != end:
                raise LedgerError(
                    f"{path} is damaged or a segment before it is missing; nothing was released. Put back a copy"
                )
            segments.append((first, np.memmap(path, np.float32, "r", shape=(count, self.dimension))))
            end = first + count
        if rows.size and rows[-1] >= end:
            raise LedgerError(
                f"{self.folder} lacks vectors of records that the index lists; nothing was released. Put back a copy"
            )
        self._segments, self._end, self._seen = segments, end, changes
        self._alive = np.zeros(end, bool)
        self._alive[rows] = True
        self._unit_of = np.full(end, -1, np.int64)
        self._unit_of[rows] = unit_of_row

    def _blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 [B, D]) of all records, deleted ones included."""
        for first, held in self._segments:
            for start in range(0, len(held), size):
                yield first + start, held[start : start + size]

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """Whole steps of 2^-22 as float64 [M, D] of these rows."""
        return on_grid(self._rows(rows))

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """Float32 [M, D] of these rows, as they were given."""
        if len(self._segments) == 1:
            return np.asarray(self._segments[0][1][rows])
        found = np.empty((len(rows), self.dimension), np.float32)
        for first, held in self._segments:
            here = (rows >= first) & (rows < first + len(held))
            found[here] = held[rows[here] - first]
        return found


def _batch_size(encode: Encode, shape: tuple[int, ...]) -> int:
    """How many images may be encoded together; InputError where even one alone is not always the same vector."""

    def asked(images: np.ndarray) -> np.ndarray:
        return np.array(encode(images), np.float32)

    try:
        _check_alone(asked, shape, _AT_ONCE, "the encoder")
    except InputError:
        _check_alone(asked, shape, 1, "the encoder")
        return 1
    return _AT_ONCE


def _first_row(segment: Path) -> int:
    return int(segment.stem.split("-")[1])


def on_grid(vectors: np.ndarray) -> np.ndarray:
    """Numbers in whole steps of 2^-22, as float64 of the same shape."""
    return np.rint(np.asarray(vectors, np.float64) * GRID)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
