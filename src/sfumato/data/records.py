"""What every source of images looks like to the rest of the program: records, read one at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from sfumato.errors import InputError

NO_BUDGET = "no budget was spent"


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One image that has not been read yet.

    where: its name inside the owner's own folder, for messages to the owner only.
    label, group, caption: what the folder or its metadata says of it, or None.
    read: returns the encoded file as bytes, or the pixels as an array; raises `InputError`.
    """

    where: str
    label: str | None
    group: str | None
    caption: str | None
    read: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True, slots=True, repr=False)
class Source:
    """An opened collection of images.

    spec: what the user typed.
    kind: "folder", "zip", "parquet", "npz", "idx", "demo", "hf".
    records: all images, in an order that depends on their names or positions only.
    label_names: the labels in class order, or None when the collection has none.
    fingerprint: changes when the collection changes (names, sizes, times of its files).
    description: what kind of collection it is, without a count or a name from inside it.
    location: the resolved path, or None for what is not a file.
    """

    spec: str
    kind: str
    records: Sequence[Record]
    label_names: tuple[str, ...] | None
    fingerprint: str
    description: str
    location: Path | None = None


class LazyRecords(Sequence[Record]):
    """`count` records made by `make(index)` when asked for, so that a million of them weigh nothing."""

    def __init__(self, count: int, make: Callable[[int], Record]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(index % self._count)


def fingerprint(parts: Iterable[str | bytes]) -> str:
    """SHA-256 of a sequence of strings, hexadecimal; no two different sequences run together."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """Resolved path, size and modification time of a file, as text."""
    status = os.stat(path)
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def names_of(values: Iterable[str | int]) -> tuple[str, ...]:
    """The distinct labels as text, sorted: integers by value, text by code point."""
    return tuple(str(value) for value in sorted(set(values)))  # type: ignore[type-var]


def printable(name: str) -> str:
    """A file name as it can be put into a one-line message: control and undecodable characters escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def bad_source(spec: str, problem: str, remedy: str) -> InputError:
    """The one-line error for a collection that cannot be used as it is."""
    return InputError(printable(f"'{spec}' {problem}; {NO_BUDGET}; {remedy}"))
