"""How a private collection of vectors lies as a whole: its number, mean and second moment, once, with noise.

They cost little and say what no public set can: where the private vectors lie, and in which directions they differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sfumato.errors import InputError
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.mechanisms import _positive
from sfumato.privacy.private_query import FINE, _squares, records, released_once
from sfumato.privacy.protected_vectors import GRID, ProtectedVectors, on_grid
from sfumato.privacy.randomness import discrete_gaussian

if TYPE_CHECKING:
    from sfumato.privacy.ledger import Reservation

VECTOR_MOMENTS = "vector_moments"
COUNT_WEIGHT = 0.5  # of the number beside the mean and the second moment, which weigh 1 each
_WEIGHT = math.sqrt(2 + COUNT_WEIGHT**2)
_ROWS = 1024


@dataclass(frozen=True)
class MomentsPlan:
    """center: float [D], public, from which residuals are measured. noise_multiplier: σ, for parts of norm at most 1.
    radius: R, what a residual is clipped to. basis: [D, k] orthonormal columns, public, along which second moments are
    taken."""

    center: np.ndarray
    noise_multiplier: float
    radius: float
    basis: np.ndarray

    def __post_init__(self) -> None:
        _positive(self.noise_multiplier, "the noise multiplier")
        _positive(self.radius, "the clip radius")
        # a center of another shape, [D, 1] say, would be taken from row i by its place
        if self.center.shape != self.basis.shape[:1] or not np.isfinite(self.center).all():
            raise InputError(
                "the center must be finite and as long as the columns of the basis; no budget was spent"
            )
        fits = self.basis.ndim == 2 and 1 <= self.basis.shape[1] <= len(self.basis)
        if not fits or not np.allclose(self.basis.T @ self.basis, np.eye(self.basis.shape[1]), atol=1e-5):
            raise InputError("the basis must be orthonormal columns; no budget was spent")

    def planned(self) -> list[PlannedEvent]:
        """What to reserve."""
        from dp_accounting.dp_event import GaussianDpEvent

        says = f"number, mean and second moment along {self.basis.shape[1]} public directions of all vectors"
        return [PlannedEvent(VECTOR_MOMENTS, says, GaussianDpEvent(self.noise_multiplier))]

    @property
    def mean_noise(self) -> float:
        """Standard deviation of each coordinate of the sum of residuals."""
        return self.noise_multiplier * self.radius * _WEIGHT

    @property
    def count_noise(self) -> float:
        """Standard deviation of the number."""
        return self.noise_multiplier * _WEIGHT / COUNT_WEIGHT

    @property
    def square_noise(self) -> float:
        """Standard deviation of each diagonal element of the sum of squares; 1/√2 of it of each other one."""
        return self.noise_multiplier * self.radius**2 * _WEIGHT


@dataclass(frozen=True)
class Moments:
    """Noisy sums over all units. count: their number. residuals: float64 [D], sum of e - center. squares: float64
    [k, k], symmetric, sum of (e - center)(e - center)ᵀ in the coordinates of the basis."""

    count: float
    residuals: np.ndarray
    squares: np.ndarray


def vector_moments(private: ProtectedVectors, plan: MomentsPlan, reservation: Reservation) -> Moments:
    """Number, sum and sum of squares of the residuals, clipped to R, of all private vectors, plus noise.

    A unit of m vectors stands with 1/m of each.

    Guarantee: one Gaussian event of `plan.noise_multiplier`, for adding or removing one unit: its part, (residual / R,
    1/2, its outer product with itself) over their greatest length, has norm at most 1, as the outer product of a vector
    of norm at most 1 has. The same reservation is answered once: asked again, from what was kept.
    """
    size, columns = private.dimension, plan.basis.shape[1]

    def noisy(total: np.ndarray) -> np.ndarray:
        return discrete_gaussian(total, plan.noise_multiplier * FINE) / FINE * _WEIGHT

    (planned,) = plan.planned()
    answer = released_once(private, planned, reservation, lambda: _total(private, plan), noisy)
    upper, across = _triangle(columns)
    squares = np.zeros((columns, columns))
    squares[upper] = answer[size + 1 :] / across * plan.radius**2
    squares = squares + np.triu(squares, 1).T
    return Moments(float(answer[size]) / COUNT_WEIGHT, answer[:size] * plan.radius, squares)


def _total(private: ProtectedVectors, plan: MomentsPlan) -> np.ndarray:
    """Whole steps of 2^-20, int64 [D + 1 + k (k + 1) / 2]."""
    center, basis, size = on_grid(plan.center), plan.basis, private.dimension
    upper, across = _triangle(basis.shape[1])
    weight = _WEIGHT * (1 + 1e-9)
    total = np.zeros(size + 1 + len(across), np.int64)
    for some, sizes in records(private, _ROWS):
        residuals = private._vectors(some) - center
        lengths = np.sqrt(_squares(residuals)) / GRID
        with np.errstate(divide="ignore"):
            scaled = residuals / GRID * np.minimum(1 / plan.radius, 1 / lengths)[:, None]
        # whole numbers again, so that a product of two does not depend on the rows beside it
        along = np.rint(np.rint(scaled * GRID) @ on_grid(basis) / GRID)
        along /= np.maximum(GRID, np.sqrt(_squares(along)))[:, None]
        parts = np.empty((len(some), len(total)), np.int64)
        parts[:, :size] = np.trunc(scaled / weight * FINE)
        parts[:, size] = math.floor(COUNT_WEIGHT / weight * FINE)
        parts[:, size + 1 :] = np.trunc(along[:, upper[0]] * along[:, upper[1]] * across / weight * FINE)
        parts[_squares(parts) > FINE**2] = 0  # proven, not hoped for
        total += np.trunc(parts / sizes).astype(np.int64).sum(0)
    return total


def _triangle(columns: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Places of the upper triangle, and √2 off the diagonal: with these factors its length is the matrix's."""
    rows, cols = np.triu_indices(columns)
    return (rows, cols), np.where(rows == cols, 1.0, math.sqrt(2))
