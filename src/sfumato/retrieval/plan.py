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
SHARES = (0.04, 0.08, 0.15, 0.25)
"""Neighbourhoods tried, as shares of the collection: narrow ones are drowned by noise, or empty where private vectors
lie a little elsewhere; wide ones forget the prompt."""
NEAREST_SHARE = 0.02  # of the public vectors, whose mean an answer is added to
RADIUS_QUANTILE = 0.75
VARIANCE = 0.95


@dataclass(frozen=True)
class RetrievalPlan:
    """All that is fixed before the first question; public.

    share: of the public vectors, and presumably of the private ones, that a neighbourhood holds. units: the public
    number of private units. interpolation: λ of top-k (the paper's). noise: expected standard deviation, per direction,
    of a condition. signal: length of what an answer usually tells. noise_ratio: length of the noise over that.
    """

    mechanism: Mechanism
    query: BallPlan | NearestPlan
    share: float
    units: float
    interpolation: float
    noise: float
    noise_ratio: float
    signal: float

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
        return public.count(self.share)

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
    times = 1 if mechanism == "ball-filter" else queries
    noise = calibrate(lambda z: [_times(_gaussian(z), times)], budget)
    if share is not None:
        return _ball(mechanism, noise, queries, units, public, share)
    tried = [each for each in SHARES if each * units >= 4] or SHARES[-1:]
    plans = [_ball(mechanism, noise, queries, units, public, each) for each in tried]
    return min(plans, key=lambda plan: _error(plan, public))


def _error(plan: RetrievalPlan, public: PublicSide) -> float:
    """Expected squared distance of an answer from the mean of the narrowest neighbourhood: what is lost to a wider one,
    and what of the answer's own message is lost to noise (and to shrinking it by that)."""
    near, wide = (
        np.stack([public.center(z, public.count(share)) for z in _some(public)])
        for share in (NEAREST_SHARE, plan.share)
    )
    ratio = plan.noise_ratio**2
    return float(np.square(wide - near).sum(1).mean()) + plan.signal**2 * ratio / (1 + ratio)


def _some(public: PublicSide) -> np.ndarray:
    """64 of the prompts that are planned with."""
    return public.prompts[np.random.default_rng(0).permutation(len(public.prompts))[:64]]


def told(public: PublicSide, share: float, basis: np.ndarray | None) -> tuple[float, np.ndarray]:
    """(how long a neighbourhood's own mean residual usually is, lengths of single residuals), among public vectors:
    what is told about a group of vectors that differ from the public neighbours as clusters of public ones do from each
    other."""
    count = public.count(share)
    rng = np.random.default_rng(0)
    lengths, means = [], []
    for direction in _some(public):
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
    count = public.count(share)
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
    mechanism: Mechanism, noise: float, queries: int, units: float, public: PublicSide, share: float
) -> RetrievalPlan:
    """noise: multiplier of one query, or with budgets of their own of all together."""
    if not 0 < share <= 1:
        raise InputError(f"--share {share} must lie above 0 and not above 1; no budget was spent. Try 0.02")
    directions = public.directions_for(VARIANCE)
    basis = public.basis(directions)
    signal, lengths = told(public, share, basis)
    radius = float(np.quantile(lengths, RADIUS_QUANTILE))
    cap = None
    if mechanism == "ball-filter":
        cap = best_cap(loads(public, share, queries), queries)
        noise = noise * math.sqrt(cap) * (1 + 1e-12)
    query = BallPlan(noise, radius, queries, basis, per_unit_cap=cap)
    plan = RetrievalPlan(mechanism, query, share, units, 1.0, 0.0, 0.0, signal)
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
        _, lengths = told(public, share, None)
        signal = float(np.median(lengths))  # nothing is known of the whole: anything may be told
        query = NearestPlan(k, noise, queries, rate)
        ratio = query.noise * math.sqrt(public.dimension) / signal
        mixed = 1 / (1 + ratio**2) if interpolation is None else interpolation
        return RetrievalPlan("topk", query, share, units, mixed, mixed * query.noise, ratio, signal)

    if neighbours is not None:
        return plan_of(neighbours)
    plans = [plan_of(max(1, round(share * units * rate))) for share in SHARES]
    return min(plans, key=lambda plan: _error(plan, public))


def _gaussian(noise: float) -> Any:
    from dp_accounting.dp_event import GaussianDpEvent

    return GaussianDpEvent(noise)


def _times(event: Any, count: int) -> Any:
    from dp_accounting.dp_event import SelfComposedDpEvent

    return event if count == 1 else SelfComposedDpEvent(event, count)
