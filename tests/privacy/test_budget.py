"""Budgets refuse what has no meaning; delta is warned about when it is large for the number of units."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.privacy.budget import ADD_OR_REMOVE_ONE, REPLACE_ONE, Amount, Budget, delta_warning


@pytest.mark.parametrize("epsilon", [0, -1, math.inf, -math.inf, math.nan, "eight", None, True])
def test_a_budget_needs_a_positive_finite_epsilon(epsilon):
    with pytest.raises(InputError, match="no budget was spent"):
        Budget(epsilon, 1e-5)


@pytest.mark.parametrize("delta", [-1e-9, 1, 2, math.nan, math.inf, "x"])
def test_delta_is_a_probability_below_one(delta):
    with pytest.raises(InputError, match="no budget was spent"):
        Budget(1, delta)


def test_an_amount_may_be_nothing():
    assert Amount(0, 0) == Amount(0.0, 0.0)
    with pytest.raises(InputError):
        Amount(-1e-12, 0)


def test_numbers_become_floats():
    budget = Budget(8, 0)
    assert (type(budget.epsilon), type(budget.delta)) == (float, float)


def test_relations_have_the_names_of_the_certificate():
    assert (str(ADD_OR_REMOVE_ONE), str(REPLACE_ONE)) == ("add_or_remove_one", "replace_one")


@given(st.integers(2, 10**7))
def test_one_over_n_is_warned_about_and_far_below_is_not(n):
    assert delta_warning(1 / n, n)
    assert delta_warning(n**-1.2, n) is None


def test_the_line_is_n_to_the_minus_1_1():
    assert delta_warning(4000**-1.1 * 1.001, 4000)
    assert delta_warning(4000**-1.1 * 0.999, 4000) is None
    assert delta_warning(0.5, 0) is None
