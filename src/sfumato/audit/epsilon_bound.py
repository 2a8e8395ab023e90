"""A lower bound on ε from canaries and one training run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

m canaries are drawn; a fair coin each, thrown before training and kept secret, decides whether it is trained on. After
training every canary has a score; those with the highest are guessed "in", those with the lowest "out",
the rest is left open. If training is (ε, δ)-DP by adding or removing one image, hardly more than a share
e^ε / (1 + e^ε) of the guesses can be right.

What it says: if the bound exceeds the ε that is claimed, then at the given level the claim is false, most often by
a bug. A low bound is no evidence of privacy: it may mean a weak attack, and m canaries cannot show more than `cap`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sfumato.errors import InputError

SHARES = (1.0, 0.5, 0.2, 0.05)
"""Shares of the canaries that are guessed. Fixed before any score is seen; an attack that is sure of a few canaries
only needs few guesses, a weak but broad one many."""
MOST_CANARIES = 1_000_000
SPREAD = 12  # standard deviations of a binomial beyond which its terms are below 1e-30


@dataclass(frozen=True)
class Bound:
    """epsilon: the lower bound, 0 when nothing can be said. correct of guesses: the counts of the best look.

    canaries: m. cap: the bound that these canaries would give had all guesses of every look been right; looks: in how
    many ways the guesses were chosen, each at level 1 - (1 - level) / looks (Bonferroni), so that
    the best of them holds at `level`.
    """

    epsilon: float
    correct: int
    guesses: int
    canaries: int
    cap: float
    looks: int


def epsilon_lower_bound(
    correct: int, guesses: int, canaries: int, *, delta: float, level: float = 0.95
) -> float:
    """Largest ε that v = `correct` of r = `guesses` guesses about m = `canaries` canaries contradict; at least 0.

    Theorem 5.2 of Steinke et al.: if training is (ε, δ)-DP, so many right guesses have probability at most
        p(ε) = min(1, β + 2 m δ α),  q = e^ε / (1 + e^ε),  β = P[Bin(r, q) >= v],
        α = max over 1 <= i <= v of P[v > Bin(r, q) >= v - i] / i,
    and the bound is the ε where p reaches 1 - level. With δ = 0 it is the logit of the Clopper-Pearson
    lower end v of r. The number of guesses, and which, must not depend on what is in and what is out.
    InputError unless 0 <= v <= r <= m, m >= 1, 0 <= δ < 1 and 0 < level < 1.
    """
    from scipy.optimize import root_scalar
    from scipy.special import betaincinv, logit

    _check(delta, level)
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise InputError(
            f"{correct} right of {guesses} guesses about {canaries} canaries is no count; nothing was audited"
        )
    failure = 1 - level

    def lacking(epsilon: float) -> float:
        return _p_value(epsilon, correct, guesses, canaries, delta) - failure

    if correct == 0 or lacking(0.0) >= 0:
        return 0.0
    # Where β alone reaches the level, p is there or beyond.
    high = float(logit(betaincinv(correct, guesses - correct + 1, failure)))
    if delta == 0 or lacking(high) <= 0:
        return high
    return float(root_scalar(lacking, bracket=(0.0, high), xtol=1e-9).root)


def _p_value(epsilon: float, correct: int, guesses: int, canaries: int, delta: float) -> float:
    """p(ε) of Theorem 5.2 for v >= 1; see `epsilon_lower_bound`."""
    from scipy.special import betainc, gammaln

    q = 1 / (1 + math.exp(-epsilon))
    p = float(betainc(correct, guesses - correct + 1, q))  # β
    if delta > 0:
        # α is the largest mean of P[Bin = v - 1], ..., P[Bin = v - i]. The terms rise up to the mode and fall from
        # there on, so no mean that reaches past the terms that are as good as 0 is the largest.
        lowest = guesses * q - SPREAD * math.sqrt(guesses * q * (1 - q)) - SPREAD
        right = np.arange(correct - 1, max(-1, min(math.floor(lowest), correct - 2)), -1)
        wrong = guesses - right
        log_terms = gammaln(guesses + 1) - gammaln(right + 1) - gammaln(wrong + 1)
        log_terms += right * -math.log1p(math.exp(-epsilon)) + wrong * -math.log1p(math.exp(epsilon))
        means = np.cumsum(np.exp(log_terms)) / np.arange(1, len(right) + 1)
        p += 2 * canaries * delta * float(means.max())
    return min(1.0, p)


def cap(canaries: int, delta: float, level: float = 0.95, *, looks: int = 1) -> float:
    """The bound when all guesses about all canaries are right: what m canaries can show at most.

    looks: in how many ways `best_bound` tries to guess (`looks_of`); 1 is the cap of a single, fixed way.
    """
    return epsilon_lower_bound(canaries, canaries, canaries, delta=delta, level=1 - _split(1 - level, looks))


def canaries_needed(epsilon: float, delta: float, level: float = 0.95, *, looks: int = 1) -> int:
    """Smallest m with cap(m) > `epsilon`: fewer canaries cannot contradict a claim of (ε, δ)-DP.

    InputError when no m up to 10^6 can: with δ > 0 the cap peaks, near ln((1 - level) / 2δ), and falls again.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise InputError(f"an epsilon of {epsilon:g} cannot be tested; give a number that is 0 or more")
    low, high, largest = 0, 1, 0.0
    while (reached := cap(high, delta, level, looks=looks)) <= epsilon:
        largest = max(largest, reached)
        low, high = high, high + max(1, high // 10)
        if high > MOST_CANARIES:
            raise InputError(
                f"no number of canaries up to {MOST_CANARIES:,} can show that epsilon exceeds {epsilon:g} at "
                f"delta {delta:g}: the bound never exceeds {largest:.2f}; audit a smaller claim"
            )
    while high - low > 1:
        middle = (low + high) // 2
        if cap(middle, delta, level, looks=looks) > epsilon:
            high = middle
        else:
            low = middle
    return high


def looks_of(canaries: int, guesses: tuple[float, ...] = SHARES) -> list[tuple[int, int]]:
    """The (k+, k-) that `best_bound` tries: guesses "in" and "out".

    For every share r of the canaries once half of the guesses on either side, and, for a share below 1, once all
    of them "in": a generator that repeats some canaries says little about the others.
    """
    looks = []
    for share in guesses:
        if not 0 < share <= 1:
            raise InputError(f"a share of {share:g} of the canaries cannot be guessed; give 0 to 1")
        count = max(1, round(share * canaries))
        looks.append(((count + 1) // 2, count // 2))
        if count < canaries:
            looks.append((count, 0))
    return list(dict.fromkeys(looks))


def best_bound(
    scores: np.ndarray,
    included: np.ndarray,
    *,
    delta: float,
    level: float = 0.95,
    guesses: tuple[float, ...] = SHARES,
) -> Bound:
    """The best lower bound over a fixed set of ways to guess, valid at `level` for the best (Bonferroni).

    scores float [m]: higher for canaries that look trained on; included bool [m]: which were. The score must be a
    fixed function of the model and the canary: not chosen, fitted or tuned by looking at `included`. Whoever
    takes the best of several scores must split the level among them too.
    Equal scores are put in an order that is independent of `included`. guesses: shares of the canaries to
    guess about, see `looks_of`. InputError for scores that are not finite, arrays of different lengths, or m = 0.
    """
    scores, included = np.asarray(scores, np.float64), np.asarray(included)
    canaries = len(scores)
    if canaries == 0 or included.shape != scores.shape or included.dtype != bool:
        raise InputError(
            f"{canaries} scores and {len(included)} coins: every canary needs one of each; nothing was audited"
        )
    if not np.isfinite(scores).all():
        raise InputError("a canary's score is not finite; nothing was audited")
    _check(delta, level)
    shuffled = np.random.default_rng(0).permutation(canaries)
    order = shuffled[np.argsort(-scores[shuffled], kind="stable")]
    right_in = np.concatenate([[0], np.cumsum(included[order])])
    right_out = np.concatenate([[0], np.cumsum(~included[order[::-1]])])
    looks = looks_of(canaries, guesses)
    each = 1 - _split(1 - level, len(looks))
    bounds = []
    for above, below in looks:
        correct = int(right_in[above] + right_out[below])
        bound = epsilon_lower_bound(correct, above + below, canaries, delta=delta, level=each)
        bounds.append((bound, correct, above + below))
    epsilon, correct, tried = max(bounds, key=lambda bound: bound[0])
    largest = max(
        epsilon_lower_bound(above + below, above + below, canaries, delta=delta, level=each)
        for above, below in looks
    )
    return Bound(epsilon, correct, tried, canaries, largest, len(looks))


def _split(failure: float, looks: int) -> float:
    if looks < 1:
        raise InputError(f"{looks} looks at the canaries show nothing; give at least one")
    return failure / looks


def _check(delta: float, level: float) -> None:
    if not 0 <= delta < 1:
        raise InputError(f"delta = {delta:g} must be at least 0 and below 1; nothing was audited")
    if not 0 < level < 1:
        raise InputError(f"a confidence level of {level:g} is not between 0 and 1; 0.95 is usual")
