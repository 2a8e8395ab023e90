"""What a budget buys: neighbourhood, clip radius, cap and noise for each mechanism, from public figures alone.

Loads (how many of the planned questions a record will be near to) are those of the public vectors under the planned
prompts; what private records' loads really are only decides how well it works, never the guarantee.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from sfumato.errors import InputError
from sfumato.privacy.accounting import calibrate
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.private_query import BallPlan, NearestPlan
from sfumato.retrieval.public_side import PublicSide

Mechanism = Literal["ball-filter", "ball", "topk"]
SHARES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25)
"""Neighbourhoods tried, as shares of the collection: the first whose noise is small enough is taken."""
ENOUGH = 0.35  # noise over what an answer usually tells, below which a narrower neighbourhood is worth more
RADIUS_QUANTILE = 0.75
VARIANCE = 0.95


@dataclass(frozen=True)
class RetrievalPlan:
    """All that is fixed before the first question; public.

    share: of the public vectors, and presumably of the private ones, that a neighbourhood holds. units: the public
    number of private units. interpolation: λ of top-k (the paper's). noise: expected standard deviation, per direction,
    of a condition. noise_ratio: length of the noise over the length of what an answer usually tells.
    """

    mechanism: Mechanism
    query: BallPlan | NearestPlan
    share: float
    units: float
    interpolation: float
    noise: float
    noise_ratio: float

    @property
    def expected(self) -> float:
        """Units in a neighbourhood, if private vectors lie as the public ones do."""
        return max(1.0, self.share * self.units)

    @property
    def events(self) -> list[PlannedEvent]:
        """What to reserve."""
        return self.query.planned()

    def public_count(self, public: PublicSide) -> int:
        """Public vectors in a neighbourhood."""
        return max(8, round(self.share * len(public.vectors)))

    def lines(self) -> list[str]:
        """The plan in words, a line each."""
        query = self.query
        if isinstance(query, NearestPlan):
            how = (
                f"the {query.neighbours} nearest of a Poisson sample at rate {query.sampling_probability:g}, "
                f"λ {self.interpolation:.2f}"
            )
        else:
            held = "all" if query.basis is None else str(query.basis.shape[1])
            how = (
                f"all within the similarity of public rank {self.share:.1%}, clip radius {query.radius:.3g}, "
                f"{held} directions"
            )
            if query.per_unit_cap is not None:
                how += f", {query.per_unit_cap:,} participations for each unit"
        return [
            f"mechanism: {self.mechanism}: {how}",
            f"queries: {query.queries:,}; noise multiplier of each: {query.noise_multiplier:.4g}",
            f"expected neighbourhood: {self.expected:,.0f} of {self.units:,.0f} units",
            f"expected noise: {self.noise:.3g} in each direction, {self.noise_ratio:.0%} of what an answer tells",
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything but the basis, which lies with the public vectors."""
        query = {k: v for k, v in vars(self.query).items() if k != "basis"}
        directions = getattr(self.query, "basis", None)
        query["directions"] = None if directions is None else directions.shape[1]
        return {**{k: v for k, v in vars(self).items() if k != "query"}, "query": query}

    @classmethod
    def from_json(cls, held: dict[str, Any], public: PublicSide) -> RetrievalPlan:
        """What `to_json` gave."""
        query = dict(held["query"])
        directions = query.pop("directions")
        plan: BallPlan | NearestPlan
        if held["mechanism"] == "topk":
            plan = NearestPlan(**query)
        else:
            plan = BallPlan(**query, basis=None if directions is None else public.basis(directions))
        return cls(**{**held, "query": plan})


def make_plan(
    mechanism: Mechanism,
    budget: Budget,
    queries: int,
    units: float,
    public: PublicSide,
    *,
    neighbours: int | None = None,
    rate: float | None = None,
    share: float | None = None,
    interpolation: float | None = None,
) -> RetrievalPlan:
    """The plan for a budget, T planned queries and a public number of units. Options that are None are chosen.

    Raises InputError for k beyond the collection, BudgetError where no noise fits.
    """
    if mechanism == "topk":
        return _topk(budget, queries, units, public, neighbours, rate or 1.0, interpolation)
    shares = SHARES if share is None else (share,)
    plans = []
    for tried in shares:
        if share is None and tried * units < 4 and tried != shares[-1]:
            continue
        plans.append(_ball(mechanism, budget, queries, units, public, tried))
        if plans[-1].noise_ratio <= ENOUGH:
            break
    return min(plans, key=lambda plan: max(plan.noise_ratio, ENOUGH))


def told(public: PublicSide, share: float, basis: np.ndarray | None) -> tuple[float, np.ndarray]:
    """(how long a neighbourhood's own mean residual usually is, lengths of single residuals), among public vectors:
    what is told about a group of vectors that differ from the public neighbours as clusters of public ones do from each
    other."""
    count = max(8, round(share * len(public.vectors)))
    rng = np.random.default_rng(0)
    lengths, means = [], []
    for direction in public.prompts[rng.permutation(len(public.prompts))[:64]]:
        near = public.neighbours(direction, count)
        center = public.vectors[near].astype(np.float64).mean(0)
        residual = public.vectors[near] - center
        along = residual if basis is None else residual @ basis
        lengths.append(np.linalg.norm(along, axis=1))
        seed = along[rng.integers(len(along))]  # a cluster around one of them: an eighth of the neighbourhood
        close = np.argsort(((along - seed) ** 2).sum(1))[: max(2, count // 8)]
        means.append(np.linalg.norm(along[close].mean(0)))
    return float(np.median(means)), np.concatenate(lengths)


def loads(public: PublicSide, share: float, queries: int) -> np.ndarray:
    """How many of `queries` questions each public vector is near to, float64 [P]."""
    count = max(8, round(share * len(public.vectors)))
    scores = public.prompts @ public.vectors.T
    cuts = -np.partition(-scores, count - 1, axis=1)[:, count - 1]
    return (scores >= cuts[:, None]).mean(0) * queries


def best_cap(load: np.ndarray, queries: int) -> int:
    """L with the least noise for what is kept: √L over the share of participations that L full ones allow."""
    wanted = np.unique(np.ceil(np.quantile(load, (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0))).astype(int))
    wanted = np.clip(wanted, 1, queries)
    total = max(load.sum(), 1e-9)
    return int(min(wanted, key=lambda cap: math.sqrt(cap) / max(np.minimum(load, cap).sum() / total, 1e-9)))


def _ball(
    mechanism: Mechanism, budget: Budget, queries: int, units: float, public: PublicSide, share: float
) -> RetrievalPlan:
    if not 0 < share <= 1:
        raise InputError(f"--share {share} must lie above 0 and not above 1; no budget was spent. Try 0.02")
    directions = public.directions_for(VARIANCE)
    basis = public.basis(directions)
    signal, lengths = told(public, share, basis)
    radius = float(np.quantile(lengths, RADIUS_QUANTILE))
    cap = None
    if mechanism == "ball-filter":
        cap = best_cap(loads(public, share, queries), queries)
        noise = calibrate(lambda z: [_gaussian(z)], budget)
        noise = noise * math.sqrt(cap) * (1 + 1e-12)
    else:
        noise = calibrate(lambda z: [_times(_gaussian(z), queries)], budget)
    query = BallPlan(noise, radius, queries, basis, per_unit_cap=cap)
    plan = RetrievalPlan(mechanism, query, share, units, 1.0, 0.0, 0.0)
    each = query.residual_noise / plan.expected
    size = public.dimension if basis is None else directions
    return replace(plan, noise=each, noise_ratio=each * math.sqrt(size) / signal)


def _topk(
    budget: Budget,
    queries: int,
    units: float,
    public: PublicSide,
    neighbours: int | None,
    rate: float,
    interpolation: float | None,
) -> RetrievalPlan:
    if not 0 < rate <= 1:
        raise InputError(
            f"--rate {rate} must lie above 0 and not above 1; no budget was spent. Try 0.01, or 1"
        )
    if neighbours is not None and neighbours > units * rate:
        raise InputError(
            f"--neighbours {neighbours} is more than the collection's {units * rate:,.0f} units at rate {rate:g}; no "
            "budget was spent. Give a smaller k"
        )
    one = NearestPlan(1, 1.0, queries, rate)
    noise = calibrate(lambda z: [_times(replace(one, noise_multiplier=z).event, queries)], budget)

    def plan_of(k: int) -> RetrievalPlan:
        share = min(1.0, k / rate / units)
        signal, _ = told(public, share, None)
        query = NearestPlan(k, noise, queries, rate)
        ratio = query.noise * math.sqrt(public.dimension) / signal
        mixed = 1 / (1 + ratio**2) if interpolation is None else interpolation
        return RetrievalPlan("topk", query, share, units, mixed, mixed * query.noise, ratio)

    if neighbours is not None:
        return plan_of(neighbours)
    plans = []
    for share in SHARES:
        plans.append(plan_of(max(1, round(share * units * rate))))
        if plans[-1].noise_ratio <= ENOUGH:
            break
    return plans[-1]


def _gaussian(noise: float) -> Any:
    from dp_accounting.dp_event import GaussianDpEvent

    return GaussianDpEvent(noise)


def _times(event: Any, count: int) -> Any:
    from dp_accounting.dp_event import SelfComposedDpEvent

    return event if count == 1 else SelfComposedDpEvent(event, count)
