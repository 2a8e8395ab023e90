"""Fréchet distance: moments by streaming, closed forms, other implementations, invariances, bad input."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import _compute_fid

from sfumato.errors import InputError
from sfumato.evaluation import frechet
from sfumato.evaluation.frechet import Moments, frechet_distance, rank_warning

seeds = st.integers(0, 2**32 - 1)


def normal(seed, count=50, dimension=4):
    """Correlated Gaussian features float64 [count, dimension] away from the origin."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dimension, dimension))
    return rng.normal(size=(count, dimension)) @ mixing + rng.normal(size=dimension)


def exactly(mean, covariance, count=60):
    """Features whose sample mean and covariance are exactly these."""
    sample = np.random.default_rng(0).normal(size=(count, len(mean)))
    sample -= sample.mean(axis=0)
    white = sample @ np.linalg.inv(np.linalg.cholesky(np.cov(sample.T))).T
    return white @ np.linalg.cholesky(np.asarray(covariance, float)).T + np.asarray(mean, float)


def distance(x, y):
    return frechet_distance(Moments.of(x), Moments.of(y))


def scale(*sets):
    return sum(np.trace(np.atleast_2d(np.cov(s.T))) + np.sum(s.mean(axis=0) ** 2) for s in sets)


@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_batches_of_any_size_give_the_moments_of_the_whole(seed, sizes):
    features = normal(seed, sum(sizes) + 2) + 1e5
    moments = Moments()
    for part in np.split(features, np.cumsum(sizes)):
        moments.add(part)
    assert moments.count == len(features) and moments.dimension == 4
    assert np.allclose(moments.mean, features.mean(axis=0), rtol=1e-13)
    assert np.allclose(moments.covariance, np.cov((features - features[0]).T), rtol=1e-9, atol=1e-9)
    assert np.array_equal(moments.covariance, moments.covariance.T)


def test_a_large_common_offset_costs_no_accuracy():
    """Sums of squares would lose all digits here: 1e8 squared is at the end of float64."""
    features = np.round(normal(1, 500), 3)
    moments = Moments.of(features + 1e8, batch=7)
    assert np.allclose(moments.covariance, np.cov(features.T), rtol=1e-6)


def test_moments_read_a_memory_mapped_file_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(frechet, "BLOCK", 500)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "features.npy", rng.normal(size=(40_000, 20)).astype(np.float32))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    Moments.of(mapped[:100])
    tracemalloc.start()
    moments = Moments()
    moments.add(mapped)  # 6.4 MB in float64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert np.allclose(moments.covariance, np.cov(np.asarray(mapped, np.float64).T))


def test_it_is_the_closed_form_of_diagonal_gaussians():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([16.0, 4.0, 0.25])
    found = distance(exactly([0, 0, 0], np.diag(a)), exactly([1, 2, -2], np.diag(b)))
    assert found == pytest.approx(9 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-10)


def test_it_is_the_closed_form_of_gaussians_that_do_not_commute():
    """2 x 2: Tr((AB)^½) = sqrt(Tr(AB) + 2 sqrt(det(AB)))."""
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[4.0, -1.5], [-1.5, 1.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    found = distance(exactly([0, 0], a), exactly([0, 3], b))
    assert found == pytest.approx(9 + np.trace(a) + np.trace(b) - 2 * root, rel=1e-10)


def test_a_shift_costs_its_squared_length():
    features = normal(3)
    shift = np.array([1.0, -2.0, 3.0, 0.5])
    assert distance(features, features + shift) == pytest.approx(np.sum(shift**2), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_the_matrix_square_root_and_torchmetrics(seed):
    x, y = normal(seed, 200, 12), normal(seed + 100, 150, 12)
    a, b = np.cov(x.T), np.cov(y.T)
    gap = x.mean(axis=0) - y.mean(axis=0)
    by_root = gap @ gap + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    tensors = [torch.from_numpy(m) for m in (x.mean(axis=0), a, y.mean(axis=0), b)]
    assert distance(x, y) == pytest.approx(by_root, rel=1e-9)
    assert distance(x, y) == pytest.approx(float(_compute_fid(*tensors)), rel=1e-9)


@given(seeds, st.integers(2, 12), st.integers(2, 12), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_invariances(seed, count_x, count_y, dimension):
    """Also of rank-deficient sets: symmetric, never negative, 0 for equal sets, blind to rotation."""
    x, y = normal(seed, count_x, dimension), normal(seed + 1, count_y, dimension)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(dimension, dimension)))[0]
    slack = 1e-6 * scale(x, y)
    found = distance(x, y)
    assert np.isfinite(found) and found >= 0
    assert distance(y, x) == pytest.approx(found, abs=slack)
    assert distance(x @ rotation, y @ rotation) == pytest.approx(found, abs=slack)
    assert distance(3 * x, 3 * y) == pytest.approx(9 * found, abs=9 * slack)
    assert distance(x, x[::-1]) <= 1e-12 * scale(x, x)


def test_the_features_are_left_as_they_are():
    features = normal(0)
    before = features.copy()
    Moments.of(features)
    assert np.array_equal(features, before)


def test_rank_deficient_sets_are_exact():
    """Two sets in orthogonal subspaces share nothing: the distance is the sum of all variances and the gap."""
    rng = np.random.default_rng(0)
    x, y = np.zeros((30, 40)), np.zeros((35, 40))
    x[:, :20], y[:, 20:] = rng.normal(size=(30, 20)), rng.normal(size=(35, 20))
    rotation = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    exact = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T))
    assert distance(x @ rotation, y @ rotation) == pytest.approx(exact, rel=1e-12)


def test_sets_without_spread_are_apart_by_their_means():
    assert distance(np.ones((3, 5)), np.full((4, 5), 3.0)) == 20.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    features = normal(0).astype(np.float32)
    features[17, 2] = bad
    with pytest.raises(InputError, match="row 17 holds NaN or infinity"):
        Moments().add(features)


def test_wrong_shapes_are_refused():
    moments = Moments.of(normal(0, dimension=4))
    with pytest.raises(InputError, match="dimension 3 after features of dimension 4"):
        moments.add(normal(0, dimension=3))
    with pytest.raises(InputError, match=r"different dimensions \(4 and 3\)"):
        frechet_distance(moments, Moments.of(normal(0, dimension=3)))
    for wrong in (np.zeros(5), np.zeros((5, 0)), np.zeros((5, 2), np.uint8)):
        with pytest.raises(InputError, match="must be floats"):
            Moments().add(wrong)


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="at least 2 images, not 1"):
        distance(normal(0, 1), normal(0))
    with pytest.raises(InputError, match="at least 2 images, not 0"):
        frechet_distance(Moments.of(normal(0)), Moments())
    with pytest.raises(InputError, match="empty set"):
        _ = Moments().mean


def test_the_warning_comes_at_full_rank():
    features = normal(0, 9, 8)
    assert np.linalg.matrix_rank(Moments.of(features).covariance) == 8 and rank_warning(9, 8) is None
    assert np.linalg.matrix_rank(Moments.of(features[:8]).covariance) == 7
    assert "8 images for 8 feature dimensions" in str(rank_warning(8, 8))
