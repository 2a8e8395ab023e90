"""privacy.json: what a release cost, in events that anybody can account for again.

The certificate states mechanisms, not measurements: no seed, no private count, no value computed from private
data. `verify_certificate` recomputes every figure with dp-accounting alone; only the parsing of events is
shared with the code that made the claim. `benchmarks/verify_privacy_json.py` does the same without this
package.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from sfumato.errors import LedgerError
from sfumato.privacy.budget import ADD_OR_REMOVE_ONE, REPLACE_ONE, Amount, Relation
from sfumato.report.words import RELATIONS, UNITS, claim, delta_claim

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from sfumato.privacy.ledger import Reservation

FORMAT = "sfumato-privacy/1"
LABEL_SET = "The set of labels is public; how often each label occurs is protected."
_FIELDS = ("format", "unit", "relation", "epsilon", "delta", "reservations")


def certificate(
    reservations: Sequence[Reservation],
    *,
    unit: str,
    relation: Relation = ADD_OR_REMOVE_ONE,
    public_size: int | None,
    budget: Amount | None,
    software: Mapping[str, str],
    ledger_head: str,
) -> dict[str, Any]:
    """The content of privacy.json for a release made under these reservations (none: public data only).

    Args:
        reservations: All that touched the private images for this release. Open ones count in full, and
            one that is named twice counts once.
        unit: "image" or "group", what one neighbouring step adds or removes.
        relation: Always add-or-remove-one; the replace-one figure stands beside it.
        public_size: Declared or DP-counted number of units, never the true one.
        budget: What the run was allowed, None for a run without private data.
        software: Versions, by name.
        ledger_head: Head of the ledger when the release was made ("" without one): it is proof, later, that
            the ledger still holds these charges.

    Returns:
        A JSON object. `epsilon` and `delta` are the sums over reservations; `epsilon_rdp` and
        `epsilon_replace_one` are null where no finite figure is proven.

    Raises:
        LedgerError: Another relation; or reservations under which nothing ever began: a release that needed
            them was then made from answers that some other reservation, not named here, has paid for.
    """
    from sfumato.privacy.accounting import epsilon_of
    from sfumato.privacy.events import event_to_json

    if relation != ADD_OR_REMOVE_ONE:
        raise LedgerError("certificates state add-or-remove-one and give replace-one beside it")
    parts, rdp, replaced = [], Fraction(0), Fraction(0)
    finite = {"rdp": True, "replaced": True}
    for reservation in {each.id: each for each in reservations}.values():
        charged = [(plan, event) for plan, event in reservation.charged() if _costs(event)]
        if not charged:
            continue
        events, delta = [event for _, event in charged], reservation.delta
        parts.append({
            "label": reservation.label, "epsilon": reservation.epsilon, "delta": delta,
            "events": [
                {"mechanism": plan.mechanism, "says": plan.says, "event": event_to_json(event)}
                for plan, event in charged
            ],
        })  # fmt: skip
        by_rdp = epsilon_of(events, delta, accountant="rdp")
        by_replacing = epsilon_of(events, delta, relation=REPLACE_ONE)
        finite["rdp"] &= math.isfinite(by_rdp)
        finite["replaced"] &= math.isfinite(by_replacing)
        rdp += Fraction(by_rdp) if math.isfinite(by_rdp) else 0
        replaced += Fraction(by_replacing) if math.isfinite(by_replacing) else 0
    if reservations and not parts:
        names = ", ".join(sorted({reservation.label for reservation in reservations}))
        raise LedgerError(
            f"the ledger knows of no work under the reservation(s) of this release ({names}), so what it was made "
            "from was paid for elsewhere; nothing is certified. Put back the ledger that the run was started "
            "with, or start again with another --out"
        )
    out: dict[str, Any] = {
        "format": FORMAT,
        "unit": unit,
        "relation": str(relation),
        "public_size": public_size,
        "epsilon": _sum(part["epsilon"] for part in parts),
        "delta": _sum(part["delta"] for part in parts),
        "epsilon_rdp": _up(rdp) if finite["rdp"] else None,
        "epsilon_replace_one": _up(replaced) if finite["replaced"] else None,
        "accountant": "pld",
        "budget": None if budget is None else {"epsilon": budget.epsilon, "delta": budget.delta},
        "label_set": LABEL_SET,
        "reservations": parts,
        "software": dict(software),
        "ledger": {"head": ledger_head},
    }
    out["statement"] = statement(out)
    return out


def software(*more: str) -> dict[str, str]:
    """Versions, for the certificate: of what every release rests on, and of these packages."""
    packages = ("sfumato", "dp-accounting", "torch", "diffusers", *more, "opendp")
    return {name.replace("-", "_"): importlib.metadata.version(name) for name in packages}


def statement(certificate: Mapping[str, Any]) -> str:
    """The guarantee in one sentence; epsilon and delta are rounded up."""
    unit = UNITS.get(certificate["unit"], certificate["unit"])
    if not certificate["reservations"]:
        return (
            "This release was made without the private images; apart from the set of labels, which is taken as "
            f"public, it reveals nothing about any {unit}."
        )
    relation = RELATIONS.get(certificate["relation"], certificate["relation"])
    return (
        f"This release is (ε = {claim(certificate['epsilon'])}, δ = {delta_claim(certificate['delta'])})-"
        f"differentially private with respect to {relation} {unit}; the set of labels is taken as public."
    )


@dataclass(frozen=True)
class Verification:
    """What came out of recomputing a certificate; `problems` is empty when it holds."""

    epsilon_claimed: float
    epsilon: float
    epsilon_rdp: float
    delta: float
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every figure was confirmed."""
        return not self.problems

    def __str__(self) -> str:
        figures = (
            f"claimed ε {self.epsilon_claimed:.6g}, recomputed from the events ε {self.epsilon:.6g} "
            f"(by RDP {self.epsilon_rdp:.6g}) at δ {self.delta:.3g}"
        )
        return f"holds: {figures}" if self.ok else f"DOES NOT HOLD: {'; '.join(self.problems)} ({figures})"


def verify_certificate(certificate: Any) -> Verification:
    """Recomputes every figure of a certificate from its events, with dp-accounting.

    It shows that the figures follow from the events. That these events were all that happened is for the
    ledger to show, `Ledger.verify(head)`.
    """
    unknown = Verification(math.nan, math.nan, math.nan, math.nan, [])
    if not isinstance(certificate, dict) or certificate.get("format") != FORMAT:
        unknown.problems.append(f"it is not of the format {FORMAT}")
        return unknown
    if missing := [name for name in _FIELDS if name not in certificate]:
        unknown.problems.append(f"it lacks {', '.join(missing)}")
        return unknown
    try:
        return _verified(certificate)
    except (KeyError, TypeError, ValueError, AttributeError, LedgerError) as error:
        unknown.problems.append(f"it cannot be read ({error})")
        return unknown


def _verified(certificate: dict[str, Any]) -> Verification:
    from sfumato.privacy.events import event_from_json

    problems: list[str] = []
    total, by_rdp, replaced = 0.0, 0.0, certificate.get("epsilon_replace_one")
    bounds: list[tuple[list[DpEvent], float]] = []
    for part in certificate["reservations"]:
        events = [event_from_json(entry["event"]) for entry in part["events"]]
        epsilon, delta = _finite(part["epsilon"]), _finite(part["delta"])
        recomputed = _pld_epsilon(events, delta, epsilon)
        if not _close(epsilon, recomputed):
            problems.append(f"{part['label']} claims ε {epsilon:.6g} for events that cost ε {recomputed:.6g}")
        total, by_rdp = total + recomputed, by_rdp + _rdp_epsilon(events, delta)
        bounds.append((events, delta))
    claimed, delta = _finite(certificate["epsilon"]), _finite(certificate["delta"])
    for name, value in (("epsilon", claimed), ("delta", delta)):
        added = sum(part[name] for part in certificate["reservations"])
        if abs(value - added) > 1e-9 * max(abs(added), 1e-12):
            problems.append(f"the reservations' {name} adds up to {added:.6g}, not {value:.6g}")
    rdp = certificate.get("epsilon_rdp")
    if (rdp is None) != math.isinf(by_rdp) or (rdp is not None and not _close(_finite(rdp), by_rdp)):
        problems.append(f"the RDP figure is {by_rdp:.6g}, not {rdp}")
    if replaced is not None and not _replace_one_holds(bounds, _finite(replaced)):
        problems.append(f"the replace-one figure {replaced:.6g} does not follow from the events")
    budget = certificate.get("budget")
    if budget is not None and claimed > budget["epsilon"] * (1 + 1e-9):
        problems.append(f"ε {claimed:.6g} is above the budget of {budget['epsilon']:g}")
    if budget is not None and delta > budget["delta"] * (1 + 1e-9):
        problems.append(f"δ {delta:.3g} is above the budget of {budget['delta']:g}")
    if certificate["relation"] != str(ADD_OR_REMOVE_ONE) or certificate.get("accountant", "pld") != "pld":
        problems.append("the figures are for add_or_remove_one by PLD, which is not what it says")
    if certificate.get("statement", statement(certificate)) != statement(certificate):
        problems.append("its statement is not what its figures say")
    return Verification(claimed, total, by_rdp, delta, problems)


def _pld(events: Sequence[DpEvent], claimed: float, relation: str = "ADD_OR_REMOVE_ONE") -> Any:
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation

    # Above epsilon 20 a finer grid costs minutes; a coarser one still gives an upper bound.
    accountant = PLDAccountant(NeighboringRelation[relation], 1e-4 * max(1.0, claimed / 20))
    for event in events:
        accountant.compose(event)
    return accountant


def _pld_epsilon(events: Sequence[DpEvent], delta: float, claimed: float) -> float:
    pure = sum(_pure_epsilon(event) for event in events)
    if delta == 0 or any(_noiseless(event) for event in events):
        return pure
    return min(pure, float(_pld(events, claimed).get_epsilon(delta)))


def _rdp_epsilon(events: Sequence[DpEvent], delta: float) -> float:
    pure = sum(_pure_epsilon(event) for event in events)
    return pure if delta == 0 else min(pure, float(_rdp(events).get_epsilon(delta)))


def _rdp(events: Sequence[DpEvent]) -> Any:
    from dp_accounting.dp_event import SelfComposedDpEvent, ZCDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    with _without_chatter():
        for event in events:
            inner, count = _uncomposed(event)
            if math.isfinite(pure := _pure_epsilon(inner)):  # e-DP is e^2/2-zCDP (Bun and Steinke 2016)
                inner = ZCDpEvent(rho=pure**2 / 2)
            accountant.compose(SelfComposedDpEvent(inner, count))
    return accountant


def _replace_one_holds(bounds: Sequence[tuple[list[DpEvent], float]], claimed: float) -> bool:
    """Whether the replace-one epsilons of the reservations add up to at most `claimed`, each proven.

    Directly by PLD, else by group privacy over two steps: 2e holds at delta if (1 + exp(e)) delta(e) <=
    delta.
    """
    left = claimed * (1 + 1e-6) + 1e-9
    indirect: list[tuple[list[DpEvent], float]] = []
    for events, delta in bounds:
        try:
            direct = float(_pld(events, claimed, "REPLACE_ONE").get_epsilon(delta)) if delta > 0 else math.inf
        except Exception as error:
            if type(error).__name__ != "UnsupportedEventError":
                raise
            direct = math.inf
        if math.isfinite(direct):
            left -= direct
        else:
            indirect.append((events, delta))
    for index, (events, delta) in enumerate(indirect):
        if delta == 0:
            left -= 2 * sum(_pure_epsilon(event) for event in events)
        elif (
            index < len(indirect) - 1
        ):  # needs a figure of its own: the largest share of what is left that holds
            low, high = 0.0, left
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (low, middle) if _two_steps_hold(events, delta, middle) else (middle, high)
            left -= high
        elif not _two_steps_hold(events, delta, left):
            return False
    return left >= 0


def _two_steps_hold(events: Sequence[DpEvent], delta: float, epsilon: float) -> bool:
    half = epsilon / 2
    if half > 300 or half < 0:
        return False
    at_half = float(_pld(events, epsilon).get_delta(half))
    with _without_chatter():
        at_half = min(at_half, float(_rdp(events).get_delta(half)))
    return (1 + math.exp(half)) * at_half <= delta * (1 + 1e-6)


def _uncomposed(event: Any) -> tuple[Any, int]:
    if type(event).__name__ == "SelfComposedDpEvent":
        inner, count = _uncomposed(event.event)
        return inner, count * event.count
    return event, 1


def _pure_epsilon(event: Any) -> float:
    event, count = _uncomposed(event)
    pure = type(event).__name__ == "DiscreteLaplaceDpEvent"
    return event.noise_parameter * event.sensitivity * count if pure else math.inf


def _noiseless(event: Any) -> bool:
    event, _ = _uncomposed(event)
    inner = event.event if type(event).__name__ == "PoissonSampledDpEvent" else event
    return getattr(inner, "noise_multiplier", 1) == 0


def _costs(event: Any) -> bool:
    return type(event).__name__ != "NoOpDpEvent"


def _close(claimed: float, recomputed: float) -> bool:
    tolerance = 1e-6 if claimed <= 20 else 2e-3  # the grids differ above, see `_pld` and accounting.FINEST
    return abs(claimed - recomputed) <= tolerance * max(claimed, 1e-3)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a figure")
    return float(value)


def _sum(values: Any) -> float:
    return _up(sum((Fraction(value) for value in values), Fraction(0)))


def _up(value: Fraction) -> float:
    out = float(value)
    return out if Fraction(out) >= value else math.nextafter(out, math.inf)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
