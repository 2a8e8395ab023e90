"""Decoded pixels on disk: decoded once, then memory-mapped; memory does not grow with the collection."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from sfumato.data.decoding import UnreadableImage, decode_image, fit_array
from sfumato.data.records import NO_BUDGET, Record, Source, fingerprint, printable
from sfumato.errors import InputError
from sfumato.progress import Progress

_LAYOUT = "sfumato-pixels/1"  # part of the key: change it whenever decoding changes
_BLOCK_RECORDS = 64
_BLOCK_BYTES = 64_000_000
_MODULUS = 1 << 256


@dataclass(frozen=True, repr=False)
class Cached:
    """A decoded collection of N images.

    images: uint8 [N, H, W, C], read-only and memory-mapped.
    labels: int64 [N], index into label_names, -1 where an image has none.
    label_names: as the source gives them, or None.
    groups: int64 [N], dense numbers from 0, -1 where an image has none.
    captions: one text per image ("" where missing), or None when no image has one.
    skipped: what could not be read and was left out, one line each; for the owner's eyes only.
    rows: int64 [N], the position of each image among the source's records.
    content: a digest of all undecoded images that does not depend on their order or names.
    """

    images: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...] | None
    groups: np.ndarray
    captions: list[str] | None
    skipped: list[str]
    rows: np.ndarray
    content: str


def default_cache_directory() -> Path:
    """Where decoded pixels are kept unless told otherwise: the user's cache folder, closed to other users."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sfumato"


def cached_pixels(
    source: Source, *, size: tuple[int, int], channels: int, directory: Path, skip_unreadable: bool = False
) -> Cached:
    """Decode `source` to uint8 [N, H, W, C] under `directory`, or map what was decoded there before.

    The key is the source's fingerprint, the size and the channels, so a changed folder is decoded anew. What
    is there is always complete: it is written beside and renamed, and of two processes one wins.

    Raises `InputError` at the first image that cannot be read; with skip_unreadable such images are left out
    and listed. Raises `InputError` when the disk is full.
    """
    key = fingerprint([_LAYOUT, source.fingerprint, f"{size[0]}x{size[1]}x{channels}"])[:40]
    place = directory / key
    shape = (*size, channels)
    try:
        found = _load(place, source, shape)
        if (
            found is not None
            and (skip_unreadable or not found.skipped)
            and not _now_readable(place, source, shape)
        ):
            return found
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_abandoned(directory, key)
        partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(key), dir=directory))
        try:
            _build(partial, source, shape, skip_unreadable)
            if found is not None:
                shutil.rmtree(place, ignore_errors=True)
            _publish(partial, place, source, shape)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        built = _load(place, source, shape)
    except OSError as error:
        raise _cannot_write(directory, error) from None
    if built is None:
        raise InputError(
            f"'{directory}' lost the decoded images just written; {NO_BUDGET}; run the command again"
        )
    return built


def _build(partial: Path, source: Source, shape: tuple[int, ...], skip_unreadable: bool) -> None:
    count = len(source.records)
    needed = count * (shape[0] * shape[1] * shape[2] + 16)
    if needed > shutil.disk_usage(partial).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    index = {name: number for number, name in enumerate(source.label_names or ())}
    labels, groups, captions = np.full(count, -1), np.full(count, -1), []
    group_numbers: dict[str, int] = {}
    skipped: list[str] = []
    skipped_rows: list[int] = []
    done = content = 0
    with (
        warnings.catch_warnings(),
        Progress("reading images", total=100, unit="%") as progress,  # the count itself may be private
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
        open(partial / "images.u8", "wb") as stream,
    ):
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters becomes an error of ours
        for start, block in _blocks(source):
            decoded = pool.map(lambda item: _decode(item[0], item[1], shape), block)
            for row, ((record, _), pixels) in enumerate(zip(block, decoded, strict=True), start=start):
                if isinstance(pixels, UnreadableImage):
                    if not skip_unreadable:
                        raise _stop(source, pixels) from None
                    skipped.append(str(pixels))
                    skipped_rows.append(row)
                    continue
                stream.write(pixels[0])
                content = (content + pixels[1]) % _MODULUS
                labels[done] = -1 if record.label is None else index[record.label]
                if record.group is not None:
                    groups[done] = group_numbers.setdefault(record.group, len(group_numbers))
                captions.append(record.caption)
                done += 1
            progress.advance((start + len(block)) * 100 // count - progress.done)
        _sync(stream)
    if not done:
        problem = f"holds no image that can be read (first: {skipped[0]})" if skipped else "holds no images"
        raise InputError(f"'{printable(source.spec)}' {problem}; {NO_BUDGET}; give another collection")
    for name, values in (("labels.npy", labels[:done]), ("groups.npy", groups[:done])):
        with open(partial / name, "wb") as stream:
            np.save(stream, values.astype(np.int64), allow_pickle=False)
            _sync(stream)
    written = [caption or "" for caption in captions] if any(c is not None for c in captions) else None
    meta = {
        "layout": _LAYOUT, "shape": [done, *shape], "content": f"{content:064x}", "skipped": skipped,
        "skipped_rows": skipped_rows, "captions": written,
    }  # fmt: skip
    with open(partial / "meta.json", "wb") as stream:
        stream.write(json.dumps(meta).encode())
        _sync(stream)


def _blocks(
    source: Source,
) -> Iterator[tuple[int, list[tuple[Record, bytes | np.ndarray | UnreadableImage]]]]:
    """Records with their undecoded images, read in order, in blocks bounded by number and by bytes."""
    block: list[tuple[Record, bytes | np.ndarray | UnreadableImage]] = []
    start = held = 0
    for row, record in enumerate(source.records):
        try:
            raw = record.read()
            held += raw.nbytes if isinstance(raw, np.ndarray) else len(raw)
        except UnreadableImage as error:
            raw = error
        block.append((record, raw))
        if len(block) == _BLOCK_RECORDS or held > _BLOCK_BYTES:
            yield start, block
            block, start, held = [], row + 1, 0
    if block:
        yield start, block


def _decode(
    record: Record, raw: bytes | np.ndarray | UnreadableImage, shape: tuple[int, ...]
) -> tuple[bytes, int] | UnreadableImage:
    if isinstance(raw, UnreadableImage):
        return raw
    size, channels = (shape[0], shape[1]), shape[2]
    try:
        if isinstance(raw, np.ndarray):
            pixels = fit_array(raw, size=size, channels=channels, where=record.where)
            digest = hashlib.sha256(f"{raw.shape} {raw.dtype}".encode() + raw.tobytes())
        else:
            pixels = decode_image(raw, size=size, channels=channels, where=record.where)
            digest = hashlib.sha256(raw)
    except UnreadableImage as error:
        return error
    return pixels.tobytes(), int.from_bytes(digest.digest(), "big")


def _stop(source: Source, error: UnreadableImage) -> InputError:
    return InputError(
        f"{error} (in '{printable(source.spec)}'); {NO_BUDGET}; "
        "repair or remove it, or add --skip-unreadable to go on without such images"
    )


def _load(place: Path, source: Source, shape: tuple[int, ...]) -> Cached | None:
    """What is complete under `place`, or None; damaged leftovers are removed."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        full = tuple(meta["shape"])
        if full[1:] != shape or (place / "images.u8").stat().st_size != np.prod(full, dtype=np.int64):
            raise ValueError
        labels = np.load(place / "labels.npy", allow_pickle=False)
        groups = np.load(place / "groups.npy", allow_pickle=False)
        if labels.shape != full[:1] or groups.shape != full[:1]:
            raise ValueError
    except FileNotFoundError:
        if not place.exists():
            return None
        shutil.rmtree(place, ignore_errors=True)
        return None
    except (ValueError, KeyError, TypeError, EOFError):
        shutil.rmtree(place, ignore_errors=True)
        return None
    images = np.memmap(place / "images.u8", np.uint8, "r", shape=full)
    rows = np.delete(np.arange(len(source.records)), meta["skipped_rows"])
    return Cached(
        images, labels, source.label_names, groups, meta["captions"], meta["skipped"], rows, meta["content"]
    )


def _now_readable(place: Path, source: Source, shape: tuple[int, ...]) -> bool:
    """Whether an image that was left out can be read now: a permission given since leaves no other trace."""
    for row in json.loads((place / "meta.json").read_bytes())["skipped_rows"]:
        record = source.records[row]
        try:
            if not isinstance(_decode(record, record.read(), shape), UnreadableImage):
                return True
        except UnreadableImage:
            continue
    return False


def _publish(partial: Path, place: Path, source: Source, shape: tuple[int, ...]) -> None:
    try:
        os.rename(partial, place)
    except OSError:
        if _load(place, source, shape) is None:  # nobody else was faster: a real failure
            raise
    else:
        sync_directory(place.parent)


def _partial_prefix(key: str) -> str:
    return f".{key}.{socket.gethostname()}.{os.getpid()}."


def _remove_abandoned(directory: Path, key: str) -> None:
    """Remove what processes of this machine that are no longer alive left half-written."""
    host = socket.gethostname()
    for leftover in directory.glob(f".{key}.{host}.*"):
        pid = leftover.name.removeprefix(f".{key}.{host}.").split(".")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


def _cannot_write(directory: Path, error: OSError) -> InputError:
    elsewhere = ", or set XDG_CACHE_HOME to another folder," if directory == default_cache_directory() else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem, remedy = f"the disk under '{directory}' is full", "free some space there"
    else:
        problem = f"'{directory}' cannot hold the decoded images ({error.strerror or error})"
        remedy = "allow writing there"
    return InputError(f"{problem}; {NO_BUDGET}; {remedy}{elsewhere} and run the command again")


def sync_directory(path: Path) -> None:
    """Make renames inside a folder survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
