"""Questions to a private collection: noise, sums, budgets of units, order of work, two at a time."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import chi2, norm

from sfumato.errors import InputError, LedgerError
from sfumato.privacy import private_query
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import event_from_json, event_to_json, same_event
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import (
    BALL_BUDGETS,
    BALL_QUERY,
    BALL_SUM,
    FINE,
    NEAREST_MEAN,
    Ball,
    BallPlan,
    NearestPlan,
    ball_sum,
    clipped_parts,
    nearest_mean,
    question_key,
)
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.privacy.query_state import USED_UNIT

ALARM = 1e-7
D = 4
X = np.eye(D)[0]
NOWHERE = Ball(X, 2.0, np.zeros(D))
EVERYWHERE = Ball(X, -2.0, np.zeros(D))
fresh = itertools.count()


class Recorder:
    """A reservation for one plan that allows everything and remembers what began."""

    id, status = "fake", "open"

    def __init__(self, plan: Any) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.marks: dict[str, str] = {}
        self.planned = tuple(plan.planned())

    def begin(self, mechanism: str, event: Any, units: int = 1, *, mark: str = "", after: str = "") -> None:
        self.marks[mechanism] = mark
        self.calls.append((mechanism, event))

    def mark(self, mechanism: str) -> str:
        return self.marks.get(mechanism, "")

    def begun(self, mechanism: str) -> int:
        return sum(name == mechanism for name, _ in self.calls)


def unit_vectors(n: int, seed: int = 0, dimension: int = D) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(n, dimension))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def collection(folder: Path, vectors: Any, units: Any = None) -> ProtectedVectors:
    """Row i is called "i"; units of one each unless told."""
    vectors = np.asarray(vectors)
    private = ProtectedVectors.create(folder / f"index{next(fresh)}", vectors.shape[1])
    if len(vectors):
        names = [str(i) for i in range(len(vectors))]
        private.add(vectors, names, names if units is None else [f"u{unit}" for unit in units])
    return private


def empty(folder: Path, dimension: int = D) -> ProtectedVectors:
    return collection(folder, np.zeros((0, dimension)))


def ball_plan(**changes: Any) -> BallPlan:
    return BallPlan(**({"noise_multiplier": 2.0, "radius": 0.8, "queries": 50} | changes))  # type: ignore[arg-type]


def reserved(folder: Path, plan: Any) -> Any:
    ledger = Ledger.open(folder / f"{next(fresh)}.db", total=Budget(1e4, 1e-3))
    return ledger.reserve("retrieve", plan.planned(), delta=1e-5, key="x")


def before_noise(call: Any) -> tuple[list[int], float]:
    """The sum in lattice steps and the scale of its noise, seen where the noise would be added."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_query, "discrete_gaussian", lambda *given: (seen.append(given), given[0])[1])
        call()
    ((total, scale),) = seen
    return total.tolist(), scale


def ball_total(private: Any, ball: Ball, plan: BallPlan) -> list[int]:
    key = str(next(fresh))
    if plan.per_unit_cap is not None:
        plan = replace(plan, per_unit_cap=None)
    return before_noise(lambda: ball_sum(private, ball, plan, Recorder(plan), key))[0]  # type: ignore[arg-type]


def nearest_total(private: Any, direction: np.ndarray, plan: NearestPlan) -> list[int]:
    key = str(next(fresh))
    return before_noise(lambda: nearest_mean(private, direction, plan, Recorder(plan), key))[0]  # type: ignore[arg-type]


def squared(steps: Any) -> int:
    return sum(int(step) ** 2 for step in steps)


def used(private: ProtectedVectors) -> dict[str, int]:
    with sqlite3.connect(private.folder / "state.db") as db:
        found = dict(db.execute("SELECT name, used FROM units").fetchall())
    db.close()
    return found


# --- plans, events and what they cost


def gaussian_delta(noise: float, epsilon: float) -> float:
    """Balle and Wang, arXiv 1805.06530, theorem 8."""
    return float(
        norm.cdf(1 / (2 * noise) - epsilon * noise)
        - math.exp(epsilon) * norm.cdf(-1 / (2 * noise) - epsilon * noise)
    )


def gaussian_epsilon(noise: float, delta: float) -> float:
    return brentq(lambda epsilon: gaussian_delta(noise, epsilon) - delta, 0, 200)  # type: ignore[return-value]


def test_planned_work_costs_what_the_mechanisms_cost():
    """T Gaussians are one of σ/√T; a budget of L participations is one of σ/√L; a sample is dp-accounting's."""

    def cost(plan: Any) -> float:
        return epsilon_of([part.total for part in plan.planned()], 1e-5)

    assert cost(ball_plan(queries=100, noise_multiplier=20.0)) == pytest.approx(
        gaussian_epsilon(2.0, 1e-5), abs=2e-2
    )
    filtered = ball_plan(queries=10**5, noise_multiplier=20.0, per_unit_cap=64)
    assert cost(filtered) == pytest.approx(gaussian_epsilon(2.5, 1e-5), abs=1e-3)
    assert cost(NearestPlan(3, 20.0, 100)) == pytest.approx(gaussian_epsilon(2.0, 1e-5), abs=2e-2)
    other = privacy_loss_distribution.from_gaussian_mechanism(1.5, sampling_prob=0.1).self_compose(7)
    assert cost(NearestPlan(3, 1.5, 7, 0.1)) == pytest.approx(other.get_epsilon_for_delta(1e-5), abs=2e-3)


def test_plans_say_what_is_done():
    (topk,) = NearestPlan(5, 3.0, 20, 0.25).planned()
    assert topk.count == 20 and same_event(topk.event, PoissonSampledDpEvent(0.25, GaussianDpEvent(3.0)))
    assert NearestPlan(5, 3.0, 20).event == GaussianDpEvent(3.0)
    (one,) = ball_plan().planned()
    assert (one.mechanism, one.event, one.count) == (BALL_SUM, GaussianDpEvent(2.0), 50)
    budgets, query = ball_plan(per_unit_cap=4).planned()
    assert (budgets.mechanism, budgets.event, budgets.count) == (BALL_BUDGETS, GaussianDpEvent(1.0), 1)
    assert (query.mechanism, query.event, query.count) == (BALL_QUERY, NoOpDpEvent(), 50)
    for part in (topk, one, budgets, query):
        assert same_event(event_from_json(event_to_json(part.event)), part.event)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1e6), st.integers(1, 10**6))
def test_the_noise_of_all_budgeted_queries_together_is_rounded_down(noise, cap):
    found = ball_plan(noise_multiplier=noise, per_unit_cap=cap).total_noise_multiplier
    assert Fraction(found) ** 2 * cap <= Fraction(noise) ** 2 and found == pytest.approx(
        noise / math.sqrt(cap)
    )


@pytest.mark.parametrize(
    "make",
    [
        *(lambda v=v: NearestPlan(1, v, 1) for v in (0.0, -1.0, math.nan, math.inf)),
        *(lambda v=v, n=n: ball_plan(**{n: v}) for v in (0.0, math.nan, math.inf) for n in
          ("noise_multiplier", "radius", "count_weight")),
        lambda: NearestPlan(0, 1.0, 1), lambda: NearestPlan(1, 1.0, 0), lambda: NearestPlan(1, 1.0, 1, 0.0),
        lambda: NearestPlan(1, 1.0, 1, 1.1), lambda: NearestPlan(1, 1.0, 1, math.nan), lambda: ball_plan(queries=0),
        lambda: ball_plan(per_unit_cap=0), lambda: ball_plan(basis=np.ones((D, 2))), lambda: ball_plan(basis=X),
    ],
)  # fmt: skip
def test_plans_without_meaning_are_refused(make):
    with pytest.raises(InputError, match="no budget was spent"):
        make()


def test_a_question_is_its_prompt_and_its_public_parameters():
    asked = [
        ("a", {}),
        ("b", {}),
        ("a", {"k": 1}),
        ("a", {"k": 2}),
        ("a", {"k": "1"}),
        ('a", {"k": 1}', {}),
        ("a ", {}),
    ]
    assert len({question_key(*one) for one in asked}) == len(asked)
    assert question_key("a", {"k": 1, "j": 2.5}) == question_key("a", {"j": 2.5, "k": 1})
    assert not any(question_key(*one).startswith("codebook") for one in asked)


# --- the noise, also where nothing is near


@pytest.mark.parametrize("cap", [None, 3])
@pytest.mark.parametrize("there", [0, 9])
def test_ball_noise_is_as_stated_in_every_direction(tmp_path, cap, there):
    wide, plan = 200, ball_plan(count_weight=0.3, per_unit_cap=cap)
    private = collection(tmp_path, unit_vectors(there, 1, wide))
    ball = replace(NOWHERE, direction=np.eye(wide)[0], center=np.zeros(wide))
    reservation: Any = reserved(tmp_path, plan)
    drawn = np.array([ball_sum(private, ball, plan, reservation, str(i))[0] for i in range(40)])
    assert drawn.shape == (40, wide + 1)
    assert plan.residual_noise == pytest.approx(2 * 0.8 * math.hypot(1, 0.3))
    assert plan.count_noise == pytest.approx(2 * math.hypot(1, 0.3) / 0.3)
    for values, noise in ((drawn[:, :-1], plan.residual_noise), (drawn[:, -1], plan.count_noise)):
        squares = np.square(values).sum() / noise**2
        assert chi2.ppf(ALARM, values.size) < squares < chi2.isf(ALARM, values.size)
        assert abs(values.mean()) < 6 * noise / math.sqrt(values.size)
    scaled = drawn / np.append(np.full(wide, plan.residual_noise), plan.count_noise)
    by_direction = np.square(scaled).sum(0)
    assert (chi2.ppf(ALARM / 200, 40) < by_direction).all() and (
        by_direction < chi2.isf(ALARM / 200, 40)
    ).all()
    assert np.abs(scaled @ scaled.T / wide - np.eye(40))[~np.eye(40, dtype=bool)].max() < 7 / math.sqrt(wide)


def test_nearest_noise_is_as_stated_also_from_an_empty_collection(tmp_path):
    wide, plan = 300, NearestPlan(4, 3.0, 20, 0.5)
    assert plan.noise == 1.5
    reservation: Any = reserved(tmp_path, plan)
    private = empty(tmp_path, wide)
    drawn = np.array(
        [nearest_mean(private, np.eye(wide)[0], plan, reservation, str(i))[0] for i in range(20)]
    )
    squares = np.square(drawn).sum() / plan.noise**2
    assert chi2.ppf(ALARM, drawn.size) < squares < chi2.isf(ALARM, drawn.size)
    assert abs(drawn.mean()) < 6 * plan.noise / math.sqrt(drawn.size)
    assert np.abs(drawn @ drawn.T / wide / plan.noise**2 - np.eye(20))[
        ~np.eye(20, dtype=bool)
    ].max() < 7 / math.sqrt(wide)
    assert reservation.begun(NEAREST_MEAN) == 20


@settings(max_examples=8, deadline=None)
@given(st.floats(1e-3, 1e6))
def test_noise_is_scaled_exactly_to_the_sums_sensitivity(tmp_path_factory, noise):
    private = empty(tmp_path_factory.mktemp("x"))
    topk, ball = NearestPlan(7, noise, 9), ball_plan(noise_multiplier=noise, radius=0.123, count_weight=0.7)
    found = before_noise(lambda: nearest_mean(private, X, topk, Recorder(topk), "a"))  # type: ignore[arg-type]
    assert Fraction(found[1]) == Fraction(noise) * 2 * FINE
    found = before_noise(lambda: ball_sum(private, NOWHERE, ball, Recorder(ball), "b"))  # type: ignore[arg-type]
    assert Fraction(found[1]) == Fraction(noise) * FINE


# --- parts: nobody's longer than 1


sizes = st.one_of(st.floats(1e-6, 1e6), st.floats(1e-300, 1e300), st.sampled_from([1e-300, 1e300]))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-(2**44), 2**44) | st.integers(-3, 3), min_size=1, max_size=6),
    sizes,
    sizes,
    st.integers(0, 99),
)
def test_no_part_is_ever_longer_than_one(residual, radius, weight, seed):
    row = np.array(residual) / 2**22
    others = np.random.default_rng(seed).normal(size=(3, len(row)))
    lengths = np.linalg.norm(np.concatenate([row[None], others]), axis=1)
    with np.errstate(all="raise", under="ignore"):
        parts = clipped_parts(np.concatenate([row[None], others]), lengths, radius, weight)
        alone = clipped_parts(row[None], lengths[:1], radius, weight)
    assert parts[0].tolist() == alone[0].tolist() and all(squared(part) <= FINE**2 for part in parts)
    wrong = clipped_parts(row[None], lengths[:1] * 0.9, radius, weight)  # a length that is no length
    assert squared(wrong[0]) <= FINE**2


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 30),
    st.floats(1e-3, 1e3),
    st.floats(1e-2, 1e2),
    st.floats(1e-2, 1e2),
    st.integers(0, 10**6),
)
def test_parts_hold_the_clipped_residual_and_the_count(dimension, size, radius, weight, seed):
    residual = size * np.random.default_rng(seed).normal(size=dimension)
    length = float(np.linalg.norm(residual))
    wanted = np.append(residual / max(radius, length), weight) / math.hypot(1, weight) * FINE
    (part,) = clipped_parts(residual[None], np.array([length]), radius, weight)
    assert np.abs(part - wanted).max() < 1.01 and (np.abs(part) <= np.abs(wanted) + 1e-6).all()


def test_nearest_vectors_are_not_longer_than_one_on_the_lattice():
    for seed in range(30):
        rows = np.rint(unit_vectors(50, seed, 1 + seed) * (1 + 1e-3 * np.sin(seed)) * 2.0**22)
        steps = private_query._on_lattice(rows)
        assert all(squared(step) <= FINE**2 for step in steps)
        assert (
            np.abs(
                steps - rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True) / 2**22, 1) / 4
            ).max()
            < 1.01
        )
        assert private_query._on_lattice(rows[:1]).tolist() == steps[:1].tolist()


# --- sums by hand


@pytest.mark.parametrize("columns", [None, 2])
def test_the_sum_in_a_ball_by_hand(tmp_path, columns):
    basis = None if columns is None else np.linalg.qr(np.random.default_rng(3).normal(size=(D, columns)))[0]
    vectors, units = unit_vectors(40), [i // 3 for i in range(30)] + list(range(30, 40))
    plan = ball_plan(basis=basis, count_weight=0.7, noise_multiplier=1e-9)
    ball = Ball(X, 0.1, np.array([0.3, 0.1, -0.2, 0.05]))
    wanted, number = np.zeros(columns or D), 0
    for unit in set(units):
        mine = [
            v for v, u in zip(vectors.astype(np.float64), units, strict=True) if u == unit and v[0] >= 0.1
        ]
        residual = sum((v - ball.center for v in mine), np.zeros(D))
        residual = residual if basis is None else residual @ basis
        wanted += residual / max(1, np.linalg.norm(residual) / 0.8)
        number += bool(mine)
    reservation: Any = Recorder(plan)
    found, cached = ball_sum(collection(tmp_path, vectors, units), ball, plan, reservation, "k")
    assert found[:-1] == pytest.approx(wanted, abs=1e-4) and found[-1] == pytest.approx(number, abs=1e-4)
    assert not cached and reservation.calls == [(BALL_SUM, GaussianDpEvent(1e-9))]


def test_the_mean_of_the_nearest_by_hand(tmp_path):
    vectors, units = unit_vectors(40), [i // 4 for i in range(40)]
    best = [max(range(4 * u, 4 * u + 4), key=lambda i: vectors[i][0]) for u in range(10)]
    best.sort(key=lambda i: -vectors[i][0])
    for k in (1, 3, 10, 25):
        plan = NearestPlan(k, 1e-9, 1)
        reservation: Any = Recorder(plan)
        found, cached = nearest_mean(collection(tmp_path, vectors, units), X, plan, reservation, "k")
        assert found == pytest.approx(
            vectors[best[:k]].sum(0) / k, abs=1e-4
        )  # by k, also where fewer are there
        assert not cached and reservation.calls == [(NEAREST_MEAN, GaussianDpEvent(1e-9))]


def test_a_unit_whose_vectors_fill_the_first_ranks_does_not_hide_the_others(tmp_path):
    """Fewer than k units among the first ranks, and all the rest far away."""
    close = unit_vectors(40, 2) * 0.01 + X
    close = close / np.linalg.norm(close, axis=1, keepdims=True)
    vectors, units = np.concatenate([close, -close[:6]]), [0] * 40 + list(range(1, 7))
    total = nearest_total(collection(tmp_path, vectors, units), X, NearestPlan(4, 1.0, 1))
    assert np.array(total) / FINE == pytest.approx(X - 3 * X, abs=0.2)


# --- one unit more


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=24), st.integers(0, 999), st.integers(0, 9),
    st.sampled_from([1e-300, 0.3, 5.0, 1e300]), st.floats(-3, 3), st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_one_unit_moves_sums_by_its_part_and_touches_nobody_elses(
    tmp_path_factory, units, seed, twins, radius, weight, columns
):
    """Owners of many vectors, duplicates among and across them, any clip radius, wherever the unit comes in."""
    folder, rng = tmp_path_factory.mktemp("x"), np.random.default_rng(seed)
    vectors = unit_vectors(len(units), seed)
    vectors[:twins] = vectors[0]
    gone = int(rng.choice(units))
    kept = np.array(units) != gone
    basis = None if columns is None else np.linalg.qr(rng.normal(size=(D, columns)))[0]
    plan = ball_plan(radius=radius, count_weight=10**weight, basis=basis, per_unit_cap=3)
    both = [collection(folder, vectors[some], np.array(units)[some]) for some in (kept | True, kept, ~kept)]
    reservations: list[Any] = [Recorder(plan) for _ in both]
    thresholds = (-2.0, float(vectors[0, 0]) - 1e-6, 0.4, 2.0)
    for threshold in thresholds:
        ball = Ball(X, threshold, rng.normal(size=D) / 3)
        whole, less, alone = (ball_total(private, ball, plan) for private in both)
        assert [a - b for a, b in zip(whole, less, strict=True)] == alone and squared(alone) <= FINE**2
        for private, reservation in zip(both, reservations, strict=True):
            ball_sum(private, ball, plan, reservation, str(threshold))
    charged = [used(private) for private in both]
    assert charged[0] == charged[1] | charged[2]  # to the last bit
    assert max(charged[0].values()) <= 3 * USED_UNIT
    for k in (1, 2, 5, 30):
        whole, less = (nearest_total(private, X, NearestPlan(k, 1.0, 1)) for private in both[:2])
        assert squared(np.subtract(whole, less)) <= (2 * FINE) ** 2


def test_deleting_a_unit_is_never_having_had_it_and_its_budget_outlives_it(tmp_path):
    vectors, units, plan = unit_vectors(12), [i % 3 for i in range(12)], ball_plan(per_unit_cap=5)
    private, reservation = collection(tmp_path, vectors, units), Recorder(plan)
    ball_sum(private, EVERYWHERE, plan, reservation, "a")  # type: ignore[arg-type]
    before, kept = used(private), np.array(units) != 1
    private.delete([str(i) for i in range(12) if units[i] == 1])
    assert used(private) == before and private._state.answer("a") is None
    without = collection(tmp_path, vectors[kept], np.array(units)[kept])
    assert ball_total(private, EVERYWHERE, plan) == ball_total(without, EVERYWHERE, plan)
    private.add(vectors[[1]], ["1"], ["u1"])
    assert used(private) == before
    ball_sum(private, EVERYWHERE, plan, reservation, "a")  # type: ignore[arg-type]
    assert all(used(private)[unit] > before[unit] for unit in before) and reservation.begun(BALL_QUERY) == 2


# --- sampling


def test_rows_are_those_of_a_poisson_sample_of_units(tmp_path):
    """The rows of top-k of a Poisson sample, for owners of several vectors, against all 2^units samples."""
    q, k, units = 0.4, 2, np.array([0, 1, 0, 2, 1, 3, 4, 0])
    vectors = unit_vectors(8, 5)
    order = list(np.argsort(-vectors[:, 0], kind="stable"))
    chances: Counter[tuple[int, ...]] = Counter()
    for coins in itertools.product((0, 1), repeat=5):
        chosen: dict[int, int] = {}
        for row in order:
            if coins[units[row]]:
                chosen.setdefault(int(units[row]), int(row))
        chances[tuple(list(chosen.values())[:k])] += math.prod(q if coin else 1 - q for coin in coins)  # type: ignore[assignment]
    private, plan, runs = collection(tmp_path, vectors, units), NearestPlan(k, 1.0, 1, q), 3000
    seen = Counter(tuple(private_query._heads(private, X, plan, None).tolist()) for _ in range(runs))
    assert set(seen) <= set(chances)
    statistic = sum((seen[rows] - runs * p) ** 2 / (runs * p) for rows, p in chances.items())
    assert statistic < chi2.isf(ALARM, len(chances) - 1)


def test_each_unit_tosses_once_and_only_heads_are_found(tmp_path, monkeypatch):
    """Owners of many vectors, some deleted: a look at the first ranks is not enough."""
    tossed: list[int] = []

    class Coins:
        def bernoulli(self, p: float, n: int) -> np.ndarray:
            tossed.append(n)
            return np.arange(n) % 3 == 0

    monkeypatch.setattr(private_query, "SecureStream", Coins)
    vectors, owner = unit_vectors(300), np.arange(300) % 30
    private = collection(tmp_path, vectors, owner)
    private.delete([str(i) for i in range(300) if i % 30 == 3])
    found = private_query._heads(private, X, NearestPlan(20, 1.0, 1, 0.5), None)
    assert tossed == [30]
    best = {
        unit: max(np.flatnonzero(owner == unit), key=lambda row: vectors[row] @ X) for unit in range(0, 30, 3)
    }
    assert found.tolist() == sorted(
        (best[unit] for unit in best if unit != 3), key=lambda row: -float(vectors[row] @ X)
    )


# --- charging


QUESTIONS = {
    "nearest": (NearestPlan(3, 2.0, 4, 0.5), NEAREST_MEAN),
    "ball": (ball_plan(queries=4), BALL_SUM),
    "budgets": (ball_plan(queries=4, per_unit_cap=9), BALL_QUERY),
}


def ask(private: ProtectedVectors, plan: Any, reservation: Any, key: str) -> tuple[np.ndarray, bool]:
    if isinstance(plan, NearestPlan):
        return nearest_mean(private, X, plan, reservation, key)
    return ball_sum(private, EVERYWHERE, plan, reservation, key)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_the_same_question_is_free_and_none_is_answered_beyond_the_plan(tmp_path, kind):
    plan, mechanism = QUESTIONS[kind]
    private, reservation = collection(tmp_path, unit_vectors(6)), reserved(tmp_path, plan)
    first = [ask(private, plan, reservation, str(i))[0].tolist() for i in range(4)]
    assert len({tuple(answer) for answer in first}) == 4  # fresh noise each
    before = used(private)
    other = ProtectedVectors(private.folder, D)
    for handle in (private, other):
        for i in range(4):
            value, cached = ask(handle, plan, reservation, str(i))
            assert cached and value.tolist() == first[i]
        with pytest.raises(LedgerError, match="4 of 4"):
            ask(handle, plan, reservation, "new")
        assert private._state.answer("new") is None and used(private) == before
    assert reservation.begun(mechanism) == 4


@pytest.mark.parametrize("kind", QUESTIONS)
def test_nothing_is_drawn_used_or_kept_before_it_is_on_the_ledger(tmp_path, kind, monkeypatch):
    plan, mechanism = QUESTIONS[kind]
    private, reservation = collection(tmp_path, unit_vectors(6)), reserved(tmp_path, plan)
    draws: list[Any] = []
    real = private_query.discrete_gaussian
    priced = (
        BALL_BUDGETS if kind == "budgets" else mechanism
    )  # a query in them is free, and counted afterwards

    def drawing(*given: Any) -> Any:
        assert reservation.begun(priced) == len(draws) + 1
        draws.append(given)
        return real(*given)

    monkeypatch.setattr(private_query, "discrete_gaussian", drawing)
    with monkeypatch.context() as patch:

        def refuse(self: Any, name: str, event: Any, **more: Any) -> None:
            raise LedgerError("refused")

        patch.setattr(type(reservation), "begin", refuse)
        with pytest.raises(LedgerError, match="refused"):
            ask(private, plan, reservation, "k")
    assert not draws and private._state.answer("k") is None and not any(used(private).values())
    other = replace(plan, noise_multiplier=1.0)
    with pytest.raises(LedgerError, match="not what was reserved"):
        ask(private, other, reservation, "k")
    assert not draws and private._state.answer("k") is None
    ask(private, plan, reservation, "k")
    assert len(draws) == 1


def test_noise_and_cap_may_not_be_exchanged_for_others_with_the_same_price(tmp_path):
    """σ/√L is the same, but what units used was counted at another σ."""
    plan = ball_plan(noise_multiplier=1.0, per_unit_cap=1)
    private, reservation = collection(tmp_path, unit_vectors(6)), reserved(tmp_path, plan)
    ask(private, plan, reservation, "a")
    for other in (replace(plan, noise_multiplier=2.0, per_unit_cap=4), replace(plan, queries=60)):
        with pytest.raises(LedgerError, match="not what was reserved"):
            ask(private, other, reservation, "b")
    ask(private, plan, reservation, "b")


@pytest.mark.parametrize("kind", QUESTIONS)
def test_killed_while_the_noise_is_drawn_what_is_priced_stays_begun_and_the_next_is_answered(
    tmp_path, kind, monkeypatch
):
    plan, mechanism = QUESTIONS[kind]
    priced = BALL_BUDGETS if kind == "budgets" else mechanism
    private, reservation = collection(tmp_path, unit_vectors(6)), reserved(tmp_path, plan)

    def die(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(private_query, "discrete_gaussian", die)
        with pytest.raises(KeyboardInterrupt):
            ask(private, plan, reservation, "k")
    assert private._state.answer("k") is None and reservation.begun(priced) == 1
    before = reservation.begun(mechanism)
    value, cached = ask(ProtectedVectors(private.folder, D), plan, reservation, "k")
    assert not cached and np.isfinite(value).all() and reservation.begun(mechanism) == before + 1


def test_an_older_copy_of_the_state_answers_nothing(tmp_path):
    plan = QUESTIONS["budgets"][0]
    private, reservation = collection(tmp_path, unit_vectors(6)), reserved(tmp_path, plan)
    ask(private, plan, reservation, "a")
    shutil.copy(private.folder / "state.db", tmp_path / "old")
    ask(private, plan, reservation, "b")
    shutil.copy(tmp_path / "old", private.folder / "state.db")
    for handle in (private, ProtectedVectors(private.folder, D)):
        for key in ("c", "a"):  # nor what was paid for: this file's word for it is not to be trusted
            with pytest.raises(LedgerError, match="older copy"):
                ask(handle, plan, reservation, key)


# --- budgets of units


def cost_of(private: ProtectedVectors, ball: Ball, plan: BallPlan) -> int:
    """What the only unit of a collection pays, rounded up."""
    return -(-squared(ball_total(private, ball, plan)) * USED_UNIT // FINE**2)


@pytest.mark.parametrize("cap", [1, 2])
def test_a_unit_drops_out_exactly_when_its_budget_would_not_do(tmp_path, cap):
    plan = ball_plan(per_unit_cap=cap, noise_multiplier=1e-6, radius=2.5, queries=40)
    private, reservation = collection(tmp_path, X[None]), Recorder(plan)
    cost = cost_of(private, EVERYWHERE, plan)
    assert 0.2 * USED_UNIT < cost < 0.4 * USED_UNIT
    times = cap * USED_UNIT // cost
    for i in range(times + 3):
        value, _ = ball_sum(private, EVERYWHERE, plan, reservation, str(i))  # type: ignore[arg-type]
        assert round(value[-1]) == (i < times) and used(private) == {"0": cost * min(i + 1, times)}
    close = Ball(X, -2.0, X)  # a smaller part may still fit
    left, small = cap * USED_UNIT - cost * times, cost_of(private, close, plan)
    value, _ = ball_sum(private, close, plan, reservation, "small")  # type: ignore[arg-type]
    assert round(value[-1]) == (small <= left)


def test_a_budget_that_is_used_up_to_the_last_step_was_enough(tmp_path):
    plan = ball_plan(per_unit_cap=1, noise_multiplier=1e-6)
    private, reservation = collection(tmp_path, X[None]), Recorder(plan)
    cost = cost_of(private, EVERYWHERE, plan)
    for left, here in ((cost, 1), (cost - 1, 0)):
        with sqlite3.connect(private.folder / "state.db") as db:
            db.execute("UPDATE units SET used = ?", [USED_UNIT - left])
            db.execute("UPDATE meta SET used = ?", [USED_UNIT - left])
        db.close()
        value, _ = ball_sum(private, EVERYWHERE, plan, reservation, str(left))  # type: ignore[arg-type]
        assert round(value[-1]) == here
        assert used(private) == {"0": USED_UNIT if here else USED_UNIT - left}


def test_nobody_pays_more_than_the_cap_however_questions_follow_answers(tmp_path):
    plan = ball_plan(per_unit_cap=2, noise_multiplier=0.05, queries=30, radius=0.4)
    private = collection(tmp_path, unit_vectors(25), [i // 2 for i in range(25)])
    reservation: Any = reserved(tmp_path, plan)
    direction, seen = X, []
    for i in range(30):
        ball = Ball(direction, 0.2, direction / 2)
        answer, _ = ball_sum(private, ball, plan, reservation, str(i))
        direction = (answer[:-1] + 0.3 * direction) / np.linalg.norm(answer[:-1] + 0.3 * direction)
        seen.append(used(private))
        assert max(seen[-1].values()) <= 2 * USED_UNIT
    assert all(a[unit] <= b[unit] for a, b in itertools.pairwise(seen) for unit in a)
    assert max(seen[-1].values()) > 1.5 * USED_UNIT and reservation.begun(BALL_BUDGETS) == 1


def adaptive_losses(cap: int, noise: float, runs: int, filtered: bool = True) -> np.ndarray:
    """Privacy losses of an adversary that picks each question by the last answer: it asks for the largest part after an
    answer that speaks for the canary, hoping to spend more than the cap where that pays."""
    rng = np.random.default_rng(0)
    loss, spent, last = np.zeros(runs), np.zeros(runs), np.zeros(runs)
    for _ in range(12 * cap):
        part = np.where(last > 0, 1.0, np.where(loss > 0, 0.5, 0.8))
        here = (spent + part**2 <= cap) | (not filtered)
        part = part * here
        last = part + noise * rng.normal(size=runs) - part / 2
        loss += last * part / noise**2
        spent += part**2
    return loss


@pytest.mark.parametrize(("cap", "noise"), [(1, 1.0), (4, 2.0), (9, 6.0)])
def test_the_budgets_event_bounds_adaptive_questions(cap, noise):
    runs, total = 80_000, ball_plan(noise_multiplier=noise, per_unit_cap=cap).total_noise_multiplier
    for epsilon in (0.2, 0.5, 1.0, 2.0):
        stated = gaussian_delta(total, epsilon)
        gains = np.maximum(0, -np.expm1(epsilon - adaptive_losses(cap, noise, runs)))
        assert gains.mean() - 6 * gains.std() / math.sqrt(runs) <= stated
        broken = np.maximum(0, -np.expm1(epsilon - adaptive_losses(cap, noise, runs, filtered=False)))
        assert broken.mean() - 6 * broken.std() / math.sqrt(runs) > stated  # this test would see it


# --- two at a time


WORKER = """
import sys, json
import numpy as np
from pathlib import Path
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import Ball, BallPlan, ball_sum
from sfumato.privacy.protected_vectors import ProtectedVectors
folder, ledger, name = sys.argv[1:]
plan = BallPlan(2.0, 0.8, 50, per_unit_cap=3)
(reservation,) = Ledger.open(ledger).reservations()
private = ProtectedVectors(Path(folder), 4)
print("ready", flush=True)
sys.stdin.readline()
told = {}
for i in range(10):
    for key in (f"both {i}", f"{name} {i}"):
        told[key] = ball_sum(private, Ball(np.eye(4)[i % 4], -0.2, np.zeros(4)), plan, reservation, key)[0].tolist()
print(json.dumps(told))
"""


def test_two_processes_ask_the_same_and_other_questions(tmp_path):
    plan = ball_plan(per_unit_cap=3)
    private, reservation = (
        collection(tmp_path, unit_vectors(20), [i // 2 for i in range(20)]),
        reserved(tmp_path, plan),
    )
    (ledger,) = tmp_path.glob("*.db")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(private.folder), str(ledger), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    told = [json.loads(worker.communicate("\n", timeout=120)[0]) for worker in workers]
    assert all(told[0][f"both {i}"] == told[1][f"both {i}"] for i in range(10))
    assert reservation.begun(BALL_QUERY) == 30 and reservation.begun(BALL_BUDGETS) == 1
    charged = used(ProtectedVectors(private.folder, D))  # the sums add up
    assert 2 * USED_UNIT < max(charged.values()) <= 3 * USED_UNIT
    assert reservation.ledger.verify()
