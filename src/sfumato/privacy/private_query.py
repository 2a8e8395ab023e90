"""One question to a private collection: a noisy mean of the nearest vectors (top-k), or of all within a ball.

`nearest_mean` is the private query of DP-RDM (arXiv 2403.14421, section 4). `ball_sum` replaces "the k nearest" by "all
within a public threshold": a unit's part then depends on that unit alone, so one more unit moves the sum by its own
part (half of what it can do to a top-k), and each unit can carry a budget of its own (`per_unit_cap`): it pays only for
the balls it lies in, and drops out when its budget is used up.

**Guarantee of the budgets.** A query adds noise of standard deviation σ to a sum of parts of norm at most 1. Unit i is
charged m_i = |part_i|², exactly and before the answer leaves, and takes part while its charges stay within L. Removing
unit i changes nothing but its own parts, whatever was asked before, and Σ m_i ≤ L always; so all queries together,
asked adaptively and however many, are what one Gaussian mechanism with noise multiplier σ/√L is (fully adaptive
composition with individual Gaussian-DP budgets: Feldman and Zrnic, arXiv 2008.11193; Koskela, Tobaben and Honkela,
arXiv 2209.15596). Top-k has no such form: one unit's absence brings another in. Who dropped out is never shown.

**Exactness.** Membership, parts and charges are computed in whole numbers, each unit by itself; sums are integers and
get OpenDP's discrete Gaussian. **Order of work**: the event goes on the ledger, then noise is drawn, then the answer is
kept, durably, together with what each unit used, then it is returned. The same key is answered from what was kept, for
free.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.errors import InputError, LedgerError
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.mechanisms import _positive
from sfumato.privacy.protected_vectors import GRID, ProtectedVectors, on_grid
from sfumato.privacy.query_state import USED_UNIT
from sfumato.privacy.randomness import SecureStream, discrete_gaussian
from sfumato.privacy.vector_search import Lists, ranked, within

if TYPE_CHECKING:
    from sfumato.privacy.ledger import Reservation

NEAREST_MEAN, BALL_SUM, BALL_BUDGETS, BALL_QUERY = "nearest_mean", "ball_sum", "ball_budgets", "ball_query"
FINE = 1 << 20  # steps of the lattice in norm 1


@dataclass(frozen=True)
class NearestPlan:
    """Top-k, as published; all of it public and fixed.

    neighbours: k. noise_multiplier: standard deviation of the noise on the sum over the sensitivity, which is 2 (σ k /
    2 in the paper's words). queries: T, at most. sampling_probability: q, each unit's chance in each query (Poisson).
    """

    neighbours: int
    noise_multiplier: float
    queries: int
    sampling_probability: float = 1.0

    def __post_init__(self) -> None:
        _positive(self.noise_multiplier, "the noise multiplier")
        if self.neighbours < 1 or self.queries < 1 or not 0 < self.sampling_probability <= 1:
            raise InputError(
                "top-k needs k >= 1, queries >= 1 and a rate above 0 and not above 1; no budget was spent"
            )

    @property
    def noise(self) -> float:
        """Standard deviation of the answer in each coordinate."""
        return 2 * self.noise_multiplier / self.neighbours

    @property
    def event(self) -> Any:
        """One query's event."""
        from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

        gaussian = GaussianDpEvent(self.noise_multiplier)
        if self.sampling_probability == 1:
            return gaussian
        return PoissonSampledDpEvent(self.sampling_probability, gaussian)

    def planned(self) -> list[PlannedEvent]:
        """What to reserve."""
        says = f"mean of the {self.neighbours} vectors nearest to a prompt"
        if self.sampling_probability < 1:
            says += f", among a fresh Poisson sample at rate {self.sampling_probability:g}"
        return [PlannedEvent(NEAREST_MEAN, says, self.event, self.queries)]


@dataclass(frozen=True)
class BallPlan:
    """Ball queries; all of it public and fixed.

    noise_multiplier: σ, standard deviation of the noise in each coordinate of a sum of parts of norm at most 1. radius:
    R, what a unit's residual is clipped to. queries: T, at most. basis: [D, k] orthonormal columns, public, or None.
    count_weight: β; a part is (residual / R, β) / √(1 + β²), so that the number of units comes with the sum.
    per_unit_cap: L, the number of full participations each unit may pay for, or None to charge every query in full.
    """

    noise_multiplier: float
    radius: float
    queries: int
    basis: np.ndarray | None = None
    count_weight: float = 0.5
    per_unit_cap: int | None = None

    def __post_init__(self) -> None:
        _positive(self.noise_multiplier, "the noise multiplier")
        _positive(self.radius, "the clip radius")
        _positive(self.count_weight, "the weight of the count")
        if self.queries < 1 or (self.per_unit_cap is not None and self.per_unit_cap < 1):
            raise InputError(
                "ball queries need at least one query and a cap of at least 1; no budget was spent"
            )
        basis = self.basis
        if basis is not None:
            fits = basis.ndim == 2 and 1 <= basis.shape[1] <= len(basis)
            if not fits or not np.allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5):
                raise InputError("the basis must be orthonormal columns; no budget was spent")

    @property
    def total_noise_multiplier(self) -> float:
        """With per-unit budgets: that of the one Gaussian mechanism that all queries together are; rounded down."""
        assert self.per_unit_cap is not None
        value = self.noise_multiplier / math.sqrt(self.per_unit_cap)
        while Fraction(value) ** 2 * self.per_unit_cap > Fraction(self.noise_multiplier) ** 2:
            value = math.nextafter(value, 0.0)
        return value

    def planned(self) -> list[PlannedEvent]:
        """What to reserve."""
        from dp_accounting.dp_event import GaussianDpEvent, NoOpDpEvent

        what = "noisy sum and number of the vectors within a public distance of a prompt"
        if self.per_unit_cap is None:
            return [PlannedEvent(BALL_SUM, what, GaussianDpEvent(self.noise_multiplier), self.queries)]
        budgets = GaussianDpEvent(self.total_noise_multiplier)
        says = (
            "all ball queries together: each unit pays for the balls it lies in and drops out when its "
            "budget is used up"
        )
        paid = (
            f"{what}, noise multiplier {float(self.noise_multiplier)!r}, paid by the units' own budgets of "
            f"{self.per_unit_cap} full participations"
        )
        return [
            PlannedEvent(BALL_BUDGETS, says, budgets),
            PlannedEvent(BALL_QUERY, paid, NoOpDpEvent(), self.queries),
        ]

    @property
    def residual_noise(self) -> float:
        """Standard deviation, in each of the k directions, of the noise on the sum of residuals."""
        return self.noise_multiplier * self.radius * math.hypot(1, self.count_weight)

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the number of units."""
        return self.noise_multiplier * math.hypot(1, self.count_weight) / self.count_weight


@dataclass(frozen=True)
class Ball:
    """A question, public: all vectors e with <direction, e> >= threshold, measured from the center; float [D] each."""

    direction: np.ndarray
    threshold: float
    center: np.ndarray


def nearest_mean(
    private: ProtectedVectors,
    direction: np.ndarray,
    plan: NearestPlan,
    reservation: Reservation,
    key: str,
    lists: Lists | None = None,
) -> tuple[np.ndarray, bool]:
    """(1/k) (sum of the k nearest + noise), float64 [D], and whether it was kept from before (arXiv 2403.14421, eq. 3).

    A unit of several vectors stands with the nearest of them. The divisor is k also where fewer were found. Coins are
    tossed first, one for each unit, and only units that show heads are looked at.

    Guarantee: `plan.event` for each new key, for adding or removing one unit: it adds one vector of norm at most 1 and
    pushes out at most one, so the sum moves by at most 2.
    """
    with private._state.exclusive():
        if (kept := private._state.answer(key)) is not None:
            return kept, True
        private._refresh()
        rows = _heads(private, direction, plan, lists)
        steps = _on_lattice(private._vectors(rows))
        total = steps.sum(0, dtype=np.int64)
        reservation.begin(NEAREST_MEAN, plan.event)
        noisy = discrete_gaussian(total, 2 * plan.noise_multiplier * FINE)  # powers of two: exact
        answer = noisy / FINE / plan.neighbours
        private._state.keep(key, answer)
    return answer, False


def ball_sum(
    private: ProtectedVectors,
    ball: Ball,
    plan: BallPlan,
    reservation: Reservation,
    key: str,
    lists: Lists | None = None,
) -> tuple[np.ndarray, bool]:
    """Noisy sum of residuals, and number of units, in the ball: float64 [k + 1], and whether it was kept from before.

    A unit's residual is the sum of (e - center) over its vectors in the ball, in the coordinates of the basis, clipped
    to R. The first k numbers are the sum of residuals plus noise of `plan.residual_noise`, the last the number of units
    plus noise of `plan.count_noise`.

    Guarantee: without per-unit budgets a Gaussian event of `plan.noise_multiplier` for each new key, for adding or
    removing one unit. With them, `plan.planned()[0]` for all keys together; see the module.
    """
    planned = plan.planned()
    with private._state.exclusive():
        if plan.per_unit_cap is not None:
            _check_reserved(planned, reservation)
        if (kept := private._state.answer(key)) is not None:
            if plan.per_unit_cap is not None:
                private._state.get_in_step(reservation, planned[1])
            return kept, True
        private._refresh()
        (rows,) = within(private, ball.direction[None], np.array([ball.threshold]), lists)
        units, parts = _parts(private, rows, ball.center, plan)

        def noisy(active: np.ndarray) -> np.ndarray:
            total = parts[active].sum(0, dtype=np.int64)
            steps = discrete_gaussian(total, plan.noise_multiplier * FINE)  # times a power of two: exact
            whole = steps / FINE * math.hypot(1, plan.count_weight)
            return np.append(whole[:-1] * plan.radius, whole[-1] / plan.count_weight)

        if plan.per_unit_cap is None:
            reservation.begin(BALL_SUM, planned[0].event)
            answer = noisy(np.ones(len(units), bool))
            private._state.keep(key, answer)
            return answer, False
        budgets, query = planned
        if reservation.begun(BALL_BUDGETS) == 0:
            reservation.begin(BALL_BUDGETS, budgets.event)
        costs = np.ceil(_squares(parts) * (USED_UNIT / FINE**2)).astype(np.int64)  # a power of two: exact
        cap = plan.per_unit_cap * USED_UNIT
        return private._state.use(reservation, query, units, costs, cap, key, noisy), False


def released_once(
    private: ProtectedVectors,
    planned: PlannedEvent,
    reservation: Reservation,
    total: Callable[[], np.ndarray],
    noisy: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """noisy(total()), flat, begun in the ledger in between. The same reservation is answered from what was kept."""
    key = f"{planned.mechanism}:{reservation.id}"
    with private._state.exclusive():
        if (kept := private._state.answer(key)) is not None:
            return kept
        private._refresh()
        sums = total()
        reservation.begin(planned.mechanism, planned.event)
        answer = noisy(sums).ravel()
        private._state.keep(key, answer)
    return answer


def records(private: ProtectedVectors, at_once: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, of how many records each one's unit is, [B, 1]) of all living records, so many at once."""
    rows = np.flatnonzero(private._alive)
    sizes = np.bincount(private._unit_of[rows]) if len(rows) else np.zeros(0, np.int64)
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        yield some, sizes[private._unit_of[some]][:, None]


def _check_reserved(planned: list[PlannedEvent], reservation: Reservation) -> None:
    """σ and L may both differ where σ/√L, and so the event, does not."""
    if reservation.planned != tuple(planned):
        raise LedgerError(
            "these ball queries are not what was reserved (noise, budgets or number); nothing was released. Use the "
            "plan of the reservation"
        )


def question_key(prompt: str, public: dict[str, Any]) -> str:
    """Under which an answer is kept: the same prompt with the same public parameters is the same question."""
    return hashlib.sha256(json.dumps([prompt, public], sort_keys=True).encode()).hexdigest()


def _heads(
    private: ProtectedVectors, direction: np.ndarray, plan: NearestPlan, lists: Lists | None
) -> np.ndarray:
    """Rows of the k nearest units of a Poisson sample, each by its nearest vector."""
    among, k = None, plan.neighbours
    if plan.sampling_probability < 1:
        units = int(private._unit_of.max(initial=-1)) + 1
        heads = SecureStream().bernoulli(plan.sampling_probability, units)
        among = np.append(heads, False).take(private._unit_of, mode="wrap")  # -1: no record there any more
    ask = k
    while True:
        rows, everything = ranked(private, direction, ask, lists, among)
        _, first = np.unique(private._unit_of[rows], return_index=True)
        if everything or len(first) >= k:
            return rows[np.sort(first)][:k]
        ask *= 4


def _parts(
    private: ProtectedVectors, rows: np.ndarray, center: np.ndarray, plan: BallPlan
) -> tuple[np.ndarray, np.ndarray]:
    """(units int64 [M], parts int64 [M, k + 1] in steps of 2^-20, none longer than 2^20)."""
    units, place = np.unique(private._unit_of[rows], return_inverse=True)
    residuals = private._vectors(rows) - on_grid(center)
    if plan.basis is not None:
        residuals = np.rint(residuals @ on_grid(plan.basis) / GRID)  # the product is exact, see GRID
    together = np.zeros((len(units), residuals.shape[1]), np.int64)
    np.add.at(together, place, residuals.astype(np.int64))
    parts = clipped_parts(together / GRID, np.sqrt(_squares(together)) / GRID, plan.radius, plan.count_weight)
    return units, parts


def clipped_parts(
    residuals: np.ndarray, lengths: np.ndarray, radius: float, count_weight: float
) -> np.ndarray:
    """(residual / R, at most 1 long, and β) / √(1 + β²) in steps of 2^-20: int64 [M, k + 1], none longer than 2^20."""
    weight = math.hypot(1, count_weight) * (1 + 1e-9)
    with np.errstate(divide="ignore"):
        factor = np.minimum(1 / radius, 1 / lengths) / weight
    parts = np.empty((len(residuals), residuals.shape[1] + 1), np.int64)
    parts[:, :-1] = np.trunc(residuals * factor[:, None] * FINE)
    parts[:, -1] = math.floor(count_weight / weight * FINE)
    parts[_squares(parts) > FINE**2] = 0  # proven, not hoped for
    return parts


def _on_lattice(vectors: np.ndarray) -> np.ndarray:
    """Vectors in steps of 2^-22, of length about 1, as int64 steps of 2^-20, none longer than 2^20."""
    lengths = np.sqrt(_squares(vectors))[:, None] * (1 + 1e-9) / GRID
    steps = np.trunc(vectors / np.maximum(lengths, 1) * (FINE / GRID)).astype(np.int64)
    steps[_squares(steps) > FINE**2] = 0
    return steps


def _squares(steps: np.ndarray) -> np.ndarray:
    """Exact squared lengths of integer rows, float64 [M]: all sums stay below 2^53."""
    return (steps.astype(np.float64) ** 2).sum(1)
