"""From one token per private image to one token: which mechanisms, how much noise, and what is done with it after.

Methods
    "dpagg-ti"   ours: residuals from a public anchor, clipped to a public radius, along public directions of style, all
                 images; then shrinkage by the known noise. With `anchor="nearest"` the anchor is itself chosen
                 privately among the bank's styles.
    "mean"       the same in all directions, without shrinkage.
    "paper"      DPAgg-TI as published (arXiv 2411.14639): tokens made unit length, their mean, Gaussian noise.
    "selection"  the public style that most images vote for; no token is learnt.
    "dp-sgd"     textual inversion by DP-SGD, see `dp_sgd_inversion`.

Everything here is public or post-processing; the mechanisms are in `privacy.vectors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.errors import InputError
from sfumato.personalization.options import Method
from sfumato.personalization.style_bank import StyleBank
from sfumato.privacy.accounting import calibrate, epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.vectors import (
    NEAREST,
    VECTOR_MEAN,
    MeanPlan,
    nearest_candidate_event,
    vector_mean_event,
)

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

LARGEST_SHARE_OF_SELECTION = 1 / 3
TOO_NOISY = 1.0  # noise over the length of what a style usually is: beyond it the token says nothing


@dataclass(frozen=True)
class Geometry:
    """Where tokens are measured from and how far they count; public.

    center: float64 [D]. basis: float64 [D, k] or None. radius: R. spread: prior mean square of the noiseless mean in
    each of the k directions, or None where no public styles tell it. signal: the usual length of that mean.
    """

    center: np.ndarray
    radius: float
    basis: np.ndarray | None = None
    spread: np.ndarray | None = None

    @property
    def directions(self) -> int:
        """k."""
        return len(self.center) if self.basis is None else self.basis.shape[1]

    @property
    def signal(self) -> float:
        """Usual length of a style's mean residual; at most R."""
        return self.radius if self.spread is None else float(np.sqrt(self.spread.sum()))


def geometry(
    method: Method,
    anchor: np.ndarray,
    vocabulary: np.ndarray,
    bank: StyleBank | None,
    directions: int | None = None,
) -> Geometry:
    """The method's geometry. anchor: [D]; vocabulary: [V, D], the model's own tokens, which tell the radius where
    there is no bank; directions: how many of the bank's to use (all by default)."""
    anchor = anchor.astype(np.float64)
    if method == "paper":
        return Geometry(np.zeros_like(anchor), 1.0)
    if bank is None:
        lengths = np.linalg.norm(vocabulary.astype(np.float64) - anchor, axis=1)
        return Geometry(anchor, float(np.median(lengths[lengths > 0])))
    basis = None if method == "mean" else bank.directions(directions)
    radius = bank.radius(basis, anchor)
    spread = bank.spread(basis, radius, anchor) if radius > 0 else np.zeros(1)
    if not spread.sum() > 0:
        raise InputError(
            "the style bank's styles do not differ from the anchor along its directions; no budget was spent. Make a "
            "bank of more styles, or choose another --anchor"
        )
    return Geometry(anchor, radius, basis, spread)


@dataclass(frozen=True)
class Plan:
    """What a reservation will hold, fixed before it is made.

    noise_multiplier: of the mean, None for selection alone. selection_epsilon: price of the vote, None without one.
    units: the public number of units. geometry: of the mean. candidates: styles that can be voted for.
    """

    method: Method
    units: float
    geometry: Geometry
    noise_multiplier: float | None
    selection_epsilon: float | None
    sampling_probability: float = 1.0
    candidates: int = 0

    @property
    def events(self) -> list[PlannedEvent]:
        """For `Ledger.reserve`."""
        out = []
        if self.selection_epsilon is not None:
            says = "which public style most images are nearest to"
            out.append(PlannedEvent(NEAREST, says, nearest_candidate_event(self.selection_epsilon)))
        if self.noise_multiplier is not None:
            along = "in all directions" if self.geometry.basis is None else "along public directions of style"
            says = (
                f"mean of one token per unit, {'made' if self.method == 'paper' else 'clipped to'} length "
                f"{self.geometry.radius:.4g}, {self.geometry.directions} numbers {along}"
            )
            event = vector_mean_event(self.noise_multiplier, self.sampling_probability)
            out.append(PlannedEvent(VECTOR_MEAN, says, event))
        return out

    @property
    def costs(self) -> list[DpEvent]:
        """What the events cost, for the accounting."""
        return [each.total for each in self.events]

    def mean(self, center: np.ndarray | None = None) -> MeanPlan:
        """The mechanism's plan, about another centre if one was chosen."""
        assert self.noise_multiplier is not None
        shape = self.geometry
        return MeanPlan(
            center=shape.center if center is None else center.astype(np.float64), basis=shape.basis,
            clip_norm=shape.radius, noise_multiplier=self.noise_multiplier,
            divisor=max(1.0, self.units * self.sampling_probability),
            sampling_probability=self.sampling_probability, normalise=self.method == "paper",
        )  # fmt: skip

    @property
    def noise_share(self) -> float:
        """Expected length of the noise over the usual length of what it is added to."""
        return noise_length(self) / self.geometry.signal if self.noise_multiplier is not None else 0.0


def noise_length(plan: Plan) -> float:
    """Root mean square length of the noise in the released mean."""
    return plan.mean().noise * math.sqrt(plan.geometry.directions)


def make_plan(
    method: Method,
    budget: Budget,
    units: float,
    shape: Geometry,
    *,
    candidates: int = 0,
    select: bool = False,
    sampling_probability: float = 1.0,
) -> Plan:
    """Calibrate to the budget (exactly, by PLD). select: vote for an anchor among `candidates` public styles first."""
    if method == "dp-sgd":
        raise InputError("dp-sgd has a plan of its own")
    if (method == "selection" or select) and candidates < 2:
        raise InputError(
            "choosing among public styles needs a style bank of two or more; no budget was spent. Give "
            "--subspace, made by `sfumato style-bank`"
        )
    if method == "selection":
        return Plan(method, units, shape, None, budget.epsilon, candidates=candidates)
    share = _price_of_vote(budget.epsilon, units, candidates) if select else None
    plan = Plan(method, units, shape, 1.0, share, sampling_probability, candidates)
    noise = calibrate(lambda z: replace(plan, noise_multiplier=z).costs, budget)
    return replace(plan, noise_multiplier=noise)


def _price_of_vote(epsilon: float, units: float, candidates: int) -> float:
    """Enough that the vote misses the best by a quarter of the units in one of twenty cases, but not too much."""
    return min(LARGEST_SHARE_OF_SELECTION * epsilon, 4 * math.log(20 * candidates) / max(units, 1.0))


def what_would_do(plan: Plan, budget: Budget) -> tuple[int, float]:
    """(units, ε): the fewest units at this ε, and the smallest ε at these units, whose noise is not `TOO_NOISY`; the
    price of the vote is in it."""
    assert plan.noise_multiplier is not None
    voted = plan.selection_epsilon is not None
    shape, sampled = plan.geometry, plan.sampling_probability
    # The noise multiplier that one unit alone could bear.
    allowed = TOO_NOISY * shape.signal / (shape.radius * math.sqrt(shape.directions))

    def cost(units: float, price: float | None) -> float:
        noise = allowed * max(1.0, units * sampled)
        most = replace(plan, units=units, noise_multiplier=noise, selection_epsilon=price)
        return epsilon_of(most.costs, budget.delta)

    def fits(units: float, epsilon: float) -> bool:
        return cost(units, _price_of_vote(epsilon, units, plan.candidates)) <= epsilon

    units, high = max(1, math.ceil(plan.noise_multiplier / (allowed * sampled))), cost(plan.units, None)
    if voted:
        low = 0
        while not fits(units, budget.epsilon):
            low, units = units, 2 * units
        while units - low > 1:
            middle = (low + units) // 2
            low, units = (low, middle) if fits(middle, budget.epsilon) else (middle, units)
        least, high = high, high / (1 - LARGEST_SHARE_OF_SELECTION)
        while high > 1.0005 * least:
            between = (least + high) / 2
            least, high = (least, between) if fits(plan.units, between) else (between, high)
    return units, high


def shrunk(noisy: np.ndarray, center: np.ndarray, plan: Plan) -> np.ndarray:
    """The released token after shrinkage of its residual by the known noise: free, it looks at nothing else.

    With a prior from public styles, each direction is multiplied by spread / (spread + noise²), the linear estimate of
    least error; without one, the whole residual by the positive part of the James-Stein factor.
    """
    if plan.method != "dpagg-ti" or plan.noise_multiplier is None:
        return noisy
    shape, variance = plan.geometry, plan.mean().noise ** 2
    residual = noisy - center
    if shape.spread is not None and shape.basis is not None:
        along = shape.basis.T @ residual
        return center + shape.basis @ (along * shape.spread / (shape.spread + variance))
    length = float(residual @ residual)
    factor = max(0.0, 1 - (shape.directions - 2) * variance / length) if length > 0 else 0.0
    return center + factor * residual


def cosine(first: np.ndarray, second: np.ndarray, center: np.ndarray | None = None) -> float:
    """Cosine between two tokens, or between their residuals from a centre."""
    base = 0.0 if center is None else center
    a, b = np.ravel(first) - base, np.ravel(second) - base
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def norm_report(token: Sequence[np.ndarray], vocabulary: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """For each text encoder: length of the token's rows beside the vocabulary's. token: the parts [v, w] of each."""
    out = []
    for rows, words in zip(token, vocabulary, strict=True):
        lengths = np.linalg.norm(words.astype(np.float64), axis=1)
        out.append({
            "token_norms": [round(float(n), 4) for n in np.linalg.norm(rows.astype(np.float64), axis=-1)],
            "vocabulary_median": round(float(np.median(lengths)), 4),
            "vocabulary_95_percent": round(float(np.quantile(lengths, 0.95)), 4),
        })  # fmt: skip
    return out
