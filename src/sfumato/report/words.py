"""How reports say numbers, events and costs; shared by the page and the card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any

RELATIONS = {
    "add_or_remove_one": "adding or removing one",
    "replace_one": "replacing one",
}
_TWO_DIGITS = Context(prec=2)
UNITS = {"image": "image", "group": "group of images (all images of one person, artist or customer)"}


def claim(epsilon: float) -> str:
    """ε as text, rounded up: a report never claims less than was spent."""
    if epsilon == 0:
        return "0"
    if epsilon < 0.01:
        exponent = math.floor(math.log10(epsilon)) - 1
        return f"{math.ceil(epsilon / 10**exponent - 1e-9) * 10**exponent:.1e}"
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:g}"


def delta_claim(delta: float) -> str:
    """δ as text with two digits, rounded up: a report never claims less than was spent."""
    if delta == 0:
        return "0"
    text = f"{Decimal(delta):.2g}"
    if Decimal(text) < Decimal(delta) * (1 - Decimal("1e-9")):
        text = f"{Decimal(text).next_plus(_TWO_DIGITS):.2g}"
    return f"{float(text):.2g}"


def number(value: float) -> str:
    """A number without needless digits."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def event_text(event: dict[str, Any]) -> str:
    """A DpEvent of a certificate in words, e.g. `150 × (Poisson sample …)`."""
    kind = event.get("type")
    if kind == "GaussianDpEvent":
        return f"Gaussian noise, multiplier {number(event['noise_multiplier'])}"
    if kind == "LaplaceDpEvent":
        return f"Laplace noise, multiplier {number(event['noise_multiplier'])}"
    if kind == "DiscreteLaplaceDpEvent":
        scale, pure = 1 / event["noise_parameter"], event["noise_parameter"] * event["sensitivity"]
        return f"discrete Laplace noise of scale {number(scale)}, ε {number(pure)} with δ 0"
    if kind == "PoissonSampledDpEvent":
        inner = event_text(event["event"])
        return f"Poisson sample with probability {number(event['sampling_probability'])}, {inner}"
    if kind == "SelfComposedDpEvent":
        return f"{event['count']:,} × ({event_text(event['event'])})"
    if kind == "ComposedDpEvent":
        return "; ".join(event_text(inner) for inner in event["events"])
    if kind in ("NoOpDpEvent", "NonPrivateDpEvent"):
        return {"NoOpDpEvent": "nothing", "NonPrivateDpEvent": "NOT PRIVATE"}[kind]
    if kind == "EpsilonDeltaDpEvent":
        return f"ε {number(event['epsilon'])}, δ {number(event['delta'])}"
    return ", ".join(f"{key} {value}" for key, value in event.items())


@dataclass(frozen=True)
class Cost:
    """What one mechanism would have cost by itself, at the δ of its reservation."""

    reservation: str
    mechanism: str
    says: str
    event: str
    epsilon_alone: float


def costs(certificate: dict[str, Any]) -> list[Cost]:
    """One Cost for each event of a certificate, in its order.

    Composition is not a sum: the costs alone add up to more than the ε of their reservation.
    """
    from sfumato.privacy.accounting import epsilon_of
    from sfumato.privacy.events import event_from_json

    return [
        Cost(
            reservation["label"],
            entry["mechanism"],
            entry.get("says", ""),
            event_text(entry["event"]),
            epsilon_of([event_from_json(entry["event"])], reservation["delta"]),
        )
        for reservation in certificate["reservations"]
        for entry in reservation["events"]
    ]


def guessing_limit(epsilon: float, delta: float) -> float:
    """Best chance to guess rightly, from a fair coin, whether a unit was in: (e^ε + δ) / (1 + e^ε).

    Follows from the (ε, δ) trade-off (Kairouz, Oh and Viswanath 2015): a test's two error rates sum to at
    least 2(1 − δ) / (1 + e^ε), and its chance to be right is 1 minus half that sum.
    """
    return 1 - (1 - delta) / (1 + math.exp(min(epsilon, 700.0)))
