"""Features of a whole image set on disk: computed once, streamed, resumed after a crash, then memory-mapped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from sfumato.data.cache import sync_directory
from sfumato.data.files import write_whole
from sfumato.encoders.encoder import Encoder, NotFinite, marked_like
from sfumato.errors import InputError
from sfumato.progress import Progress

FEATURES_FILE = "features.f32"
ABOUT_FILE = "about.json"
_SAVE_EVERY = 16_000_000  # bytes of features between two records of how far the work has come
_KEPT = "no budget was spent and what was computed is kept"


def cached_features(
    images: Any, encoder: Encoder, *, directory: Path, content: str, description: str, batch: int = 256
) -> np.ndarray:
    """Features of `images`, read-only float32 [N, D] mapped from `directory/<encoder>/<content[:16]>/`.

    images: uint8 [N, H, W, C], an array, a memory map, or anything that has a length and gives arrays for slices.
    Read `batch` at a time: memory does not grow with N. content: a hexadecimal digest that names the set.
    description: whose features they are, for the progress bar.

    Work that was stopped, at whatever moment, goes on after the last rows known to be on disk. The folder holds
    `features.f32` (row-major) and `about.json` (encoder, identity, content, rows, dimension, a digest of the very
    pixels in their order, and how many rows are done); complete when done equals rows.

    Features of private images (`OwnerArray`) are one themselves: no release accepts them, and `directory` has to
    lie under `internal/`. They carry no guarantee whatsoever.

    Raises `InputError` when the folder was filled by another encoder or from other images, by another process at
    this moment, when it cannot be written, or when a feature is not finite.
    """
    rows = len(images)
    if not rows:
        raise InputError(f"{description}: there are no images; no budget was spent; give at least one")
    place = Path(directory) / encoder.name / content[:16]
    about = {
        "encoder": encoder.name, "identity": encoder.identity, "content": content, "rows": rows,
        "pixels": _pixels(images, batch),
    }  # fmt: skip
    try:
        done, dimension = _found(place, about)
        if done < rows:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(place / ".lock", timeout=0):
                dimension = _computed(images, encoder, place, about, description, batch)
    except Timeout:
        raise InputError(
            f"another process is computing '{place}' at this moment; no budget was spent; wait for it and run the "
            "command again"
        ) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "the disk is full" if full else str(error.strerror or error)
        remedy = "free some space" if full else "allow writing there"
        raise InputError(
            f"features cannot be kept under '{place}': {problem}; {_KEPT}; {remedy} and run the command again"
        ) from None
    features = np.memmap(place / FEATURES_FILE, np.float32, "r", shape=(rows, dimension))
    return marked_like(images[:1], features)


def _computed(
    images: Any, encoder: Encoder, place: Path, about: dict[str, Any], description: str, batch: int
) -> int:
    """Bring the folder to all rows and return the dimension."""
    rows = about["rows"]
    done, dimension = _found(place, about)
    with (  # percent, since the number of images may be private
        Progress(f"{description}: {encoder.name}", total=100, unit="%") as progress,
        open(place / FEATURES_FILE, "r+b" if done else "wb") as stream,
    ):
        stream.seek(done * dimension * 4)
        unsaved = 0
        progress.advance(done * 100 // rows)
        while done < rows:
            values = _encoded(encoder, images[done : done + batch], done, dimension)
            if not dimension:
                dimension = values.shape[1]
                if rows * dimension * 4 > shutil.disk_usage(place).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            stream.write(values.tobytes())
            done += len(values)
            unsaved += values.nbytes
            if unsaved >= _SAVE_EVERY or done == rows:
                stream.truncate()
                stream.flush()
                os.fsync(stream.fileno())
                _record(place, {**about, "dimension": dimension, "done": done})
                unsaved = 0
            progress.advance(done * 100 // rows - progress.done)
    return dimension


def _encoded(encoder: Encoder, images: np.ndarray, first: int, dimension: int) -> np.ndarray:
    try:
        values = np.asarray(encoder(images), np.float32)
    except NotFinite as error:
        raise NotFinite(encoder.name, first + error.row) from None
    if values.ndim != 2 or len(values) != len(images) or (dimension and values.shape[1] != dimension):
        raise InputError(
            f"encoder '{encoder.name}' gives {values.shape} for {len(images)} images; no budget was spent; "
            "use one that gives every image one vector of one length"
        )
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise NotFinite(encoder.name, first + int(np.argmin(finite)))
    return values


def _found(place: Path, about: dict[str, Any]) -> tuple[int, int]:
    """(rows on disk, dimension) of what earlier runs left; (0, 0) when there is nothing."""
    record, data = place / ABOUT_FILE, place / FEATURES_FILE
    if not record.exists():
        return 0, 0
    try:
        found = json.loads(record.read_bytes())
        done, dimension = int(found["done"]), int(found["dimension"])
        size = data.stat().st_size if data.exists() else 0
        whole = 0 < done <= found["rows"] and dimension > 0 and size >= done * dimension * 4
        differs = {key for key in about if found[key] != about[key]} if whole else set()
    except (ValueError, KeyError, TypeError):
        whole, differs, done, dimension = False, set(), 0, 0
    if whole and not differs:
        return done, dimension
    problem = "is damaged"
    if "identity" in differs:
        problem = f"was made by another '{about['encoder']}' (other weights, preprocessing or version)"
    elif differs:
        problem = "holds features of other images (their number, size, order or pixels differ)"
    raise InputError(
        f"the feature cache '{place}' {problem}; no budget was spent; delete that folder or choose another --out"
    )


def _record(place: Path, about: dict[str, Any]) -> None:
    """Replace about.json in one step, after the rows it counts are on disk."""
    write_whole(place / ABOUT_FILE, json.dumps(about, indent=2).encode())
    sync_directory(place)


def _pixels(images: Any, batch: int) -> str:
    """SHA-256 of all pixels in their order, with their shape; a small part of what encoding them costs."""
    digest = hashlib.sha256(f"{len(images)} {np.shape(images[:1])[1:]}".encode())
    for start in range(0, len(images), batch):
        digest.update(np.ascontiguousarray(images[start : start + batch]).reshape(-1).data)
    return digest.hexdigest()
