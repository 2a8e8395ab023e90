"""From noisy sums to conditions."""

from __future__ import annotations

import numpy as np

from sfumato.privacy.budget import Budget
from sfumato.retrieval.conditions import nearest_condition, told_by
from sfumato.retrieval.plan import make_plan
from tests.retrieval.frame import public_side


def noisy(
    rng: np.random.Generator, units: int, mean: np.ndarray, noise: float, count_noise: float
) -> np.ndarray:
    return np.append(units * mean + noise * rng.normal(size=len(mean)), units + count_noise * rng.normal())


def test_without_noise_the_mean_is_told_as_it_is() -> None:
    center, mean = np.arange(6.0), np.array([0.1, -0.2, 0.3, 0.0, 0.05, 0.4])
    told = told_by(np.append(200 * mean, 200.0), center, None, 1e-9, 1e-9, 50.0, cached=False)
    np.testing.assert_allclose(told.vector, center + mean, atol=1e-6)
    assert told.private and not told.cached and told.noise < 1e-9


def test_a_basis_puts_the_residual_where_it_belongs() -> None:
    basis = np.eye(6)[:, [1, 4, 5]]
    told = told_by(np.array([10.0, 20.0, 30.0, 100.0]), np.zeros(6), basis, 1e-9, 1e-9, 100.0, cached=True)
    np.testing.assert_allclose(told.vector, [0, 0.1, 0, 0, 0.2, 0.3], atol=1e-6)
    assert told.cached


def test_shrinkage_takes_a_third_of_the_error_where_noise_is_as_long_as_the_signal() -> None:
    rng, mean = np.random.default_rng(0), np.full(32, 0.1)
    noise = 100 * 0.1  # per coordinate of the sum, of 100 units
    told, plain = [], []
    for _ in range(200):
        answer = noisy(rng, 100, mean, noise, 1.0)
        told.append(
            np.square(
                told_by(answer, np.zeros(32), None, noise, 1.0, 100.0, cached=False).vector - mean
            ).sum()
        )
        plain.append(np.square(answer[:-1] / 100 - mean).sum())
    assert np.mean(told) < 0.67 * np.mean(plain)


def test_the_noise_that_is_stated_is_the_noise_there_is() -> None:
    rng, mean = np.random.default_rng(1), np.full(16, 0.5)
    found = [
        told_by(noisy(rng, 400, mean, 20.0, 1e-6), np.zeros(16), None, 20.0, 1e-6, 400.0, cached=False)
        for _ in range(400)
    ]
    spread = np.std([each.vector for each in found], axis=0).mean()
    assert abs(spread / np.mean([each.noise for each in found]) - 1) < 0.1


def test_the_gate_tells_of_the_public_alone_where_nothing_private_is_near() -> None:
    rng, center = np.random.default_rng(2), np.arange(8.0)
    for _ in range(50):
        told = told_by(noisy(rng, 0, np.zeros(8), 5.0, 30.0), center, None, 5.0, 30.0, 100.0, cached=False)
        if not told.private:
            assert np.array_equal(told.vector, center.astype(np.float32)) and told.noise == 0
    empty = told_by(np.append(np.full(8, 9.0), 1.0), center, None, 5.0, 30.0, 100.0, cached=False)
    assert not empty.private


def test_few_units_are_not_blown_up_with_their_noise() -> None:
    told = told_by(np.append(np.full(8, 3.0), 2.0), np.zeros(8), None, 0.01, 0.5, 100.0, cached=False)
    assert np.abs(told.vector).max() <= 3.0 / 10 + 1e-6


def test_top_k_is_mixed_with_the_public_mean() -> None:
    plan = make_plan("topk", Budget(50, 1e-5), 10, 5000.0, public_side(), neighbours=500, interpolation=0.25)
    told = nearest_condition(np.full(16, 4.0), np.zeros(16), plan, cached=False)
    np.testing.assert_allclose(told.vector, 1.0)
    assert told.noise == plan.noise == 0.25 * plan.query.noise  # type: ignore[union-attr]
