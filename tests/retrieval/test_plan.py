"""What a budget buys: calibrated events, neighbourhoods and caps."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.private_query import BallPlan, NearestPlan
from sfumato.retrieval.plan import RetrievalPlan, best_cap, loads, make_plan
from tests.retrieval.frame import public_side

BUDGET = Budget(4, 1e-6)


@pytest.mark.parametrize("mechanism", ["ball-filter", "ball", "topk"])
def test_what_is_planned_costs_the_budget_and_no_more(mechanism) -> None:
    plan = make_plan(mechanism, BUDGET, 300, 3000.0, public_side())
    spent = epsilon_of([event.total for event in plan.events], BUDGET.delta)
    assert 0.999 * BUDGET.epsilon < spent <= BUDGET.epsilon


def test_a_sampled_top_k_costs_the_budget_too() -> None:
    plan = make_plan("topk", BUDGET, 100, 50_000.0, public_side(), rate=0.05)
    assert plan.query.sampling_probability == 0.05  # type: ignore[union-attr]
    assert epsilon_of([event.total for event in plan.events], BUDGET.delta) <= BUDGET.epsilon


def test_budgets_of_their_own_let_units_answer_with_less_noise() -> None:
    filtered, plain, top = (
        make_plan(mechanism, BUDGET, 5000, 20_000.0, public_side(), **given)
        for mechanism, given in (
            ("ball-filter", {"share": 0.02}),
            ("ball", {"share": 0.02}),
            ("topk", {"neighbours": 400}),
        )
    )
    assert filtered.query.per_unit_cap < 5000  # type: ignore[union-attr]
    assert filtered.query.noise_multiplier < 0.5 * plain.query.noise_multiplier
    assert plain.query.noise_multiplier == pytest.approx(top.query.noise_multiplier, rel=1e-3)


def test_the_cap_covers_most_loads_and_is_the_best_of_those_tried() -> None:
    load = np.random.default_rng(0).gamma(2.0, 50.0, size=5000)
    cap = best_cap(load, 10_000)

    def noise(of: float) -> float:
        return math.sqrt(of) / (np.minimum(load, of).sum() / load.sum())

    assert 1 <= cap <= load.max() + 1
    assert all(
        noise(cap) <= noise(max(1, math.ceil(q))) + 1e-9 for q in np.quantile(load, (0.25, 0.5, 0.9, 1))
    )
    assert best_cap(np.zeros(10), 100) == 1


def test_loads_add_up_to_the_balls() -> None:
    public = public_side()
    assert loads(public, 0.05, 1000).sum() == pytest.approx(1000 * 20, rel=1e-6)


def test_less_noise_with_more_units_and_narrower_balls_then() -> None:
    few, many = (make_plan("ball-filter", BUDGET, 1000, units, public_side()) for units in (500.0, 500_000.0))
    assert many.noise < few.noise
    assert many.share <= few.share


@pytest.mark.parametrize("mechanism", ["ball-filter", "ball", "topk"])
def test_a_plan_survives_json(mechanism) -> None:
    public = public_side()
    plan = make_plan(mechanism, BUDGET, 50, 3000.0, public)
    back = RetrievalPlan.from_json(json.loads(json.dumps(plan.to_json())), public)
    assert dataclasses.replace(back, query=plan.query) == plan
    for name, value in vars(plan.query).items():
        assert np.array_equal(np.asarray(getattr(back.query, name)), np.asarray(value)), name
    assert type(back.query) is (NearestPlan if mechanism == "topk" else BallPlan)
    assert plan.lines()


@pytest.mark.parametrize(
    ("mechanism", "given", "said"),
    [
        ("topk", {"neighbours": 4000}, "--neighbours 4000 is more than the collection"),
        ("topk", {"neighbours": 400, "rate": 0.1}, "more than the collection"),
        ("topk", {"rate": 1.5}, "--rate 1.5"),
        ("ball", {"share": 0.0}, "--share 0.0"),
        ("ball-filter", {"share": 1.5}, "--share 1.5"),
    ],
)
def test_what_cannot_be_planned_is_refused(mechanism, given, said) -> None:
    with pytest.raises(InputError, match=said):
        make_plan(mechanism, BUDGET, 50, 3000.0, public_side(), **given)
