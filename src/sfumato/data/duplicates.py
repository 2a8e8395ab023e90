"""Which of the owner's images lie, almost unchanged, among the public ones too: for the owner's eyes only.

Public images are not protected. A private image that is also among them shows in a release made from them,
whatever epsilon says, so the owner should know of it; nobody else may.
"""

from __future__ import annotations

import numpy as np

from sfumato.data.images import OwnerOnly, PublicImages
from sfumato.errors import InputError

THUMBNAIL = 8  # pixels a side
SAME_THUMBNAIL, SAME_PIXELS = 4.0, 8.0  # root mean square differences, of 255: about those of a re-saved JPEG
_AT_ONCE = 4096


def near_duplicates(own: PublicImages, public: PublicImages) -> OwnerOnly[np.ndarray]:
    """The public image that each of the owner's images almost equals: int64 [N], -1 where there is none.

    Finds copies, re-encodings and small changes of brightness; not crops, turns or reflections. Both
    collections must have been opened at one size. No guarantee: the answer is for `internal/` only.
    """
    if (own.size, own.channels) != (public.size, public.channels):
        raise InputError(
            "images of different sizes cannot be compared; no budget was spent. Open both at one size"
        )
    found = np.full(len(own), -1)
    theirs = thumbnails(public.images)
    squared = (theirs**2).sum(axis=1)
    for start in range(0, len(own), _AT_ONCE):
        images = np.asarray(own.images[start : start + _AT_ONCE])
        mine = thumbnails(images)
        best = np.full(len(mine), np.inf)
        nearest = np.zeros(len(mine), dtype=np.int64)
        for first in range(0, len(theirs), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            apart = squared[some] - 2 * mine @ theirs[some].T
            closest = apart.argmin(axis=1)
            least = apart[np.arange(len(mine)), closest]
            nearest = np.where(least < best, closest + first, nearest)
            best = np.minimum(best, least)
        best += (mine**2).sum(axis=1)
        for row in np.flatnonzero(best <= SAME_THUMBNAIL**2 * mine.shape[1] + 1):  # + 1: float32 differences
            gap = images[row].astype(float) - public.images[nearest[row]]
            if np.sqrt((gap**2).mean()) <= SAME_PIXELS:
                found[start + row] = nearest[row]
    return OwnerOnly(found)


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Block means of uint8 [N, H, W, C], centred: float32 [N, at most 8 * 8 * C]."""
    parts = []
    for start in range(0, len(images), _AT_ONCE):
        block = np.asarray(images[start : start + _AT_ONCE], dtype=np.float32)
        for axis in (1, 2):
            side = block.shape[axis]
            edges = np.linspace(0, side, min(THUMBNAIL, side) + 1).astype(int)
            shape = [-1 if each == axis else 1 for each in range(4)]
            block = np.add.reduceat(block, edges[:-1], axis=axis) / np.diff(edges).reshape(shape)
        parts.append(block.reshape(len(block), -1).astype(np.float32) - 127.5)
    return np.concatenate(parts)
