"""Planted duplicates are found, distinct handwritten digits are not merged; groups, counts, embeddings, bad input."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.audit.duplicates import Groups, duplicate_groups
from sfumato.audit.similarity import FLIPS, FeatureExtractor, open_extractor
from sfumato.data.images import OwnerImages
from sfumato.errors import InputError


@pytest.fixture(scope="module", params=[14, 16])
def digits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Training and held-out digits at a small size, where distinct ones are most alike."""
    cache = tmp_path_factory.mktemp("cache")
    opened = [
        OwnerImages(name, size=request.param, channels=1, cache_dir=cache)
        for name in ("demo:digits", "demo:digits-holdout")
    ]
    order = np.random.default_rng(0).permutation(4000)  # they come sorted by digit
    return np.asarray(opened[0].images)[order], np.asarray(opened[1].images)[order[order < 1000]]


def smooth(count: int, seed: int, size: int = 24, channels: int = 3) -> np.ndarray:
    small = np.random.default_rng(seed).integers(30, 226, (count, 4, 4, channels), dtype=np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(x.squeeze()).resize((size, size), Image.Resampling.BILINEAR))
            for x in small
        ]
    )


def jpeg(image: np.ndarray) -> np.ndarray:
    held = io.BytesIO()
    Image.fromarray(image.squeeze()).save(held, "JPEG", quality=85)
    return np.asarray(Image.open(held)).reshape(image.shape)


def brighter(image: np.ndarray) -> np.ndarray:
    return np.clip(np.asarray(image, int) + 3, 0, 255).astype(np.uint8)


CHANGES = {
    "same": lambda x: x,
    "flipped": lambda x: x[:, ::-1],
    "jpeg": jpeg,
    "brighter": brighter,
    "flipped and brighter": lambda x: brighter(x[:, ::-1]),
    "contrast": lambda x: np.clip(np.asarray(x, float) * 0.98, 0, 255).astype(np.uint8),
}


def test_practically_no_distinct_digits_are_merged(digits):
    """Of 5,000 handwritten digits, no two of which are copies; at most one in a thousand lies in a group of more
    than one, and no chain forms."""
    train, holdout = digits
    groups = duplicate_groups(train, holdout)
    counts = groups.counts
    assert counts["train_images"] == 4000 and counts["holdout_images"] == 1000
    assert counts["train_groups"] >= 3995 and counts["holdout_groups"] >= 999
    assert counts["overlapping"] <= 1 and counts["exact"] == 0 and counts["largest"] <= 3


@pytest.mark.parametrize("change", CHANGES)
def test_planted_duplicates_of_digits_are_found(digits, change: str):
    train, holdout = (np.array(each[:600]) for each in digits)
    holdout[:100] = [CHANGES[change](image) for image in train[300:400]]
    train[:50] = [CHANGES[change](image) for image in train[500:550]]
    groups = duplicate_groups(train, holdout)
    assert np.array_equal(groups.holdout[:100], groups.train[300:400])
    assert np.array_equal(groups.train[:50], groups.train[500:550])
    assert groups.overlapping.tolist() == [True] * 100 + [False] * 500
    assert groups.counts["train_groups"] == 550 and groups.counts["overlapping"] == 100
    assert (groups.counts["exact"] == 150) == (change in ("same", "flipped"))


@pytest.mark.parametrize("channels", [1, 3])
def test_groups_by_hand(channels: int):
    pictures = smooth(5, 0, channels=channels).reshape(5, 24, 24, channels)
    a, b, c, d, e = pictures
    train = np.stack([c, a, b, a, jpeg(a), a[:, ::-1], brighter(c)])
    holdout = np.stack([d, jpeg(b[:, ::-1]), e, d])
    groups = duplicate_groups(train, holdout)
    assert groups.train.tolist() == [0, 1, 2, 1, 1, 1, 0]
    assert groups.holdout.tolist() == [3, 2, 4, 3]
    assert groups.overlapping.tolist() == [False, True, False, False]
    assert groups.counts == {
        "train_images": 7, "train_groups": 3, "holdout_images": 4, "holdout_groups": 3, "overlapping": 1,
        "exact": 3, "largest": 4,
    }  # fmt: skip
    assert groups.train.dtype == groups.holdout.dtype == np.int64 and groups.overlapping.dtype == bool


def test_a_hundred_near_copies_are_one_group():
    """Each a little different; pairs far apart in the list meet too."""
    rng = np.random.default_rng(0)
    pictures = smooth(40, 1)
    copies = np.clip(pictures[7] + rng.normal(0, 3, (100, 24, 24, 3)), 0, 255).astype(np.uint8)
    train = np.concatenate([copies[:50], pictures, copies[50:]])
    groups = duplicate_groups(train, smooth(10, 2))
    expected = groups.train[57]
    assert (groups.train == expected).sum() == 101 and groups.counts["train_groups"] == 40


def test_what_varies_little_is_not_one_picture():
    """Faint pictures on one background: every pair is within 8 of 255, and they are distinct all the same."""
    rng = np.random.default_rng(0)
    marks = rng.normal(0, 1, (60, 4, 4, 1)).repeat(6, axis=1).repeat(6, axis=2)
    faint = np.clip(120 + 3 * marks, 0, 255).round().astype(np.uint8)
    faint[5], faint[6] = faint[4], faint[4][:, ::-1]
    groups = duplicate_groups(faint[:40], faint[40:])
    assert groups.counts["train_groups"] == 38 and groups.counts["overlapping"] == 0


def test_one_pixel_of_difference_is_the_same_picture_and_another_drawing_is_not():
    picture = smooth(30, 3, channels=1).reshape(30, 24, 24, 1)
    touched, drawn = picture[0].copy(), picture[0].copy()
    touched[3, 3] += 20
    drawn[8:16, 8:16] = 255 - drawn[8:16, 8:16]
    groups = duplicate_groups(picture, np.stack([touched, drawn]))
    assert groups.holdout[0] == groups.train[0] and groups.overlapping.tolist() == [True, False]


def test_blank_images_are_one_group_and_images_of_one_picture_too():
    blank = np.full((6, 16, 16, 1), 255, np.uint8)
    groups = duplicate_groups(blank[:4], blank[4:])
    assert groups.train.tolist() == [0] * 4 and groups.overlapping.all() and groups.counts["largest"] == 6


def test_swapping_the_sets_swaps_the_answer(digits):
    train, holdout = (np.array(each[:300]) for each in digits)
    holdout[:20] = [jpeg(image) for image in train[:20]]
    one, other = duplicate_groups(train, holdout), duplicate_groups(holdout, train)

    def partition(groups: Groups, swapped: bool) -> list[list[int]]:
        both = [groups.holdout, groups.train] if swapped else [groups.train, groups.holdout]
        numbers = np.concatenate(both)
        return sorted(np.flatnonzero(numbers == number).tolist() for number in np.unique(numbers))

    assert partition(one, False) == partition(other, True)


@pytest.mark.parametrize("metric", ["cosine", "hamming", "tiles"])
def test_the_graph_can_be_that_of_another_extractor(metric: str):
    """An encoder that does not mind shifts finds shifted duplicates, which pixels do not."""
    rng = np.random.default_rng(0)
    big = smooth(80, 4, 32) if metric != "hamming" else rng.integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
    train, holdout = big[:60, 4:-4, 4:-4], np.concatenate([big[60:, 4:-4, 4:-4], big[:5, 5:-3, 3:-5]])
    assert not duplicate_groups(train, holdout).overlapping.any()

    def spectrum(images: np.ndarray) -> np.ndarray:
        return (
            np.log1p(np.stack([np.sort(x.reshape(-1, 3), axis=0)[::8].ravel() for x in images.astype(float)]))
            - 4.8
        )

    if metric == "cosine":
        extractors = (FeatureExtractor("s", "", "", "cosine", FLIPS, spectrum),)
        assert duplicate_groups(train, holdout, extractors).overlapping.tolist() == [False] * 20 + [True] * 5
        return
    extractors = (open_extractor({"hamming": "phash", "tiles": "tiles"}[metric]),)
    near = np.concatenate([holdout[:20], [brighter(image[:, ::-1]) for image in train[:5]]])
    assert duplicate_groups(train, near, extractors).overlapping.tolist() == [False] * 20 + [True] * 5


@pytest.mark.parametrize(
    ("train", "holdout", "match"),
    [
        (smooth(1, 0)[:0], smooth(2, 0), "train: there are no images"),
        (smooth(2, 0), smooth(2, 0)[:0], "holdout: there are no images"),
        (smooth(2, 0), smooth(2, 0, 20), r"train \[24, 24, 3\], holdout \[20, 20, 3\]"),
        (smooth(2, 0) / 255, smooth(2, 0), "no images"),
    ],
)
def test_what_cannot_be_compared_is_one_line(train, holdout, match):
    with pytest.raises(InputError, match=match) as caught:
        duplicate_groups(train, holdout)
    assert "nothing was audited" in str(caught.value) and "\n" not in str(caught.value)


def test_memory_mapped_images_are_read_in_place(tmp_path: Path):
    images = smooth(30, 5)
    np.save(tmp_path / "a.npy", images)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert np.array_equal(duplicate_groups(mapped, images).holdout, np.arange(30))
