"""Plans cost what they may, what would do does, and shrinkage brings the token nearer to the truth."""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dp_accounting.dp_event import DiscreteLaplaceDpEvent, GaussianDpEvent, PoissonSampledDpEvent

from sfumato.errors import BudgetError, InputError
from sfumato.personalization.aggregation import (
    LARGEST_SHARE_OF_SELECTION,
    TOO_NOISY,
    Geometry,
    cosine,
    geometry,
    make_plan,
    noise_length,
    norm_report,
    shrunk,
    what_would_do,
)
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.vectors import NEAREST, VECTOR_MEAN, vector_mean

sys.path.insert(0, str(Path(__file__).parent))
from test_style_bank import KEPT, WIDTH, bank

ONE = Budget(1.0, 1e-5)


def shape(directions=8, *, signal=0.5, dimension=20, radius=1.0) -> Geometry:
    """As a bank would give it: spread falling from direction to direction, of the given signal altogether."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(dimension, dimension)))[0][:, :directions]
    spread = 1.0 / (1 + np.arange(directions))
    return Geometry(np.linspace(-1, 1, dimension), radius, basis, spread * signal**2 / spread.sum())


@cache
def calibrated(method, select=False):
    return make_plan(method, ONE, 1000, shape(), candidates=20, select=select)


def plan_of(method="dpagg-ti", units=30, geometry=None, select=False):
    """A plan for ε 1 that need not be calibrated again: neither units nor geometry change the noise multiplier (with a
    vote they would, by a little)."""
    return dataclasses.replace(calibrated(method, select), units=units, geometry=geometry or shape())


def cost(plan, budget) -> float:
    return epsilon_of([event.total for event in plan.events], budget.delta)


# --- where tokens are measured from


def test_the_geometry_of_each_method():
    made, words = bank(), np.random.default_rng(1).normal(size=(50, WIDTH))
    anchor = made.anchor
    ours = geometry("dpagg-ti", anchor, words, made)
    assert np.array_equal(ours.center, anchor.astype(float)) and ours.directions == KEPT
    assert np.array_equal(ours.basis, made.directions(None)) and ours.radius == made.radius(ours.basis)
    assert np.array_equal(ours.spread, made.spread(ours.basis, ours.radius))
    assert ours.signal == pytest.approx(math.sqrt(ours.spread.sum())) and 0 < ours.signal <= ours.radius
    assert geometry("dpagg-ti", anchor, words, made, 2).directions == 2
    mean = geometry("mean", anchor, words, made, 2)
    assert mean.basis is None and mean.directions == WIDTH and mean.radius == made.radius(None) > ours.radius
    paper = geometry("paper", anchor, words, made)
    assert not paper.center.any() and paper.radius == paper.signal == 1 and paper.directions == WIDTH
    with pytest.raises(InputError, match=f"has {KEPT} directions, not 4"):
        geometry("dpagg-ti", anchor, words, made, 4)


def test_without_a_bank_the_vocabulary_tells_the_radius():
    words = np.zeros((5, 3))
    words[:, 0] = (0, 1, 2, 3, 100)
    found = geometry("dpagg-ti", words[0].astype(np.float32), words, None)
    assert (
        found.radius == found.signal == 2.5 and found.basis is None and found.spread is None
    )  # the anchor aside
    assert found.center.dtype == np.float64 and found.directions == 3


# --- what a plan costs


@pytest.mark.parametrize(
    ("method", "select", "epsilon"),
    [("dpagg-ti", False, 0.3), ("dpagg-ti", True, 1.0), ("mean", True, 4.0), ("paper", False, 0.5)],
)
def test_a_plan_costs_exactly_the_budget(method, select, epsilon):
    budget = Budget(epsilon, 1e-5)
    plan = make_plan(method, budget, 50, shape(), candidates=20, select=select)
    assert 0.999 * epsilon < cost(plan, budget) <= epsilon
    events = plan.events
    assert [event.mechanism for event in events] == ([NEAREST] if select else []) + [VECTOR_MEAN]
    assert events[-1].event == GaussianDpEvent(plan.noise_multiplier) and events[-1].count == 1
    if select:
        assert events[0].event == DiscreteLaplaceDpEvent(plan.selection_epsilon, 1)
    assert ("made" if method == "paper" else "clipped") in events[-1].says and "public directions" in events[
        -1
    ].says


def test_a_sampled_plan_costs_exactly_the_budget_and_divides_by_who_is_expected():
    plan = make_plan("paper", ONE, 60, Geometry(np.zeros(20), 1.0), sampling_probability=0.25)
    assert 0.999 < cost(plan, ONE) <= 1
    assert plan.events[0].event == PoissonSampledDpEvent(0.25, GaussianDpEvent(plan.noise_multiplier))
    mean = plan.mean()
    assert mean.divisor == 15 and mean.sampling_probability == 0.25 and mean.normalise
    assert plan.noise_multiplier < calibrated("paper").noise_multiplier
    assert noise_length(plan) == pytest.approx(plan.noise_multiplier / 15 * math.sqrt(20))


def test_the_mechanism_and_the_plan_are_of_one_mind(tmp_path):
    """What is reserved is what the mechanism begins, on a real ledger, and the noise is as long as was planned."""
    plan = plan_of()
    length, seen = noise_length(plan), []

    class Embed:
        dimension, batch_size = 20, 4

        def __call__(self, images, steps=None):
            if steps is not None:  # the self-test wants vectors that differ
                return np.repeat(images.mean(axis=(1, 2, 3))[:, None], 20, 1)
            return np.repeat(plan.geometry.center[None], len(images), 0)  # residuals of zero: all is noise

    private = SimpleNamespace(
        _images=np.zeros((30, 2, 2, 1), np.uint8), _units=[np.array([i]) for i in range(30)]
    )
    ledger = Ledger.open(tmp_path / "ledger.db", total=ONE)
    reservation = ledger.reserve("test", plan.events, delta=1e-5, key="test")
    for turn in range(60):
        held = SimpleNamespace(begin=lambda *_: None) if turn else reservation
        token, _ = vector_mean(private, Embed(), plan.mean(), held)
        seen.append(np.square(token - plan.geometry.center).sum())
    reservation.settle()
    assert ledger.spent.epsilon == pytest.approx(cost(plan, ONE))
    assert np.sqrt(np.mean(seen)) == pytest.approx(length, rel=6 / math.sqrt(2 * 60 * 8))


def test_selection_alone_costs_all_of_epsilon_and_no_delta():
    plan = calibrated("selection")
    assert plan.noise_multiplier is None and plan.noise_share == 0 and plan.selection_epsilon == 1
    assert len(plan.events) == 1 and epsilon_of([plan.events[0].total], 0.0) == 1


@pytest.mark.parametrize(("units", "epsilon"), [(3, 0.5), (50, 0.5), (10_000, 0.5), (50, 2.0), (500, 2.0)])
def test_the_votes_share_is_enough_but_never_much(units, epsilon):
    budget, candidates = Budget(epsilon, 1e-5), 20
    share = make_plan(
        "dpagg-ti", budget, units, shape(), candidates=candidates, select=True
    ).selection_epsilon
    assert 0 < share <= LARGEST_SHARE_OF_SELECTION * epsilon
    # permute-and-flip lets a candidate that is `behind` votes behind win with at most exp(-share * behind)
    if share < LARGEST_SHARE_OF_SELECTION * epsilon:
        assert candidates * math.exp(-share * units / 4) == pytest.approx(1 / 20)


@pytest.mark.parametrize(("method", "select"), [("selection", False), ("dpagg-ti", True)])
@pytest.mark.parametrize("candidates", [0, 1])
def test_there_must_be_something_to_vote_for(method, select, candidates):
    with pytest.raises(InputError, match="two or more; no budget was spent"):
        make_plan(method, ONE, 50, shape(), candidates=candidates, select=select)


def test_what_no_noise_can_meet_is_refused():
    with pytest.raises(InputError, match="no budget was spent"):
        make_plan("dpagg-ti", Budget(1.0, 0.0), 50, shape())
    with pytest.raises((InputError, BudgetError)):
        make_plan("dp-sgd", ONE, 50, shape())


# --- how much noise, and what would do


def test_noise_share_is_noise_over_signal():
    plan = plan_of(units=40, geometry=shape(8, signal=0.25, radius=2.0))
    assert plan.noise_share == pytest.approx(plan.noise_multiplier * 2.0 / 40 * math.sqrt(8) / 0.25)
    more = dataclasses.replace(plan, units=80)
    assert more.noise_share == pytest.approx(plan.noise_share / 2)


@pytest.mark.parametrize(
    ("units", "epsilon", "sampling", "directions"),
    [(40, 1.0, 1.0, 8), (5, 2.0, 1.0, 16), (900, 0.1, 1.0, 4), (50, 1.0, 0.5, 8)],
)
def test_what_would_do_does_and_less_does_not(units, epsilon, sampling, directions):
    """With exactly as much noise as may be, the returned units and ε are just enough."""
    budget = Budget(epsilon, 1e-5)
    plan = make_plan("dpagg-ti", budget, units, shape(directions), sampling_probability=sampling)

    def noisiest(units):
        loud = dataclasses.replace(plan, units=units).noise_share
        return dataclasses.replace(
            plan, units=units, noise_multiplier=plan.noise_multiplier * TOO_NOISY / loud
        )

    enough, least = what_would_do(plan, budget)
    assert isinstance(enough, int)
    assert noisiest(units).noise_share == pytest.approx(TOO_NOISY)
    assert cost(noisiest(enough), budget) <= epsilon < cost(noisiest(enough - 1), budget)
    assert cost(noisiest(units), budget) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize(("units", "select"), [(40, False), (10, True), (300, True)])
def test_a_plan_for_what_would_do_is_not_too_noisy_and_for_less_it_is(units, select):
    """Also with a vote, whose price moves with the units and with ε."""

    def made(units, budget):
        return make_plan("dpagg-ti", budget, units, shape(), candidates=30, select=select)

    enough, least = what_would_do(made(units, ONE), ONE)
    assert made(enough, ONE).noise_share <= TOO_NOISY < made(enough - 1, ONE).noise_share
    assert made(units, Budget(1.0002 * least, 1e-5)).noise_share <= TOO_NOISY
    assert made(units, Budget(0.995 * least, 1e-5)).noise_share > TOO_NOISY


# --- shrinkage


def draws(plan, truth, count=2000, seed=0):
    """Noisy tokens [count, D] as the mechanism would release them for true residuals [D] or [count, D]."""
    rng, geometry_ = np.random.default_rng(seed), plan.geometry
    noise = rng.normal(size=(count, geometry_.directions)) * plan.mean().noise
    return geometry_.center + truth + (noise if geometry_.basis is None else noise @ geometry_.basis.T)


def errors(plan, truth, tokens) -> tuple[float, float]:
    """Mean squared error without shrinkage and with."""
    center = plan.geometry.center
    found = np.array([shrunk(token, center, plan) for token in tokens])
    return tuple(float(np.square(some - center - truth).sum(1).mean()) for some in (tokens, found))


def test_shrinkage_with_a_prior_has_the_least_error_that_a_linear_estimate_can_have():
    plan = plan_of(units=20)
    spread, variance = plan.geometry.spread, plan.mean().noise ** 2
    truth = np.random.default_rng(5).normal(size=(2000, 8)) * np.sqrt(spread) @ plan.geometry.basis.T
    plain, better = errors(plan, truth, draws(plan, truth))
    assert plain == pytest.approx(8 * variance, rel=0.1)
    assert better == pytest.approx(float((spread * variance / (spread + variance)).sum()), rel=0.1)
    assert better < 0.6 * plain


def test_shrinkage_with_a_prior_is_along_each_direction_and_about_the_centre():
    plan = plan_of(geometry=shape(3))
    center, basis, spread = np.full(20, 7.0), plan.geometry.basis, plan.geometry.spread
    along = np.array([1.0, -2.0, 0.5])
    found = shrunk(center + basis @ along, center, plan) - center
    assert np.allclose(found, basis @ (along * spread / (spread + plan.mean().noise ** 2)))
    assert np.array_equal(shrunk(center, center, plan), center)


@pytest.mark.parametrize("length", [0.0, 0.3, 1.0, 3.0])
def test_without_a_prior_james_stein_is_never_worse(length):
    plan = plan_of(geometry=Geometry(np.ones(30), 1.0))
    truth = np.zeros(30)
    truth[3] = length
    plain, better = errors(plan, truth, draws(plan, truth))
    assert plain == pytest.approx(30 * plan.mean().noise ** 2, rel=0.1)
    bound = 30 - 28 * 28 / (28 + length**2 / plan.mean().noise ** 2)  # of the factor that may be negative
    assert better <= 1.02 * bound * plan.mean().noise ** 2 and better < 0.99 * plain


def test_james_stein_by_hand_and_never_beyond_the_centre():
    plan = plan_of(geometry=Geometry(np.zeros(10), 1.0))
    variance, residual = plan.mean().noise ** 2, np.zeros(10)
    residual[2] = 2.0
    center = np.full(10, -3.0)
    assert np.allclose(shrunk(center + residual, center, plan), center + residual * (1 - 8 * variance / 4))
    assert np.allclose(shrunk(center + 1e-3 * residual, center, plan), center)  # the positive part
    assert np.array_equal(shrunk(center, center, plan), center)


@pytest.mark.parametrize("method", ["mean", "paper"])
def test_other_methods_are_released_as_they_are(method):
    plan = plan_of(method)
    token = np.random.default_rng(0).normal(size=20)
    assert np.array_equal(shrunk(token, np.zeros(20), plan), token)
    assert np.array_equal(shrunk(token, token + 1, plan_of("selection")), token)


def test_a_centre_that_was_chosen_is_what_the_mean_is_measured_from():
    plan = plan_of(select=True)
    chosen = np.arange(20, dtype=np.float32)
    assert (
        np.array_equal(plan.mean(chosen).center, np.arange(20.0))
        and plan.mean(chosen).center.dtype == np.float64
    )
    assert np.array_equal(plan.mean().center, plan.geometry.center)
    assert dataclasses.replace(plan.mean(chosen), center=plan.mean().center).noise == plan.mean().noise


# --- what is said about tokens


def test_cosine():
    assert cosine(np.array([[1.0, 0.0]]), np.array([1.0, 1.0])) == pytest.approx(math.sqrt(0.5))
    assert cosine(np.array([2.0, 1.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0])) == pytest.approx(-1)
    assert cosine(np.zeros(3), np.ones(3)) == 0


def test_norms_of_each_text_encoder_beside_its_vocabulary():
    words = np.zeros((101, 2))
    words[:, 0] = np.arange(101)
    found = norm_report([np.array([[3.0, 4.0], [0.0, 1.0]]), np.ones((2, 4))], [words, np.ones((7, 4))])
    assert found == [
        {"token_norms": [5.0, 1.0], "vocabulary_median": 50.0, "vocabulary_95_percent": 95.0},
        {"token_norms": [2.0, 2.0], "vocabulary_median": 2.0, "vocabulary_95_percent": 2.0},
    ]
