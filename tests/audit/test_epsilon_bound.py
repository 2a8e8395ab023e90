"""The one-run bound: golden values, another implementation's, its limits, and whether it holds over many runs."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import binom

from sfumato.audit import epsilon_bound
from sfumato.audit.calibration import clopper_pearson
from sfumato.audit.epsilon_bound import best_bound, canaries_needed, cap, epsilon_lower_bound, looks_of
from sfumato.errors import InputError


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "printed"),
    [
        (1000, 1000, 1000, "5.78"),
        (1000, 100, 90, "1.63"),
        (1000, 1000, 600, "0.297"),
        (5000, 5000, 2750, "0.153"),
    ],
)
def test_golden_values(canaries, guesses, correct, printed):
    """To the digits that the specification prints, at delta 1e-5 and 95 %."""
    found = epsilon_lower_bound(correct, guesses, canaries, delta=1e-5)
    assert f"{found:.{len(printed) - 2}f}" == printed


# correct, guesses, canaries, delta, significance, epsilon: of `_epsilon_one_run` in jax-privacy 2.0.0 (tolerance 1e-6).
JAX_PRIVACY = [
    (1000, 1000, 1000, 1e-05, 0.05, 5.782283),
    (1000, 1000, 1000, 0.001, 0.05, 3.488995),
    (90, 100, 1000, 1e-05, 0.05, 1.626144),
    (90, 100, 1000, 0.001, 0.05, 0.388474),
    (600, 1000, 1000, 1e-05, 0.05, 0.297227),
    (2750, 5000, 5000, 1e-05, 0.05, 0.153296),
    (2750, 5000, 5000, 0.0, 0.05, 0.153533),
    (1, 1, 1, 1e-05, 0.05, 0.0),
    (19, 20, 20, 1e-06, 0.05, 1.288464),
    (33, 40, 100, 0.001, 0.05, 0.747869),
    (50, 50, 1000, 1e-05, 0.05, 2.756219),
    (50, 50, 1000, 0.001, 0.05, 0.0),
    (1300, 2000, 10000, 1e-06, 0.05, 0.540903),
    (60000, 100000, 100000, 1e-05, 0.05, 0.394580),
    (4000, 5000, 100000, 1e-06, 0.05, 1.327019),
    (200, 300, 300, 0.001, 0.05, 0.457301),
    (500, 1000, 1000, 1e-05, 0.05, 0.0),
    (1000, 1000, 1000, 1e-05, 0.005, 5.135022),
    (90, 100, 1000, 1e-05, 0.005, 1.349533),
    (1300, 2000, 10000, 1e-06, 0.005, 0.497097),
]


@pytest.mark.parametrize(("correct", "guesses", "canaries", "delta", "significance", "theirs"), JAX_PRIVACY)
def test_equal_to_jax_privacy(correct, guesses, canaries, delta, significance, theirs):
    ours = epsilon_lower_bound(correct, guesses, canaries, delta=delta, level=1 - significance)
    assert ours == pytest.approx(theirs, abs=5e-6)


def p_value(epsilon, correct, guesses, canaries, delta):
    """The formula as it is written in the specification."""
    q = np.exp(epsilon) / (1 + np.exp(epsilon))
    beta = binom.sf(correct - 1, guesses, q)
    alpha = max((binom.sf(correct - i - 1, guesses, q) - beta) / i for i in range(1, correct + 1))
    return min(1, beta + 2 * canaries * delta * alpha)


@pytest.mark.parametrize("delta", [0, 1e-6, 1e-4, 0.01, 0.3])
@pytest.mark.parametrize(
    ("correct", "guesses", "canaries"), [(1, 1, 5), (15, 20, 50), (180, 200, 200), (90, 400, 900)]
)
def test_the_window_of_terms_loses_nothing(correct, guesses, canaries, delta):
    for epsilon in (0, 0.1, 0.7, 2, 5, 12):
        assert epsilon_bound._p_value(epsilon, correct, guesses, canaries, delta) == pytest.approx(
            p_value(epsilon, correct, guesses, canaries, delta), rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("delta", [0, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize(
    ("correct", "guesses", "canaries"), [(19, 20, 40), (150, 200, 200), (900, 1000, 5000)]
)
def test_p_crosses_the_level_once(correct, guesses, canaries, delta):
    """So the largest epsilon that is contradicted is where bisection finds it."""
    values = [epsilon_bound._p_value(x, correct, guesses, canaries, delta) for x in np.linspace(0, 10, 200)]
    below = np.array(values) < 0.05
    assert not (np.diff(below.astype(int)) > 0).any()


def test_more_right_guesses_more_canaries_left_open_and_delta():
    bounds = [epsilon_lower_bound(v, 200, 500, delta=1e-5) for v in range(0, 201, 5)]
    assert bounds == sorted(bounds) and bounds[0] == 0 < bounds[-1]
    by_delta = [epsilon_lower_bound(180, 200, 500, delta=delta) for delta in (0, 1e-6, 1e-4, 1e-3, 1e-2)]
    assert by_delta == sorted(by_delta, reverse=True) and by_delta[0] > by_delta[-1]
    by_canaries = [epsilon_lower_bound(180, 200, m, delta=1e-4) for m in (200, 500, 5000)]
    assert by_canaries == sorted(by_canaries, reverse=True) and by_canaries[0] > by_canaries[-1]
    by_level = [epsilon_lower_bound(180, 200, 500, delta=1e-5, level=level) for level in (0.5, 0.95, 0.999)]
    assert by_level == sorted(by_level, reverse=True)


def test_without_delta_it_is_clopper_and_pearsons_lower_end():
    assert epsilon_lower_bound(180, 200, 500, delta=0) == pytest.approx(
        logit(clopper_pearson(180, 200, 0.9)[0])
    )
    assert epsilon_lower_bound(100, 200, 500, delta=0) == 0


@pytest.mark.parametrize("correct", [50_500, 60_000, 99_999, 100_000])
def test_a_hundred_thousand_canaries(correct):
    started = time.process_time()
    exact = epsilon_lower_bound(correct, 100_000, 100_000, delta=0)
    found = epsilon_lower_bound(correct, 100_000, 100_000, delta=1e-9)
    assert 0 < found <= exact and found == pytest.approx(exact, abs=2e-3)
    assert time.process_time() - started < 5


def test_the_cap_is_what_all_right_guesses_give():
    assert f"{cap(1000, 1e-5):.2f}" == "5.78"
    assert cap(4, 1e-5) == 0 < cap(5, 1e-5)
    assert cap(1000, 1e-5, looks=7) == epsilon_lower_bound(1000, 1000, 1000, delta=1e-5, level=1 - 0.05 / 7)


@pytest.mark.parametrize("looks", [1, 7])
@pytest.mark.parametrize("epsilon", [0, 0.5, 1, 4, 5.78])
def test_canaries_needed_is_the_inverse_of_the_cap(epsilon, looks):
    needed = canaries_needed(epsilon, 1e-5, looks=looks)
    assert cap(needed, 1e-5, looks=looks) > epsilon
    assert needed == 1 or cap(needed - 1, 1e-5, looks=looks) <= epsilon


def test_some_claims_are_beyond_all_canaries(monkeypatch):
    """With delta > 0 the cap peaks: at 1e-3 near epsilon 3.5."""
    monkeypatch.setattr(epsilon_bound, "MOST_CANARIES", 20_000)
    peak = max(cap(m, 1e-3) for m in range(50, 2000, 50))
    assert cap(20_000, 1e-3) < peak
    assert canaries_needed(peak - 0.1, 1e-3) < 2000
    with pytest.raises(InputError, match=r"no number of canaries .* epsilon exceeds 5 at delta 0.001"):
        canaries_needed(5, 1e-3)
    for epsilon in (-1, np.inf, np.nan):
        with pytest.raises(InputError, match="cannot be tested"):
            canaries_needed(epsilon, 1e-5)


# Scores


def randomised_response(rng, canaries, epsilon):
    """Scores that say each coin truthfully with probability e^epsilon / (1 + e^epsilon): exactly epsilon-DP."""
    included = rng.random(canaries) < 0.5
    truthful = rng.random(canaries) < 1 / (1 + np.exp(-epsilon))
    return np.where(truthful, included, ~included).astype(float), included


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_randomised_response_is_rarely_exceeded(epsilon):
    """The bound exceeds the true epsilon in at most 5 % of the runs, though the best of seven looks is taken."""
    rng = np.random.default_rng(int(10 * epsilon))
    bounds = [best_bound(*randomised_response(rng, 400, epsilon), delta=1e-5).epsilon for _ in range(300)]
    assert sum(bound > epsilon for bound in bounds) <= 22  # P(Bin(300, 0.05) > 22) = 3 %
    assert epsilon == 0 or np.median(bounds) > 0.4 * epsilon, "valid because it says nothing"


def test_one_look_at_randomised_response_has_its_level():
    """All canaries are guessed: 5 % of the runs exceed epsilon, no more and hardly fewer; the formula is tight."""
    rng = np.random.default_rng(1)
    right = rng.binomial(1000, 1 / (1 + np.exp(-1.0)), 4000)
    exceeded = np.mean([epsilon_lower_bound(int(v), 1000, 1000, delta=0) > 1 for v in right])
    assert 0.03 < exceeded < 0.06


def test_a_planted_leak_is_caught():
    """No noise, epsilon 1 claimed: members score higher. 1,000 canaries show several times the claim."""
    rng = np.random.default_rng(0)
    included = rng.random(1000) < 0.5
    found = best_bound(rng.normal(size=1000) + 6 * included, included, delta=1e-5)
    assert found.epsilon > 3
    assert found.correct <= found.guesses <= found.canaries == 1000
    assert found.epsilon <= found.cap == pytest.approx(cap(1000, 1e-5, looks=found.looks))


def test_a_generator_that_repeats_some_canaries_only():
    """Of 500 members 40 are recognised, the others look like non-members: few, one-sided guesses find it."""
    rng = np.random.default_rng(3)
    included = rng.random(1000) < 0.5
    scores = rng.normal(size=1000)
    scores[np.flatnonzero(included)[:40]] += 20
    found = best_bound(scores, included, delta=1e-5)
    assert found.epsilon > 1 and (found.guesses, found.correct) == (50, 50 - sum_of_misses(scores, included))
    assert best_bound(scores, included, delta=1e-5, guesses=(1.0,)).epsilon < 0.5


def sum_of_misses(scores, included):
    return int((~included[np.argsort(-scores)[:50]]).sum())


def test_the_wrong_way_round_shows_nothing():
    rng = np.random.default_rng(0)
    included = rng.random(500) < 0.5
    assert best_bound(-10.0 * included, included, delta=1e-5).epsilon == 0


def test_equal_scores_show_nothing_in_whatever_order():
    """Members listed first must not pass for members that score first."""
    for included in (np.repeat([True, False], 500), np.repeat([False, True], 500)):
        assert best_bound(np.zeros(1000), included, delta=1e-5).epsilon < 0.1


def test_looks_are_fixed_beforehand():
    assert looks_of(1000) == [(500, 500), (250, 250), (500, 0), (100, 100), (200, 0), (25, 25), (50, 0)]
    assert looks_of(1) == [(1, 0)]
    assert looks_of(10, (1.0,)) == [(5, 5)]
    for canaries in (1, 2, 3, 7, 50):
        assert all(0 < above + below <= canaries for above, below in looks_of(canaries))


def test_each_look_gets_its_share_of_the_level():
    rng = np.random.default_rng(0)
    included = rng.random(300) < 0.5
    scores = included + rng.normal(size=300)
    found = best_bound(scores, included, delta=1e-5)
    assert found.looks == len(looks_of(300))
    split = epsilon_lower_bound(found.correct, found.guesses, 300, delta=1e-5, level=1 - 0.05 / found.looks)
    assert found.epsilon == pytest.approx(split)
    assert found.epsilon < epsilon_lower_bound(found.correct, found.guesses, 300, delta=1e-5)


def test_bad_input():
    yes = np.array([True, False])
    for count in ((3, 2, 5), (1, 6, 5), (-1, 2, 5), (0, 0, 0)):
        with pytest.raises(InputError, match="is no count"):
            epsilon_lower_bound(*count, delta=0)
    with pytest.raises(InputError, match="delta"):
        epsilon_lower_bound(1, 1, 1, delta=-1e-9)
    with pytest.raises(InputError, match="delta"):
        best_bound(np.zeros(2), yes, delta=1)
    with pytest.raises(InputError, match="confidence level"):
        cap(10, 0, 1.0)
    with pytest.raises(InputError, match="not finite"):
        best_bound(np.array([np.nan, 1]), yes, delta=0)
    for scores, included in (
        (np.zeros(3), yes),
        (np.zeros(0), np.zeros(0, bool)),
        (np.zeros(2), np.zeros(2)),
    ):
        with pytest.raises(InputError, match="one of each"):
            best_bound(scores, included, delta=0)
    with pytest.raises(InputError, match="share"):
        looks_of(10, (0.0,))
    with pytest.raises(InputError, match="0 looks"):
        cap(10, 0, looks=0)
