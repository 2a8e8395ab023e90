"""Crafted canaries: full contrast, unlike each other and unlike the data."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.audit.canary_patterns import LEAST_DISTANCE, draw_patterns
from sfumato.data.digits import load_digits
from sfumato.errors import InputError


def apart(a, b):
    a, b = (x.reshape(len(x), -1) / 255 for x in (a, b))
    return np.sqrt(((a[:, None] - b[None]) ** 2).mean(2))


@pytest.mark.parametrize("shape", [(28, 28, 1), (16, 24, 3)])
def test_patterns_are_unlike_each_other_mirrored_or_not_and_unlike_the_data(shape):
    images = load_digits()[0][:200] if shape[2] == 1 else np.full((5, *shape), 128, np.uint8)
    drawn = draw_patterns(120, images, np.random.default_rng(0))
    assert drawn.shape == (120, *shape) and drawn.dtype == np.uint8
    for other in (drawn, drawn[:, :, ::-1]):
        gaps = apart(drawn, other)
        np.fill_diagonal(gaps, 1)
        assert gaps.min() >= LEAST_DISTANCE
        assert apart(other, images).min() >= LEAST_DISTANCE
    assert (np.abs(drawn.astype(int) - 127) > 100).mean() > 0.5  # most of it is nearly black or white


def test_one_that_comes_near_an_image_is_drawn_again():
    first = draw_patterns(10, np.zeros((1, 12, 12, 1), np.uint8), np.random.default_rng(3))
    again = draw_patterns(10, first[:4, :, ::-1], np.random.default_rng(3))
    np.testing.assert_array_equal(again[:6], first[4:])


def test_too_small_images_are_refused():
    with pytest.raises(InputError, match=r"--count 300: .*nothing was planted"):
        draw_patterns(300, np.zeros((4, 2, 2, 1), np.uint8), np.random.default_rng(0))
