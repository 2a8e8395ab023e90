"""A codebook of a private collection: noisy numbers and mean residuals of its vectors around public centres, once.

Released at a fixed price, it answers any number of prompts afterwards. The centres are public (k-means of public
vectors); only how many private vectors lie near each, and on which side of it, is private.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.mechanisms import _positive
from sfumato.privacy.private_query import FINE, _squares, clipped_parts, records, released_once
from sfumato.privacy.protected_vectors import GRID, ProtectedVectors, on_grid
from sfumato.privacy.randomness import discrete_gaussian

if TYPE_CHECKING:
    from sfumato.privacy.ledger import Reservation

CODEBOOK = "codebook"
_ROWS = 4096


@dataclass(frozen=True)
class CodebookPlan:
    """centers: float [C, D], public. noise_multiplier: σ, for parts of norm at most 1. radius: R, what a residual is
    clipped to. basis: [D, k] orthonormal columns, public, or None. count_weight: β, as in `private_query.BallPlan`."""

    centers: np.ndarray
    noise_multiplier: float
    radius: float
    basis: np.ndarray | None = None
    count_weight: float = 0.5

    def __post_init__(self) -> None:
        _positive(self.noise_multiplier, "the noise multiplier")
        _positive(self.radius, "the clip radius")
        _positive(self.count_weight, "the weight of the count")

    def planned(self) -> list[PlannedEvent]:
        """What to reserve."""
        from dp_accounting.dp_event import GaussianDpEvent

        says = f"number and mean residual of the vectors around each of {len(self.centers)} public centres"
        return [PlannedEvent(CODEBOOK, says, GaussianDpEvent(self.noise_multiplier))]

    @property
    def residual_noise(self) -> float:
        """Standard deviation of each coordinate of a sum of residuals."""
        return self.noise_multiplier * self.radius * math.hypot(1, self.count_weight)

    @property
    def count_noise(self) -> float:
        """Standard deviation of each number."""
        return self.noise_multiplier * math.hypot(1, self.count_weight) / self.count_weight


def codebook_sums(private: ProtectedVectors, plan: CodebookPlan, reservation: Reservation) -> np.ndarray:
    """Noisy sums of residuals and numbers at each centre, float64 [C, k + 1], as `private_query.ball_sum` gives them.

    A vector belongs to its nearest centre. A unit of m vectors stands with 1/m of each.

    Guarantee: one Gaussian event of `plan.noise_multiplier`, for adding or removing one unit: its whole part, over all
    centres together, has norm at most 1. The same reservation is answered once: asked again, from what was kept.
    """

    def noisy(total: np.ndarray) -> np.ndarray:
        steps = discrete_gaussian(total, plan.noise_multiplier * FINE)  # times a power of two: exact
        answer = steps / FINE * math.hypot(1, plan.count_weight)
        answer[:, :-1] *= plan.radius
        answer[:, -1] /= plan.count_weight
        return answer

    (planned,) = plan.planned()
    answer = released_once(private, planned, reservation, lambda: _total(private, plan), noisy)
    return answer.reshape(len(plan.centers), -1)


def _total(private: ProtectedVectors, plan: CodebookPlan) -> np.ndarray:
    centers = on_grid(plan.centers)
    half = (centers**2).sum(1) / (2 * GRID)
    basis = None if plan.basis is None else on_grid(plan.basis)
    total = np.zeros((len(centers), (private.dimension if basis is None else basis.shape[1]) + 1), np.int64)
    for some, sizes in records(private, _ROWS):
        vectors = private._vectors(some)
        nearest = (vectors @ centers.T / GRID - half).argmax(1)  # exact, see GRID
        residuals = vectors - centers[nearest]
        if basis is not None:
            residuals = np.rint(residuals @ basis / GRID)
        parts = clipped_parts(
            residuals / GRID, np.sqrt(_squares(residuals)) / GRID, plan.radius, plan.count_weight
        )
        shares = np.trunc(parts / sizes).astype(np.int64)
        np.add.at(total, nearest, shares)
    return total
