"""What an index learns of its collection as a whole, once: where the private vectors lie beside the public ones.

A private collection is usually another kind of picture than the public ones, less varied, and less like any text. Its
mean and covariance cost little and say by how much. Balls, centres and the plan are then taken from public vectors that
were moved accordingly: a ball of a public rank holds about that share of the private vectors too.
"""

from __future__ import annotations

import math

import numpy as np

from sfumato.errors import LedgerError
from sfumato.privacy.accounting import calibrate
from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.privacy.vector_moments import VECTOR_MOMENTS, Moments, MomentsPlan, vector_moments
from sfumato.retrieval.public_side import PublicSide

SHARE_OF_OVERVIEW = 0.2  # of ε and δ
ASSUMED_UNITS = 1000
"""Where their number is not declared: decides along how many directions the covariance is asked."""
LEAST_DIRECTIONS, LEAST_SPREAD = 4, 0.01


def after_looking(budget: Budget) -> Budget:
    """What is left for questions, nearly."""
    return Budget((1 - SHARE_OF_OVERVIEW) * budget.epsilon, (1 - SHARE_OF_OVERVIEW) * budget.delta)


def look_over(
    budget: Budget,
    private: ProtectedVectors,
    public: PublicSide,
    ledger: Ledger,
    answers: Answers,
    public_size: int | None,
) -> tuple[float, PublicSide, Reservation]:
    """(noisy number of units, the public vectors moved to where the private ones lie, what it cost).

    Guarantee: one Gaussian event, `vector_moments`, for a fifth of the budget, for adding or removing one unit.
    """
    mean = public.mean()
    radius = 1.1 * float(np.quantile(np.linalg.norm(public.vectors - mean, axis=1), 0.9))

    def plan_of(noise: float, directions: int) -> MomentsPlan:
        return MomentsPlan(mean, noise, radius, public.directions[:, :directions].astype(np.float64))

    part = Budget(SHARE_OF_OVERVIEW * budget.epsilon, SHARE_OF_OVERVIEW * budget.delta)
    noise = calibrate(lambda z: [plan_of(z, 1).planned()[0].event], part)
    k, assumed = public.directions.shape[1], public_size or ASSUMED_UNITS
    while k > LEAST_DIRECTIONS:  # fewer directions, less noise: a third of the public covariance at most
        if (
            k * plan_of(noise, k).square_noise / math.sqrt(2) / assumed
            < np.linalg.norm(public.covariance(k)) / 3
        ):
            break
        k //= 2
    plan = plan_of(noise, k)
    reservation = answers.reserve(ledger, "overview", plan.planned(), part.delta)
    try:
        found = vector_moments(private, plan, reservation)
    except LedgerError as error:
        if not reservation.begun(VECTOR_MOMENTS):
            raise
        raise LedgerError(
            "this index was interrupted right after its overview was charged, and the answer is lost. The cost "
            "stays charged, and nothing was released. Make the index anew in another --out"
        ) from error
    reservation.settle()
    return max(float(round(found.count)), 1.0), moved_by(found, plan, public, public_size), reservation


def moved_by(found: Moments, plan: MomentsPlan, public: PublicSide, public_size: int | None) -> PublicSide:
    """Public vectors with the mean and covariance that were found, as far as they stand out of their noise.

    The mean is shrunk towards the public one, the covariance towards a multiple of the public one (James and Stein
    1961). Post-processing: free.
    """
    k = plan.basis.shape[1]
    units = float(public_size or max(found.count, 2 * plan.count_noise))
    own, noise = public.covariance(k), plan.square_noise / units
    shift = _shrunk(found.residuals / units, plan.mean_noise / units, longest=plan.radius)
    along = shift @ plan.basis
    covariance = found.squares / units - np.outer(along, along)
    spread = np.trace(own)
    trust = spread**2 / (spread**2 + k * noise**2)
    scale = trust * np.clip(np.trace(covariance) / spread, LEAST_SPREAD, 1 / LEAST_SPREAD) + 1 - trust
    change = _shrunk(covariance - scale * own, noise, k * (k + 1) // 2, plan.radius**2)
    values, axes = np.linalg.eigh(scale * own + change)
    values = np.maximum(values, LEAST_SPREAD * scale * spread / k)
    return public.moved(public.mean() + shift, (axes * values) @ axes.T)


def _shrunk(found: np.ndarray, noise: float, size: int | None = None, longest: float = 1.0) -> np.ndarray:
    """What was found, no longer than it can be, less what its noise adds to its length."""
    length = float(np.linalg.norm(found))
    found = found * min(1.0, longest / length) if length else found
    left = 1 - ((size or found.size) - 2) * noise**2 / max(min(length, longest) ** 2, 1e-300)
    return found * max(0.0, left)
