"""The style score counts nearest neighbours among equally many images of each style."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.evaluation.style import style_score


def blobs(count, where, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 8)) * 0.1 + np.eye(8)[where] * 3


OTHERS = np.concatenate([blobs(40, 1, 1), blobs(90, 2, 2)])
WHICH = np.repeat([0, 1], [40, 90])


def test_images_of_the_style_score_one_and_of_another_zero():
    same = blobs(50, 0, 3)
    good = style_score(blobs(30, 0, 4), same, OTHERS, WHICH)
    bad = style_score(blobs(30, 2, 5), same, OTHERS, WHICH)
    assert (good.value, bad.value) == (1.0, 0.0)
    assert good.low > 0.85 and good.high == 1.0 and bad.high < 0.15
    assert good.chance == pytest.approx(1 / 3)


def test_images_without_style_score_chance_however_large_the_sets():
    rng = np.random.default_rng(0)
    shapeless = rng.normal(size=(3000, 8))
    others, which = rng.normal(size=(1300, 8)), np.repeat([0, 1], [1000, 300])
    score = style_score(shapeless, rng.normal(size=(500, 8)), others, which)
    assert abs(score.value - 1 / 3) < 0.06  # one draw of 900 neighbours moves it, not the sets' sizes


def test_the_interval_is_clopper_pearson():
    mixed = np.concatenate([blobs(3, 0, 6), blobs(7, 2, 7)])
    score = style_score(mixed, blobs(50, 0, 3), OTHERS, WHICH)
    assert (score.value, round(score.low, 4), round(score.high, 4)) == (0.3, 0.0667, 0.6525)


@pytest.mark.parametrize(
    "broken", [np.full((5, 8), np.nan), np.zeros((5, 8)), np.ones((5, 3)), np.ones((0, 8))]
)
def test_unusable_features_are_refused(broken):
    with np.errstate(all="ignore"), pytest.raises(InputError):
        style_score(broken, blobs(50, 0, 3), OTHERS, WHICH)
