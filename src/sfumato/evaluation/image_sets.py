"""The image sets of an evaluation, brought to one size, one number of channels and one numbering of labels."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sfumato.data.decoding import FORMATS
from sfumato.data.images import OwnerArray, PublicImages
from sfumato.data.records import Record, Source, printable
from sfumato.data.release import folder_names
from sfumato.errors import InputError
from sfumato.progress import Progress

BLOCK = 4096
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N images as they are compared.

    images: uint8 [N, H, W, C]. labels: int64 [N], index into the real set's label names, -1 where there is
    none, or None for an unlabelled set. digests: bytes [N], equal for equal pixels. content: hexadecimal
    SHA-256 of shape, pixels and order.
    """

    description: str
    images: np.ndarray
    labels: np.ndarray | None
    digests: np.ndarray
    content: str

    def __len__(self) -> int:
        return len(self.images)


def image_set(opened: PublicImages, label_names: Sequence[str] | None, option: str) -> ImageSet:
    """The opened images with labels numbered as in `label_names` (None: labels are not used).

    option: what the user calls this set, for errors. A set opened as `OwnerImages` stays an `OwnerArray`.
    """
    labels = None
    if label_names is not None and opened.label_names is not None:
        position = label_positions(opened.label_names, label_names, option)
        own = np.asarray(opened.labels)
        labels = np.where(own >= 0, position[own], -1)
        labels = labels.view(OwnerArray) if isinstance(opened.labels, OwnerArray) else labels
    digests = pixel_digests(np.asarray(opened.images), f"checking {option}")
    content = hashlib.sha256(f"{opened.images.shape} {opened.images.dtype}".encode() + digests.tobytes())
    return ImageSet(opened.description, opened.images, labels, digests, content.hexdigest())


def label_positions(names: Sequence[str], wanted: Sequence[str], option: str) -> np.ndarray:
    """For each of `names` its index in `wanted`; int64.

    A release's class folders may be spelled otherwise than the labels ("T-shirt_top", "label_0003"): names
    that are not in `wanted` are looked up among the spellings that a release gives to `wanted`.

    Raises:
        InputError: a name that `wanted` lacks.
    """
    index = {name: number for number, name in enumerate(wanted)}
    if not set(names) <= set(wanted):
        as_folders = {folder: number for number, folder in enumerate(folder_names(list(wanted)))}
        if set(names) <= set(as_folders):
            index = as_folders
    unknown = [printable(name) for name in names if name not in index]
    if unknown:
        raise InputError(
            f"{option} has labels that the real images lack: {', '.join(unknown[:10])}{', …' if unknown[10:] else ''} "
            f"(they have {', '.join(printable(name) for name in wanted[:10])}{', …' if wanted[10:] else ''}); nothing "
            "was measured. Give sets with the same labels, or the real images without labels"
        )
    return np.array([index[name] for name in names], np.int64)


def common_shape(
    source: Source, option: str, *, size: int | None, channels: int | None
) -> tuple[int, int, int]:
    """(height, width, channels) that images are compared with: as given, else what all of them have.

    Raises:
        InputError: what is not given differs among them, or no image can be read.
    """
    if size is not None and channels is not None:
        return size, size, channels
    found: dict[tuple[int, int, int], str] = {}
    with Progress("reading sizes", total=len(source.records), unit="images") as progress:
        for record in source.records:
            if (own := _shape(record)) is not None:
                height, width = own[:2] if size is None else (size, size)
                found.setdefault((height, width, own[2] if channels is None else channels), record.where)
            if len(found) > 1:
                (first, one), (second, other) = found.items()
                what = "--size" if first[:2] != second[:2] else "--channels"
                raise InputError(
                    f"{option}: its images differ, '{one}' is {in_words(first)} and '{other}' is {in_words(second)}; "
                    f"nothing was measured. Say with {what} how they are to be compared"
                )
            progress.advance()
    if not found:
        raise InputError(f"{option}: no image in it can be read; nothing was measured. Give another set")
    return next(iter(found))


def first_shape(source: Source) -> tuple[int, int, int] | None:
    """(height, width, channels) of the first image, or None when it cannot be read."""
    return _shape(source.records[0]) if len(source.records) else None


def in_words(shape: tuple[int, int, int]) -> str:
    """`28 x 28 grey`."""
    return f"{shape[0]} x {shape[1]} {'grey' if shape[2] == 1 else 'RGB'}"


def pixel_digests(images: np.ndarray, description: str) -> np.ndarray:
    """16 bytes for each image [N, H, W, C], equal for equal pixels: void array [N]."""
    digests = np.empty(len(images), "V16")
    with Progress(description, total=len(images), unit="images") as progress:
        for start in range(0, len(images), BLOCK):
            block = np.ascontiguousarray(images[start : start + BLOCK])
            for offset, image in enumerate(block):
                digests[start + offset] = np.void(hashlib.blake2b(image, digest_size=16).digest())
            progress.advance(len(block))
    return digests


def copies(of: ImageSet, among: ImageSet) -> int:
    """How many images of one set are, pixel by pixel, an image of the other."""
    return int(np.isin(of.digests, among.digests).sum())


def same_images(a: ImageSet, b: ImageSet) -> bool:
    """Whether two sets hold the same images, in whatever order."""
    return len(a) == len(b) and bool((np.sort(a.digests) == np.sort(b.digests)).all())


def _shape(record: Record) -> tuple[int, int, int] | None:
    """(height, width, channels) from an array or a file's header; None when it is no image."""
    try:
        raw = record.read()
        if isinstance(raw, np.ndarray):
            return int(raw.shape[0]), int(raw.shape[1]), 1 if raw.ndim == 2 or raw.shape[2] == 1 else 3
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS:
                width, height = height, width
            grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
            return height, width, 1 if grey else 3
    except MemoryError:
        raise
    except Exception:  # damaged files are told by the decoder, with their name and what to do
        return None
