"""Kernel distance: its formula, its unbiasedness, the coverage of its interval, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from sfumato.errors import InputError
from sfumato.evaluation import kernel_distance as module
from sfumato.evaluation.kernel_distance import kernel_distance, squared_mmd


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """Hundreds of short runs: without their lines."""
    monkeypatch.setenv("RANK", "1")


def cube(x, y):
    return (float(np.dot(x, y)) / len(x) + 1) ** 3


def by_double_loop(x, y):
    n, m = len(x), len(y)
    return (
        sum(cube(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        + sum(cube(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        - 2 * sum(cube(a, b) for a in x for b in y) / (n * m)
    )


class Atoms:
    """A distribution on a few points, so that the squared MMD of two of them is a finite sum."""

    def __init__(self, seed, shift=0.0):
        self.points = np.random.default_rng(seed).normal(size=(6, 3)) + shift

    def sample(self, count, rng):
        return self.points[rng.integers(len(self.points), size=count)]

    def squared_mmd(self, other):
        def mean(x, y):
            return np.mean([cube(a, b) for a in x for b in y])

        return (
            mean(self.points, self.points)
            + mean(other.points, other.points)
            - 2 * mean(self.points, other.points)
        )


def test_the_estimate_is_the_double_loop_and_torchmetrics():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)), rng.normal(size=(9, 5)) + 0.5
    assert squared_mmd(x, y) == pytest.approx(by_double_loop(x, y), rel=1e-12)
    theirs = poly_mmd(torch.from_numpy(x[:9]), torch.from_numpy(y))
    assert squared_mmd(x[:9], y) == pytest.approx(float(theirs), rel=1e-10)


def test_the_value_is_the_mean_over_subsets_of_the_size_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "squared_mmd", lambda x, y: seen.append((x, y)) or squared_mmd(x, y))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(60, 3)).astype(np.float32)
    found = kernel_distance(x, y, subsets=8, subset_size=15)
    assert (found.subsets, found.subset_size) == (8, 15)
    assert found.value == pytest.approx(np.mean([squared_mmd(*pair) for pair in seen]))
    assert len(seen) == 8 and all(len(a) == len(b) == 15 for a, b in seen)
    assert all(len(np.unique(a, axis=0)) == 15 for a, _ in seen)  # without replacement
    assert found.low < found.value < found.high


def test_it_is_unbiased_and_its_interval_holds_the_truth():
    """Of two distributions whose distance is known, and of one distribution with itself."""
    rng = np.random.default_rng(0)
    for one, other in ((Atoms(1), Atoms(2, shift=0.3)), (Atoms(1), Atoms(1))):
        truth = one.squared_mmd(other)
        found = [
            kernel_distance(
                one.sample(80, rng), other.sample(100, rng), subsets=30, subset_size=20, seed=draw
            )
            for draw in range(150)
        ]
        values = np.array([result.value for result in found])
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values))
        assert np.mean([result.low <= truth <= result.high for result in found]) > 0.89
    assert truth == 0 and values.min() < 0  # unbiased at 0 means negative at times


def test_the_interval_narrows_with_more_images_and_not_with_more_subsets():
    rng = np.random.default_rng(0)
    one, other = Atoms(1), Atoms(2)
    few, many = ((one.sample(n, rng), other.sample(n, rng)) for n in (60, 3000))

    def width(sets, subsets):
        found = kernel_distance(*sets, subsets=subsets, subset_size=30)
        return found.high - found.low

    assert width(many, 200) < 0.4 * width(few, 200)
    assert width(few, 800) > 0.6 * width(few, 50)


def test_a_subset_larger_than_half_the_smaller_set_shrinks():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(31, 4)), rng.normal(size=(500, 4))
    assert kernel_distance(x, y).subset_size == 15
    assert kernel_distance(y, x, subset_size=14).subset_size == 14
    assert np.isfinite(kernel_distance(x[:4], y[:4]).high)


def test_the_seed_decides():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4)), rng.normal(size=(50, 4))
    np.random.seed(5)
    assert kernel_distance(x, y, subsets=5) == kernel_distance(x, y, subsets=5, seed=0)
    assert kernel_distance(x, y, subsets=5) != kernel_distance(x, y, subsets=5, seed=1)


def test_a_rotation_changes_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 1
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert kernel_distance(x @ rotation, y @ rotation).value == pytest.approx(kernel_distance(x, y).value)


def test_bad_input_is_refused():
    x = np.random.default_rng(0).normal(size=(20, 4))
    bad = x.copy()
    bad[3, 1] = np.nan
    with pytest.raises(InputError, match="y: row 3 holds NaN"):
        kernel_distance(x, bad, subset_size=10)
    with pytest.raises(InputError, match=r"different dimensions \(x 4, y 3\)"):
        kernel_distance(x, x[:, :3])
    with pytest.raises(InputError, match="at least 4 images"):
        kernel_distance(x, x[:3])
    with pytest.raises(InputError, match="at least 2 subsets of 2 images, not 1 of 1000"):
        kernel_distance(x, x, subsets=1)
