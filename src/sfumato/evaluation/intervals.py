"""Exact intervals of a probability from counts."""

from __future__ import annotations

import math

from sfumato.errors import InputError


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a probability after k successes in n independent trials.

    Clopper and Pearson 1934. InputError unless 0 <= k <= n, n >= 1 and 0 < level < 1.
    """
    from scipy.stats import beta

    check_level(level)
    if n < 1 or not 0 <= k <= n:
        raise InputError(f"{k} of {n} is no count; an interval needs 0 <= k <= n and n >= 1")
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def rule_of_three(n: int, level: float = 0.95) -> float:
    """Upper bound of a probability after 0 successes in n independent trials: 1 - (1 - level)^(1/n), about 3/n.

    One-sided, as zero has nothing below it. InputError unless n >= 1 and 0 < level < 1.
    """
    check_level(level)
    if n < 1:
        raise InputError(f"nothing is known from {n} trials; give at least one")
    return float(-math.expm1(math.log1p(-level) / n))


def check_level(level: float) -> None:
    """InputError unless the confidence level lies between 0 and 1."""
    if not 0 < level < 1:
        raise InputError(f"a confidence level of {level:g} is not between 0 and 1; 0.95 is usual")
