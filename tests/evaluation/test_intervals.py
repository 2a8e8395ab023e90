"""Exact intervals of a probability, against scipy's and in closed form."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from sfumato.errors import InputError
from sfumato.evaluation.intervals import clopper_pearson, rule_of_three


@pytest.mark.parametrize(("k", "n", "level"), [(0, 20, 0.95), (20, 20, 0.95), (3, 1000, 0.95), (7, 11, 0.5)])
def test_clopper_pearson_is_scipys(k, n, level):
    exact = binomtest(k, n).proportion_ci(level, "exact")
    assert clopper_pearson(k, n, level) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_rule_of_three():
    assert rule_of_three(1000) == pytest.approx(3 / 1000, rel=4e-3)
    assert (1 - rule_of_three(57, 0.9)) ** 57 == pytest.approx(0.1)
    assert rule_of_three(1) == pytest.approx(0.95)


@pytest.mark.parametrize("count", [(-1, 5), (6, 5), (0, 0)])
def test_no_interval_without_a_count(count):
    with pytest.raises(InputError, match="is no count"):
        clopper_pearson(*count)


def test_no_rule_without_trials_and_no_level_outside_0_to_1():
    with pytest.raises(InputError, match="0 trials"):
        rule_of_three(0)
    with pytest.raises(InputError, match="confidence level"):
        clopper_pearson(1, 2, 1.0)
