"""Private images that lie among the public ones are found, and told to nobody but the owner."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data.duplicates import near_duplicates
from sfumato.data.images import OwnerImages, OwnerOnly, PublicImages
from sfumato.data.release import ReleaseWriter
from sfumato.errors import InputError


def smooth(seed: int, count: int, channels: int = 3) -> np.ndarray:
    """Random soft pictures, uint8 [count, 24, 20, channels]."""
    small = np.random.default_rng(seed).integers(40, 216, (count, 3, 3, channels), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((20, 24), Image.Resampling.BILINEAR)) for image in small]
    )


def jpeg(image: np.ndarray) -> np.ndarray:
    held = io.BytesIO()
    Image.fromarray(image).save(held, "JPEG", quality=85)
    return np.asarray(Image.open(held))


def opened(kind: type, path: Path, images: np.ndarray, cache: Path):
    np.savez(path, images=images)
    return kind(path, size=(24, 20), channels=images.shape[3], cache_dir=cache)


def test_copies_are_found_and_nothing_else(tmp_path: Path):
    private, public = smooth(1, 5000), smooth(2, 4500)
    public[4400], public[7], public[11] = private[3], jpeg(private[4999]), private[8][:, ::-1]
    public[20] = np.clip(private[9].astype(int) + 3, 0, 255)
    found = near_duplicates(
        opened(OwnerImages, tmp_path / "a.npz", private, tmp_path),
        opened(PublicImages, tmp_path / "b.npz", public, tmp_path),
    )
    assert isinstance(found, OwnerOnly)
    expected = {3: 4400, 4999: 7, 9: 20}
    assert {int(row): int(found.value[row]) for row in np.flatnonzero(found.value >= 0)} == expected
    assert found.value.shape == (5000,) and found.value.dtype == np.int64


def test_pictures_that_agree_only_when_small_are_not_the_same(tmp_path: Path):
    private = np.full((1, 24, 20, 1), 128, np.uint8)
    board = private.copy()
    board[0, ::2, ::2], board[0, 1::2, ::2] = 108, 148
    board[0, ::2, 1::2], board[0, 1::2, 1::2] = 148, 108
    found = near_duplicates(
        opened(OwnerImages, tmp_path / "a.npz", private, tmp_path),
        opened(PublicImages, tmp_path / "b.npz", board, tmp_path),
    )
    assert found.value.tolist() == [-1]


def test_the_answer_stays_with_the_owner(tmp_path: Path):
    images = smooth(3, 4)
    found = near_duplicates(
        opened(OwnerImages, tmp_path / "a.npz", images, tmp_path),
        opened(PublicImages, tmp_path / "b.npz", images, tmp_path),
    )
    assert found.value.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="nothing was released"):
        ReleaseWriter(tmp_path / "out").json("duplicates.json", {"found": found})


def test_other_sizes_cannot_be_compared(tmp_path: Path):
    own = opened(OwnerImages, tmp_path / "a.npz", smooth(1, 2), tmp_path)
    public = PublicImages(tmp_path / "a.npz", size=8, channels=3, cache_dir=tmp_path)
    with pytest.raises(InputError, match="one size"):
        near_duplicates(own, public)
