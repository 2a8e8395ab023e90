"""Three ways to hold images: public, protected (the only way to sensitive pixels), for the owner's eyes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np

from sfumato.data.cache import Cached, cached_pixels, default_cache_directory
from sfumato.data.records import NO_BUDGET, Source, bad_source, printable
from sfumato.data.sources import open_source
from sfumato.errors import InputError

UNITS = ("image", "group")
UNLABELLED = ("all",)
T = TypeVar("T")


class PublicImages:
    """Images whose disclosure harms nobody.

    images: uint8 [N, H, W, C], memory-mapped. labels: int64 [N], -1 where there is none.
    label_names: class names, or None. description: one phrase. len(): N.
    """

    def __init__(
        self,
        source: str | Path | Source,
        *,
        size: tuple[int, int] | int,
        channels: int,
        cache_dir: Path | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.size, self.channels = checked_size(size), checked_channels(channels)
        self._source, cached = _open(source, self.size, channels, cache_dir, skip_unreadable)
        self._content = cached.content
        self.images, self.labels, self.label_names = cached.images, cached.labels, cached.label_names
        self.captions, self.skipped = cached.captions, cached.skipped
        self.description = self._source.description
        if self._source.location is not None:
            self.description += f" '{printable(self._source.location.name)}'"

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.description!r}, {len(self)} images, size={self.size})"


class OwnerArray(np.ndarray):
    """An array of private pixels without a guarantee, which no release accepts. Slices, copies and arithmetic keep
    the mark; numbers, `np.asarray`, `np.concatenate` and the like lose it: wrap what they give in `OwnerOnly`."""


class OwnerImages(PublicImages):
    """The owner's own look at images, for audit and evaluation: no guarantee whatsoever.

    Like `PublicImages`, but `.images` is an `OwnerArray`, and whatever is computed from it may be written by
    `InternalWriter` only.
    """

    for_owner_only = True

    def __init__(
        self,
        source: str | Path | Source,
        *,
        size: tuple[int, int] | int,
        channels: int,
        cache_dir: Path | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        super().__init__(
            source, size=size, channels=channels, cache_dir=cache_dir, skip_unreadable=skip_unreadable
        )
        self.images = self.images.view(OwnerArray)
        self.labels = self.labels.view(OwnerArray)

    def __repr__(self) -> str:
        return f"OwnerImages({self._source.description!r}, size={self.size}, for the owner's eyes only)"


class OwnerOnly(Generic[T]):
    """A value computed from private images without a guarantee; `.value` is for `internal/` only."""

    for_owner_only = True

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "OwnerOnly(...)"


class Units(Sequence[np.ndarray]):
    """Row numbers of each unit: `units[u]` is int64 [rows of unit u]; two arrays, however many units."""

    def __init__(self, groups: np.ndarray | int) -> None:
        """groups: the dense number of each row's unit, or the number of rows when each row is a unit."""
        if isinstance(groups, int):
            self._rows, self._ends = np.arange(groups), np.arange(1, groups + 1)
        else:
            self._rows = np.argsort(groups, kind="stable")
            self._ends = np.cumsum(np.bincount(groups))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, unit: Any) -> Any:
        if isinstance(unit, slice):
            return [self[u] for u in range(*unit.indices(len(self)))]
        unit = range(len(self))[unit]
        return self._rows[self._ends[unit - 1] if unit else 0 : self._ends[unit]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[u] for u in range(len(self)))


class ProtectedImages:
    """The only handle through which code reaches sensitive pixels.

    It gives nothing away by itself: no indexing, iteration, length, array, copy or pickle, and its repr and
    its public attributes hold only what the user declared. Mechanisms under `sfumato.privacy` read the
    private attributes; a test enforces that nothing else does.

    source: anything `open_source` takes.
    ledger: the account that every mechanism on these images is charged to; stored, not used here.
    unit: what one neighbouring step adds or removes: "image", or "group" for all images of one `group_id`.
    size: (height, width) in pixels, or one number for both. channels: 1 or 3.
    public_size: the number of units, when the owner declares it to be public; otherwise it is private.
    label_names: the set of labels, when declared here; an image with another label is an error. By default
        the folder names or the metadata declare it: the set is public, how often each label occurs is not.
    skip_unreadable: go on without images that cannot be read. Each affects only itself: the guarantee stands.
    joins: these images are added to others, so that one group is enough.

    Attributes: ledger, unit, size (H, W), channels, public_size, label_names (("all",) when unlabelled),
    has_labels, description.

    Raises `InputError` before any budget is spent, when images are unreadable or the declarations do not fit.
    """

    def __init__(
        self,
        source: str | Path | Source,
        *,
        ledger: Any,
        unit: str = "image",
        size: tuple[int, int] | int,
        channels: int,
        public_size: int | None = None,
        label_names: Sequence[str] | None = None,
        cache_dir: Path | None = None,
        skip_unreadable: bool = False,
        joins: bool = False,
    ) -> None:
        if unit not in UNITS:
            raise InputError(
                f"unit {unit!r} is not one of {', '.join(UNITS)}; {NO_BUDGET}; give --unit image or group"
            )
        whole = isinstance(public_size, (int, np.integer)) and not isinstance(public_size, bool)
        if public_size is not None and (not whole or public_size < 1):
            raise InputError(
                f"public size {public_size!r} is not a number of units; {NO_BUDGET}; give 1 or more"
            )
        self.ledger, self.unit = ledger, unit
        self.size, self.channels = checked_size(size), checked_channels(channels)
        self.public_size = None if public_size is None else int(public_size)
        self._source, cached = _open(source, self.size, channels, cache_dir, skip_unreadable)
        self.description = self._source.description
        self.has_labels = cached.label_names is not None
        self.label_names, self._labels = _labels(self._source, cached, label_names)
        self._images, self._content, self._skipped = cached.images, cached.content, cached.skipped
        self._rows = cached.rows
        if unit == "group":
            if (cached.groups < 0).any():
                where = next((r.where for r in self._source.records if r.group is None), "one image")
                raise bad_source(
                    self._source.spec, f"gives no group_id for '{where}'", "add it, or use --unit image"
                )
            self._units = Units(cached.groups)
            if len(self._units) < 2 and not joins:
                raise bad_source(
                    self._source.spec, "has one group only, and nothing may be learnt from one unit",
                    "give images of several groups, or use --unit image",
                )  # fmt: skip
        else:
            self._units = Units(len(cached.images))

    @property
    def skipped(self) -> OwnerOnly[list[str]]:
        """The images that were left out as unreadable, for the owner's eyes only."""
        return OwnerOnly(self._skipped)

    def __repr__(self) -> str:
        return (
            f"ProtectedImages({self.description!r}, unit={self.unit!r}, size={self.size}, "
            f"channels={self.channels}, public_size={self.public_size}, label_names={self.label_names})"
        )

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "ProtectedImages gives no access to its images: use a mechanism of sfumato.privacy, "
            "or open the folder as OwnerImages for a look of your own"
        )

    __iter__ = __len__ = __getitem__ = __contains__ = _refuse
    __array__ = __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return True


def same_content(private: ProtectedImages | OwnerImages, public: PublicImages) -> None:
    """Raise `InputError` when the public images are the private ones: the same folder, one inside the other
    (links resolved), or the same files under other names."""
    mine, other = private._source, public._source
    same = mine.fingerprint == other.fingerprint or private._content == public._content
    if mine.location is not None and other.location is not None:
        same = same or mine.location == other.location
        if mine.kind == other.kind == "folder":
            same = same or mine.location in other.location.parents or other.location in mine.location.parents
    if same:
        raise bad_source(
            mine.spec, f"and the public '{printable(other.spec)}' are the same, or one holds the other",
            "give public images that do not contain the private ones",
        )  # fmt: skip


def checked_size(size: tuple[int, int] | int) -> tuple[int, int]:
    """(height, width) from one number or two."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= 4096 for side in pair):
        raise InputError(
            f"size {size!r} is not one or two whole numbers from 1 to 4096; {NO_BUDGET}; give --size 28"
        )
    return pair


def checked_channels(channels: int) -> int:
    """1 or 3."""
    if channels not in (1, 3):
        raise InputError(
            f"channels {channels!r} is not 1 (grey) or 3 (colour); {NO_BUDGET}; give --channels 1 or 3"
        )
    return channels


def _open(
    source: str | Path | Source, size: tuple[int, int], channels: int, cache_dir: Path | None, skip: bool
) -> tuple[Source, Cached]:
    opened = source if isinstance(source, Source) else open_source(source)
    directory = default_cache_directory() if cache_dir is None else Path(cache_dir)
    cached = cached_pixels(opened, size=size, channels=channels, directory=directory, skip_unreadable=skip)
    return opened, cached


def _labels(
    source: Source, cached: Cached, declared: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    names = cached.label_names
    if names is None:
        if declared is not None:
            raise bad_source(source.spec, "has no labels, though label names were declared", "leave them out")
        return UNLABELLED, np.zeros(len(cached.images), np.int64)
    if declared is None:
        return names, cached.labels
    wanted = tuple(str(name) for name in declared)
    if len(set(wanted)) != len(wanted) or not wanted:
        raise InputError(
            f"label names {list(wanted)} are empty or repeat one; {NO_BUDGET}; name each label once"
        )
    number = {name: position for position, name in enumerate(wanted)}
    translate = np.array([number.get(name, -1) for name in names])
    for label in np.unique(cached.labels):
        if translate[label] < 0:
            problem = f"has the label '{printable(names[label])}', which was not declared"
            raise bad_source(source.spec, problem, "declare it or move its images away")
    return wanted, translate[cached.labels]
