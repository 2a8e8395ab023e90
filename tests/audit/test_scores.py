"""AMS and UMS: by hand, cumulative and banded, by duplicate group, their curve over N, bad input."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.audit.scores import ams, banded, saturation, ums
from sfumato.errors import InputError

# Six generated images: best similarity, best training image; training images 0 and 1 are duplicates.
SIMILARITY = np.array([0.9, 0.8, 0.8, 0.5, 0.5, 0.1], np.float32)
INDEX = np.array([0, 1, 2, 2, 3, 0])
GROUPS = np.array([7, 7, 4, 9])


def test_by_hand():
    assert ams(SIMILARITY, 0.5) == 5 / 6
    assert ams(SIMILARITY, 0.95) == 0
    assert ums(INDEX, SIMILARITY, GROUPS, 0.5) == 3 / 6  # groups 7, 4, 9
    assert ums(INDEX, SIMILARITY, GROUPS, np.float32(0.8)) == 2 / 6  # 0 and 1 are one


def test_the_threshold_itself_is_a_match():
    assert ams(SIMILARITY, float(SIMILARITY[0])) == 1 / 6
    assert ums(INDEX, SIMILARITY, GROUPS, float(SIMILARITY[0])) == 1 / 6


def test_bands_are_exclusive():
    bands = [(0.0, 0.5), (0.5, 0.85), (0.85, 1.0)]
    found = banded(SIMILARITY, INDEX, GROUPS, bands)
    assert [row["ams"] for row in found] == [1 / 6, 4 / 6, 1 / 6]
    assert [row["ums"] for row in found] == [1 / 6, 3 / 6, 1 / 6]
    assert [(row["low"], row["high"]) for row in found] == bands
    assert sum(row["ams"] for row in found) == pytest.approx(1)
    # Group 7 is matched in all three, so their UMS add up to more than the cumulative one.
    assert sum(row["ums"] for row in found) > ums(INDEX, SIMILARITY, GROUPS, 0)


def test_one_picture_repeated():
    """AMS 1, UMS 1/N."""
    same = np.zeros(50, np.int64)
    assert ams(np.ones(50), 1) == 1
    assert ums(same, np.ones(50), np.arange(3), 1) == 1 / 50


def test_the_curve():
    index, similarity = np.array([0, 0, 1, 1, 0, 1, 0, 1]), np.array([1, 1, 1, 0, 0, 0, 0, 0.0])
    found = saturation(similarity, index, np.arange(2), 0.5, points=4)
    assert [row["num_images"] for row in found] == [2, 4, 6, 8]
    assert [row["ams"] for row in found] == [1, 3 / 4, 3 / 6, 3 / 8]
    assert [row["ums"] for row in found] == [1 / 2, 2 / 4, 2 / 6, 2 / 8]
    assert found[-1]["ams"] == ams(similarity, 0.5)


def test_the_curve_of_fewer_images_than_points():
    found = saturation(np.ones(3), np.arange(3), np.arange(3), 0.5)
    assert [row["num_images"] for row in found] == [1, 2, 3]


def nearest(queries, references):
    squares = ((queries[:, None] - references) ** 2).sum(-1)
    return -np.sqrt(squares.min(axis=1)), squares.argmin(axis=1)


@pytest.mark.parametrize("times", [2, 5])
def test_duplicated_training_images_leave_the_grouped_score_as_it_was(times):
    """Specification, section 4: every training image five times, grouped UMS unchanged; files would count more."""
    rng = np.random.default_rng(0)
    train = rng.normal(size=(40, 6))
    generated = train[rng.integers(0, 40, 300)] + 0.01 * rng.normal(size=(300, 6))
    similarity, index = nearest(generated, train)
    before = ums(index, similarity, np.arange(40), -0.2)
    copies = np.repeat(train, times, axis=0) + 1e-4 * rng.normal(size=(40 * times, 6))
    order = rng.permutation(len(copies))
    similarity, index = nearest(generated, copies[order])
    assert ums(index, similarity, np.repeat(np.arange(40), times)[order], -0.2) == before == 40 / 300
    assert ums(index, similarity, np.arange(len(copies)), -0.2) > 1.5 * before


def test_a_memoriser_and_a_fresh_generator():
    rng = np.random.default_rng(1)
    train = rng.normal(size=(100, 6))
    similarity, _ = nearest(train[rng.integers(0, 100, 200)] + 0.01 * rng.normal(size=(200, 6)), train)
    assert ams(similarity, -0.2) == 1
    assert ams(nearest(rng.normal(size=(200, 6)), train)[0], -0.2) == 0


def test_bad_input():
    none, groups = np.zeros(0), np.arange(3)
    for call in (
        lambda: ams(none, 0.5),
        lambda: ums(none.astype(int), none, groups, 0.5),
        lambda: banded(none, none.astype(int), groups, [(0, 1)]),
        lambda: saturation(none, none.astype(int), groups, 0.5),
    ):
        with pytest.raises(InputError, match="no generated image"):
            call()
    with pytest.raises(InputError, match="not a number"):
        ams(np.array([0.5, np.nan]), 0.5)
    for outside in (-1, 3):
        with pytest.raises(InputError, match="outside the 3 training images"):
            ums(np.array([outside]), np.ones(1), groups, 0.5)
    with pytest.raises(InputError, match="different images"):
        ums(np.array([0, 1]), np.ones(1), groups, 0.5)
    with pytest.raises(InputError, match="is empty"):
        banded(SIMILARITY, INDEX, GROUPS, [(0.5, 0.5)])
    with pytest.raises(InputError, match="0 points"):
        saturation(SIMILARITY, INDEX, GROUPS, 0.5, points=0)
