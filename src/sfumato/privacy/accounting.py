"""From events to epsilon, and from a budget to the noise that respects it.

Figures come from dp-accounting's privacy loss distributions (PLD), always the pessimistic estimate: a
proven upper bound on epsilon. Renyi DP (RDP) gives a second, larger, independent figure and a quick bracket
for calibration.

The events of one call must have parameters that were fixed before the first of them ran. Parameters chosen
after seeing earlier releases do not compose this way: their (epsilon, delta) add, see `ledger`.

**Replace-one.** Where dp-accounting has no replace-one distribution, or for RDP, the group-privacy bound
(two add-or-remove steps) is used: if M is (e, d')-DP for add-or-remove with (1 + exp(e)) d' <= delta then it
is (2e, delta)-DP for replace-one. dp-accounting's RDP accountant returns the add-or-remove figure of a
Gaussian unchanged when asked for replace-one, so it is never asked.

dp-accounting's replace-one distribution of the Poisson-sampled Gaussian compares (1-q) N(0) + q N(1) with
(1-q) N(0) + q N(-1). It dominates: for g >= 1 the hockey-stick divergence of neighbours x, x' is the maximum
over sets R of q B(R) - (1-q)(g-1) A(R) - q g C(R) with A = N(0), B = N(x), C = N(x'), |x|, |x'| <= 1. Take
the half-line H with N(1)(H) = B(R). By the Neyman-Pearson lemma A(R) >= N(0)(H), as |x| <= 1, and
C(R) >= N(-1)(H), as |x - x'| <= 2; so H does at least as well in one dimension. g < 1 follows by swapping.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sfumato.errors import BudgetError, InputError
from sfumato.privacy.budget import ADD_OR_REMOVE_ONE, Budget, Relation
from sfumato.privacy.events import event_to_json

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

FINEST = 1e-4
"""Width of the PLD's grid. Coarser above epsilon 50, where it would only cost time (still an upper bound)."""

_BRACKET_ORDERS = (*range(2, 65), 80, 100, 128, 192, 256, 512, 1024)


def epsilon_of(
    events: Sequence[DpEvent],
    delta: float,
    *,
    relation: Relation = ADD_OR_REMOVE_ONE,
    accountant: Literal["pld", "rdp"] = "pld",
) -> float:
    """Smallest epsilon known for which all `events` together are (epsilon, delta)-DP, an upper bound.

    Args:
        events: Composed; their parameters must have been fixed before the first ran.
        delta: In [0, 1). With 0 only pure mechanisms have a finite epsilon.
        relation: Neighbouring relation of the answer.
        accountant: "pld" for the figure to state, "rdp" for the second opinion.

    Returns:
        Epsilon >= 0; infinite when there is no guarantee (zero noise, or delta 0 with Gaussian noise).
    """
    if not 0 <= delta < 1:
        raise InputError(f"delta must be at least 0 and below 1, not {delta}")
    leaves = [leaf for event in events for leaf in _leaves(event, 1)]
    if not leaves:
        return 0.0
    if any(_without_noise(event) for event, _ in leaves):
        return math.inf
    if relation == ADD_OR_REMOVE_ONE:
        return _add_or_remove_one(leaves, accountant)(delta)
    found = math.inf
    if accountant == "pld" and delta > 0 and not any(_pure(event) for event, _ in leaves):
        found = _pld(leaves, relation, delta)(delta)
    if math.isfinite(found):
        return found
    found = _two_steps(_add_or_remove_one(leaves, accountant), delta)
    # For a very small delta the PLD's cut-off tails leave nothing to split; RDP's larger bound still holds.
    return found if math.isfinite(found) else _two_steps(_add_or_remove_one(leaves, "rdp"), delta)


def calibrate(make_events: Callable[[float], Sequence[DpEvent]], budget: Budget) -> float:
    """The smallest noise multiplier whose events fit the budget (add-or-remove-one, PLD).

    Args:
        make_events: Noise multiplier -> all events of the reservation. More noise must cost no more.
        budget: What the events may cost together.

    Returns:
        A noise multiplier for which `epsilon_of(make_events(it), budget.delta) <= budget.epsilon` was
        computed, with epsilon within 1e-5 (relative) of the budget wherever the accounting resolves that.

    Raises:
        InputError: delta is 0, which no Gaussian noise can meet.
        BudgetError: no amount of noise fits, because the other events alone cost too much.
    """
    if budget.delta == 0:
        raise InputError(
            "delta is 0, which Gaussian noise can never meet; no budget was spent. Try --delta 1e-6"
        )
    target = budget.epsilon

    def quick(noise: float) -> float:
        return _quick_rdp(make_events(noise), budget.delta)

    def exact(noise: float) -> float:
        return epsilon_of(make_events(noise), budget.delta)

    def rough(noise: float) -> float:  # on a coarser grid: an upper bound too, and ten times as fast
        leaves = [leaf for event in make_events(noise) for leaf in _leaves(event, 1)]
        if not leaves or any(_without_noise(event) for event, _ in leaves):
            return math.inf if leaves else 0.0
        return _add_or_remove_one(leaves, "pld", max(FINEST, 5e-4 * target))(budget.delta)

    def fits_roughly(noise: float) -> bool:
        bound = quick(noise)
        return bound <= target or (bound <= max(4 * target, 1.0) and exact(noise) <= target)

    high = 1.0
    while not fits_roughly(high):
        high *= 2
        if high > 1e8:
            raise BudgetError(
                f"no amount of noise fits epsilon {target:g} at delta {budget.delta:g}: the other parts "
                "alone cost more; no budget was spent. Raise the budget or leave parts out"
            )
    low = high / 2
    while low > 1e-6 and quick(low) <= target:  # RDP is never too small: what fits it fits
        high, low = low, low / 2
    while high / low > 1.02:  # tighten by RDP, which is fast, before asking the PLD
        middle = math.sqrt(low * high)
        low, high = (low, middle) if quick(middle) <= target else (middle, high)

    high = _narrow(rough, target, high, step=0.9, tolerance=1e-3)
    return _narrow(exact, target, high, step=0.999, tolerance=1e-5)


def _narrow(
    epsilon: Callable[[float], float], target: float, high: float, *, step: float, tolerance: float
) -> float:
    """The smallest noise found with epsilon(noise) <= target, starting from one near it; always checked."""
    at_high = epsilon(high)
    while at_high > target:
        high /= step
        at_high = epsilon(high)
    low = high * step
    at_low = epsilon(low)
    while at_low <= target:
        high, at_high, low, step = low, at_low, low * step**2, step**2
        if low < 1e-6:
            return high
        at_low = epsilon(low)
    # Secant steps on log epsilon against log noise, which is nearly straight; high always fits, low never.
    for turn in range(60):
        if at_high >= target * (1 - tolerance) or high / low < 1 + 1e-7:
            break
        middle = math.sqrt(low * high)
        if at_high > 0 and math.isfinite(at_low) and turn % 3 < 2:
            rise = math.log(at_low / (target * (1 - tolerance / 2))) / math.log(at_low / at_high)
            middle = low * (high / low) ** min(max(rise, 1e-3), 1 - 1e-3)
        at_middle = epsilon(middle)
        if at_middle <= target:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


def _leaves(event: DpEvent, count: int) -> Iterator[tuple[DpEvent, int]]:
    """The event as (uncomposed event, how often) in order, without those that cost nothing."""
    kind = type(event).__name__
    event_to_json(event)  # refuses what is not known
    attributes: Any = event
    if kind == "SelfComposedDpEvent":
        yield from _leaves(attributes.event, count * attributes.count)
    elif kind == "ComposedDpEvent":
        for part in attributes.events:
            yield from _leaves(part, count)
    elif kind == "PoissonSampledDpEvent" and attributes.sampling_probability == 1:
        yield from _leaves(attributes.event, count)
    elif count and kind != "NoOpDpEvent" and not (kind == "PoissonSampledDpEvent" and _never(attributes)):
        yield event, count


def _never(event: Any) -> bool:
    return event.sampling_probability == 0 or type(event.event).__name__ == "NoOpDpEvent"


def _without_noise(event: Any) -> bool:
    inner = event.event if type(event).__name__ == "PoissonSampledDpEvent" else event
    return getattr(inner, "noise_multiplier", 1.0) == 0


def _pure(event: Any) -> bool:
    return type(event).__name__ == "DiscreteLaplaceDpEvent"


def _add_or_remove_one(
    leaves: list[tuple[DpEvent, int]], accountant: str, grid: float = FINEST
) -> Callable[[float], float]:
    """delta -> epsilon for add-or-remove-one."""
    pure = sum(
        (event.noise_parameter * event.sensitivity * count if _pure(event) else math.inf)  # type: ignore[attr-defined]
        for event, count in leaves
    )
    curves: dict[str, Callable[[float], float]] = {}

    def epsilon(delta: float) -> float:
        if delta == 0:
            return pure
        if not curves:
            curves["it"] = (
                _rdp(leaves) if accountant == "rdp" else _pld(leaves, ADD_OR_REMOVE_ONE, delta, grid)
            )
        return min(pure, curves["it"](delta))

    return epsilon


def _pld(
    leaves: list[tuple[DpEvent, int]], relation: Relation, delta: float, grid: float = FINEST
) -> Callable[[float], float]:
    from dp_accounting.dp_event import SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation

    size = _rdp(leaves, _BRACKET_ORDERS)(delta)
    if not math.isfinite(size):
        return lambda _: math.inf
    accountant = PLDAccountant(NeighboringRelation[relation.name], grid * max(1.0, size / 50 * FINEST / grid))
    for event, count in leaves:
        accountant.compose(event if count == 1 else SelfComposedDpEvent(event, count))
    return lambda delta: _sound(accountant.get_epsilon(delta))


def _rdp(
    leaves: list[tuple[DpEvent, int]], orders: Sequence[float] | None = None
) -> Callable[[float], float]:
    from dp_accounting.dp_event import SelfComposedDpEvent, ZCDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders)
    with _without_chatter():
        for event, count in leaves:
            if _pure(event):  # e-DP is e^2/2-zCDP: Bun and Steinke 2016, proposition 1.4
                parameters: Any = event
                event = ZCDpEvent(rho=(parameters.noise_parameter * parameters.sensitivity) ** 2 / 2)
            accountant.compose(SelfComposedDpEvent(event, count))

    def epsilon(delta: float) -> float:
        with _without_chatter():
            return _sound(accountant.get_epsilon(delta))

    return epsilon


def _quick_rdp(events: Sequence[DpEvent], delta: float) -> float:
    leaves = [leaf for event in events for leaf in _leaves(event, 1)]
    if any(_without_noise(event) for event, _ in leaves):
        return math.inf
    return _rdp(leaves, _BRACKET_ORDERS)(delta) if leaves else 0.0


def _two_steps(epsilon: Callable[[float], float], delta: float) -> float:
    """Replace-one in two steps: 2 e(d') for the largest d' found with (1 + exp(e(d'))) d' <= delta."""
    if delta == 0:
        return 2 * epsilon(0.0)
    best, low, high = math.inf, math.log(delta) - 200.0, math.log(delta / 2)
    for _ in range(60):
        middle = (low + high) / 2
        at_middle = epsilon(math.exp(middle))
        if at_middle > 600:  # so small a delta is below what the PLD resolves: a larger one may do
            low = middle
        elif (1 + math.exp(at_middle)) * math.exp(middle) <= delta:
            best, low = min(best, 2 * at_middle), middle
        else:
            high = middle
    return best


def _sound(epsilon: Any) -> float:
    epsilon = float(epsilon)
    return math.inf if math.isnan(epsilon) else max(epsilon, 0.0)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Silences dp-accounting's warnings about orders it leaves out (the bound stays valid without them)."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
