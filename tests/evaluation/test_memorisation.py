"""Authenticity and feature likelihood: known values, copies are noticed, fresh samples are not, bad input."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.evaluation import memorisation, neighbours
from sfumato.evaluation.memorisation import LEAST_VARIANCE, authenticity, feature_likelihood


def clusters(count, seed, dimension=12):
    """Fresh features float32 of one fixed distribution with ten modes."""
    fixed, rng = np.random.default_rng(9), np.random.default_rng(seed)
    modes, mixing = fixed.normal(size=(10, dimension)), fixed.normal(size=(dimension, dimension))
    spread = 0.2 * rng.normal(size=(count, dimension)) @ mixing
    return (modes[rng.integers(10, size=count)] + spread).astype(np.float32)


TRAIN, HELD, FRESH = clusters(300, 1), clusters(250, 2), clusters(300, 3)
COPIES = TRAIN[::-1].copy()
NEAR_COPIES = TRAIN + np.random.default_rng(4).normal(0, 0.02, TRAIN.shape).astype(np.float32)


def column(*values):
    return np.array(values, np.float64)[:, None]


# Authenticity


def test_authenticity_by_hand():
    """0 and 1 are 1 apart, 5 is 4 from 1: 0.4 and 6 crowd (0.4 < 1, 1 < 4); 2.5 (1.5 from 1) and -1.1 do not."""
    found = authenticity(column(0, 1, 5), column(0.4, 6, 2.5, -1.1))
    assert (found.value, found.generated_used) == (0.5, 4)
    assert found.of_holdout is None and found.memorised is None


def test_authenticity_agrees_with_full_matrices():
    train, generated = TRAIN.astype(float), FRESH.astype(float)
    within = np.linalg.norm(train[:, None] - train, axis=-1)
    np.fill_diagonal(within, np.inf)
    between = np.linalg.norm(generated[:, None] - train, axis=-1)
    expected = np.mean(between.min(axis=1) > within.min(axis=1)[between.argmin(axis=1)])
    assert 0 < expected < 1
    assert authenticity(TRAIN, FRESH).value == expected


@pytest.mark.parametrize(("dimension", "share"), [(1, 1 / 3), (2, 0.3785), (3, 11 / 27)])
def test_fresh_uniform_points_have_the_known_share(dimension, share):
    """1 - P(two nearest neighbours are mutual), which is |ball| / |union of two unit balls at distance 1|."""
    rng = np.random.default_rng(0)
    found = authenticity(rng.random((3000, dimension)), rng.random((3000, dimension)))
    assert found.value == pytest.approx(share, abs=0.035)


def test_copies_are_not_authentic_and_fresh_samples_as_much_as_held_out_ones():
    for copies in (COPIES, NEAR_COPIES):
        found = authenticity(TRAIN, copies, holdout=HELD)
        assert found.value < 0.02 < 0.3 < found.of_holdout
        assert found.memorised is True
    fresh = authenticity(TRAIN, FRESH, holdout=HELD)
    assert abs(fresh.value - fresh.of_holdout) < 0.15
    assert fresh.memorised is False and fresh.holdout_used == 250


def test_a_copy_of_a_duplicated_training_point_is_not_authentic():
    train = np.concatenate([TRAIN, TRAIN[:10]])
    assert authenticity(train, TRAIN[:10]).value == 0


def test_one_sample_repeated_is_one_sample():
    """Thirty of one point are no evidence of memorisation, however near; thirty copies are."""
    one = np.repeat(TRAIN[:1] + np.float32(0.001), 30, axis=0)
    assert authenticity(TRAIN, one).value == 0
    assert authenticity(TRAIN, one, holdout=HELD).memorised is False
    assert authenticity(TRAIN, TRAIN[:30], holdout=HELD).memorised is True


def test_the_whole_training_set_is_searched_in_blocks(monkeypatch):
    whole = authenticity(TRAIN, FRESH, holdout=HELD)
    monkeypatch.setattr(memorisation, "TRAINING_ROWS", 70)
    monkeypatch.setattr(neighbours, "DISTANCES_AT_A_TIME", 500)
    assert authenticity(TRAIN, FRESH, holdout=HELD) == whole
    few = authenticity(TRAIN, COPIES, most=40)
    assert (few.value, few.generated_used) == (0, 40)


# Feature likelihood


def test_one_gaussian_has_its_closed_form():
    """All generated samples at one point: the variance is the mean squared distance to it per dimension."""
    rng = np.random.default_rng(0)
    train, held = rng.normal(size=(400, 5)), rng.normal(size=(300, 5))
    mean, spread = train.mean(axis=0), train.std(axis=0)
    found = feature_likelihood(train, held, np.repeat(mean[None], 7, axis=0))
    variance = 1.0  # of the standardised training set around its mean
    squared = np.mean(((held - mean) / spread) ** 2)
    known = 0.5 * (np.log(2 * np.pi * variance) + squared / variance)
    assert found.value / 100 + found.baseline == pytest.approx(known, abs=1e-4)
    assert found.on_train / 100 + found.baseline == pytest.approx(0.5 * (np.log(2 * np.pi) + 1), abs=1e-4)


def test_far_clusters_get_their_own_variances():
    """Two Gaussians too far apart to share points: each variance is known, up to the base likelihood's nil share."""
    rng = np.random.default_rng(0)
    near, wide = 0.05 * rng.normal(size=(200, 4)) - 30, 0.5 * rng.normal(size=(200, 4)) + 30
    points = np.concatenate([near, wide])
    centres = np.array([[-30.0] * 4, [30.0] * 4])
    squared = neighbours.squared_distances(points, centres).astype(np.float32)
    found = memorisation._variances(squared, points, "test")
    assert found == pytest.approx([np.mean((near + 30) ** 2), np.mean((wide - 30) ** 2)], rel=1e-3)


def test_the_fit_is_a_maximum_of_the_likelihood():
    """No single variance can be changed for the better, beyond where the fit stops."""
    points = TRAIN[:120].astype(float)
    points = (points - points.mean(axis=0)) / points.std(axis=0)
    centres = ((FRESH[:40] - TRAIN.mean(axis=0)) / TRAIN.std(axis=0)).astype(float)
    squared = neighbours.squared_distances(points, centres)
    variances = memorisation._variances(squared.astype(np.float32), points, "test")
    radii = np.sum(points**2, axis=1)
    base = np.exp(-0.5 * (radii + 12 * np.log(2 * np.pi)))

    def likelihood(v):
        densities = np.exp(-0.5 * (squared / v + 12 * np.log(2 * np.pi * v)))
        return np.log(densities.mean(axis=1) + base).mean() / 12

    best = likelihood(variances)
    for j in range(40):
        for factor in (0.8, 1.25):
            changed = variances.copy()
            changed[j] *= factor
            assert likelihood(changed) < best + 1e-4


def test_copies_are_noticed_and_fresh_samples_are_not():
    fresh = feature_likelihood(TRAIN, HELD, FRESH)
    assert abs(fresh.value) < 12 and not fresh.memorised
    half = np.concatenate([TRAIN[:150], FRESH[:150]])
    for copies in (COPIES, NEAR_COPIES, half):
        found = feature_likelihood(TRAIN, HELD, copies)
        assert found.memorised and found.gap > fresh.gap + 50
        assert found.baseline == fresh.baseline and found.baseline_gap == fresh.baseline_gap
    assert feature_likelihood(TRAIN, HELD, COPIES).value > 1000


def test_worse_samples_have_a_larger_divergence():
    noise = np.random.default_rng(5).normal(size=FRESH.shape).astype(np.float32)
    values = [feature_likelihood(TRAIN, HELD, FRESH + scale * noise).value for scale in (0, 0.5, 2)]
    assert values[0] + 3 < values[1] < values[2] - 3
    one_mode = FRESH[np.linalg.norm(FRESH - FRESH[0], axis=1).argsort()[:30]]
    assert feature_likelihood(TRAIN, HELD, one_mode).value > values[0] + 10


def test_more_generated_than_training_images_are_no_sign_of_memorisation():
    found = feature_likelihood(TRAIN, HELD, clusters(2000, 6))
    assert not found.memorised and abs(found.value) < 12


def test_units_and_offsets_do_not_matter():
    scales = np.linspace(0.1, 30, TRAIN.shape[1])
    plain = feature_likelihood(TRAIN.astype(float), HELD.astype(float), FRESH.astype(float))
    moved = feature_likelihood(*((s.astype(float) * scales + 100) for s in (TRAIN, HELD, FRESH)))
    assert moved.value == pytest.approx(plain.value, abs=1e-3)
    assert moved.gap == pytest.approx(plain.gap, abs=1e-3)


def test_dimensions_without_spread_are_finite():
    def wider(features, value):
        return np.column_stack([features, np.full((len(features), 2), value, np.float32)])

    same = feature_likelihood(wider(TRAIN, 3), wider(HELD, 3), wider(FRESH, 3))
    other = feature_likelihood(wider(TRAIN, 3), wider(HELD, 3), wider(FRESH, 4))
    assert np.isfinite(same.value) and np.isfinite(other.value)
    assert other.value > same.value  # generated images differ where real ones never do


def test_blocks_do_not_matter_and_the_seed_decides(monkeypatch):
    whole = feature_likelihood(TRAIN, HELD, FRESH, most=100)
    assert whole == feature_likelihood(TRAIN, HELD, FRESH, most=100, seed=0)
    assert whole != feature_likelihood(TRAIN, HELD, FRESH, most=100, seed=1)
    monkeypatch.setattr(neighbours, "DISTANCES_AT_A_TIME", 500)
    assert feature_likelihood(TRAIN, HELD, FRESH, most=100).value == pytest.approx(whole.value, abs=1e-6)


def test_variances_have_a_floor():
    squared = np.zeros((4, 2), np.float32)
    assert (memorisation._variances(squared, np.eye(4), "test") == LEAST_VARIANCE).all()


def test_the_features_are_left_as_they_are():
    """Also float64 ones, which need no conversion."""
    sets = [s.astype(float) for s in (TRAIN, HELD, FRESH)]
    before = [s.copy() for s in sets]
    authenticity(sets[0], sets[2], holdout=sets[1])
    feature_likelihood(*sets)
    assert all(np.array_equal(a, b) for a, b in zip(sets, before, strict=True))


# Bad input


def test_bad_input_is_refused():
    bad = FRESH.copy()
    bad[7, 3] = np.nan
    with pytest.raises(InputError, match="generated: row 7 holds NaN"):
        authenticity(TRAIN, bad)
    with pytest.raises(InputError, match="train: row 7 holds NaN"):
        authenticity(bad, TRAIN)
    with pytest.raises(InputError, match="holdout: row 7 holds NaN"):
        feature_likelihood(TRAIN, bad, FRESH)
    with pytest.raises(InputError, match="train 12, generated 3"):
        authenticity(TRAIN, FRESH[:, :3])
    with pytest.raises(InputError, match="train 12, holdout 12, generated 3"):
        feature_likelihood(TRAIN, HELD, FRESH[:, :3])
    with pytest.raises(InputError, match="1 training images are too few"):
        authenticity(TRAIN[:1], FRESH)
    with pytest.raises(InputError, match="0 generated images are too few"):
        feature_likelihood(TRAIN, HELD, FRESH[:0])
    with pytest.raises(InputError, match="all training features are the same"):
        feature_likelihood(np.ones((9, 3)), np.ones((9, 3)), np.ones((9, 3)))
