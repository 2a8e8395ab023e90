"""The blind baseline: about a half on fair splits, far from it on biased ones."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sfumato.audit import blind as module
from sfumato.audit.blind import blind_baseline
from sfumato.data.digits import load_digits
from sfumato.errors import InputError


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits()
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], labels[order]


def test_the_blind_baseline_covers_a_half_on_fair_splits(digits):
    images, _ = digits
    covered, areas = 0, []
    for seed in range(40):
        rows = np.random.default_rng(seed).permutation(len(images))[:200]
        found = blind_baseline(images[rows[:100]], images[rows[100:]], seed)
        covered += found.ci[0] <= 0.5 <= found.ci[1]
        areas.append(found.auc)
    assert (
        covered >= 34 and abs(np.mean(areas) - 0.5) < 0.03
    )  # binomial: fewer than 34 of 40 in 0.4 % of runs


def test_the_blind_baseline_sees_a_biased_split(digits):
    images, _ = digits
    brighter = np.clip(images[200:400].astype(int) + 8, 0, 255).astype(np.uint8)
    shifted = np.roll(images[200:400], 2, axis=1)
    for other in (brighter, shifted):
        found = blind_baseline(images[:200], other)
        assert found.auc > 0.8 and found.ci[0] > 0.65 and found.images == 200


def test_copies_do_not_pass_for_a_bias(digits):
    images, _ = digits
    train = np.concatenate([images[:60]] * 5 + [images[60:120]])
    found = blind_baseline(train, images[200:320])
    assert found.images == 120 and found.ci[0] <= 0.5 <= found.ci[1]
    rows = np.arange(120) // 2
    assert blind_baseline(images[:120], images[200:320], groups=rows).images == 60


def test_the_blind_baseline_refuses_too_few_and_other_sizes(digits):
    images, _ = digits
    with pytest.raises(InputError, match="Give a larger --holdout"):
        blind_baseline(images[:100], images[100:140])
    with pytest.raises(InputError, match="Use --size"):
        blind_baseline(images[:100], images[100:200, :14])


def test_areas_of_columns_equal_the_plain_ones():
    rng = np.random.default_rng(4)
    scores, positive = rng.integers(0, 9, (50, 3)).astype(float), rng.random((50, 3)) < 0.4
    expected = [roc_auc_score(positive[:, k], scores[:, k]) for k in range(3)]
    np.testing.assert_allclose(module._areas(scores, positive), expected)
