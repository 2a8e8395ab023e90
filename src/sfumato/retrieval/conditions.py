"""From a mechanism's noisy answer to what the generator is told. Post-processing of released values: free.

A ball's answer says how the private vectors near a prompt differ from the public ones there. The sum is divided by a
number of units that is estimated from the noisy one and the public expectation, shrunk by its known noise (James and
Stein 1961), and added to the mean of the nearest public neighbours, which may be fewer than the ball's. Where hardly
anything private lies near, or noise drowns it, those neighbours alone are what is told (the density gate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sfumato.privacy.private_query import BallPlan
from sfumato.retrieval.plan import RetrievalPlan

SHRINKAGE = 1.5
"""0 to 2 never hurts on average; 1 is best if only the noise is wrong, and the divisor is wrong too."""
LEAST_OF_EXPECTED = 0.1  # no divisor is smaller: a few units must not be blown up together with the noise


@dataclass(frozen=True)
class Condition:
    """vector: float32 [D], what the generator is told. noise: standard deviation per coordinate that is left in it.
    private: whether an answer to this very question is in it. cached: nothing was charged for it now. asked: whether it
    was put at all."""

    vector: np.ndarray
    noise: float
    private: bool
    cached: bool
    asked: bool = True


def public_condition(center: np.ndarray) -> Condition:
    """What can be told without asking: the public neighbours' mean, moved by what the index knows of the whole."""
    return Condition(center.astype(np.float32), 0.0, False, True, asked=False)


def ball_condition(answer: np.ndarray, center: np.ndarray, plan: RetrievalPlan, cached: bool) -> Condition:
    """From the noisy sum of residuals and number of units, float64 [k + 1], in a ball; center: of the nearest public
    neighbours."""
    query = plan.query
    assert isinstance(query, BallPlan)
    return told_by(
        answer, center, query.basis, query.residual_noise, query.count_noise, plan.expected, cached=cached
    )


def told_by(
    answer: np.ndarray,
    center: np.ndarray,
    basis: np.ndarray | None,
    residual_noise: float,
    count_noise: float,
    expected: float,
    *,
    cached: bool,
) -> Condition:
    """The same from noisy sums with these standard deviations, `expected` units being what is usual."""
    counted = float(answer[-1])
    trust = expected**2 / (
        expected**2 + count_noise**2
    )  # the number may well be twice, or half, what is expected
    units = max(trust * counted + (1 - trust) * expected, LEAST_OF_EXPECTED * expected)
    mean, noise = answer[:-1] / units, residual_noise / units
    length = float(np.square(mean).sum())
    kept = max(0.0, 1 - SHRINKAGE * (len(mean) - 2) * noise**2 / length) if length else 0.0
    if counted < count_noise or kept == 0:
        return Condition(center.astype(np.float32), 0.0, False, cached)
    residual = kept * (mean if basis is None else basis @ mean)
    left = kept * noise * math.sqrt(len(mean) / len(center))
    return Condition((center + residual).astype(np.float32), left, True, cached)


def nearest_condition(answer: np.ndarray, center: np.ndarray, plan: RetrievalPlan, cached: bool) -> Condition:
    """λ r + (1 - λ) c_public (DP-RDM, section 4.3)."""
    mixed = plan.interpolation * answer + (1 - plan.interpolation) * center
    return Condition(mixed.astype(np.float32), plan.noise, True, cached)
