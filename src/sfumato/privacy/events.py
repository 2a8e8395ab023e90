"""Mechanisms as data: what was done to the private images, in dp-accounting's own words.

A `DpEvent` says everything an accountant must know about a mechanism and nothing else. Here they are
checked, written as JSON with dp-accounting's type and field names, and planned in units of work.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfumato.errors import LedgerError

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

# Every type the accounting understands, with the check each of its fields must pass.
_FIELDS: dict[str, dict[str, str]] = {
    "NoOpDpEvent": {},
    "GaussianDpEvent": {"noise_multiplier": "not_negative"},
    "DiscreteLaplaceDpEvent": {"noise_parameter": "positive", "sensitivity": "positive_integer"},
    "PoissonSampledDpEvent": {"sampling_probability": "probability", "event": "event"},
    "SelfComposedDpEvent": {"event": "event", "count": "integer"},
    "ComposedDpEvent": {"events": "events"},
}


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """The event as a JSON object: `{"type": "GaussianDpEvent", "noise_multiplier": 50.0}`.

    Raises LedgerError for a type that the accounting does not know or a parameter without meaning.
    """
    kind = type(event).__name__
    if kind not in _FIELDS:
        raise LedgerError(f"events of type {kind} cannot be accounted for; no budget was spent")
    out: dict[str, Any] = {"type": kind}
    for field, check in _FIELDS[kind].items():
        value = getattr(event, field)
        if check == "event":
            out[field] = event_to_json(value)
        elif check == "events":
            out[field] = [event_to_json(part) for part in value]
        else:
            out[field] = _checked(value, check, kind, field)
    return out


def event_from_json(obj: Any) -> DpEvent:
    """The dp-accounting event that `event_to_json` wrote.

    Raises LedgerError for an unknown type, missing or additional fields, or a parameter without meaning.
    """
    from dp_accounting import dp_event

    kind = obj.get("type") if isinstance(obj, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise LedgerError(
            f"unknown event type {kind!r}; this record was not written by this version of sfumato"
        )
    fields = _FIELDS[kind]
    if set(obj) != {"type", *fields}:
        raise LedgerError(
            f"{kind} must have exactly the fields {sorted(fields)}, not {sorted(set(obj) - {'type'})}"
        )
    values: dict[str, Any] = {}
    for field, check in fields.items():
        value = obj[field]
        if check == "event":
            values[field] = event_from_json(value)
        elif check == "events":
            if not isinstance(value, list):
                raise LedgerError(f"{kind}.{field} must be a list")
            values[field] = [event_from_json(part) for part in value]
        else:
            values[field] = _checked(value, check, kind, field)
    return getattr(dp_event, kind)(**values)


def canonical(obj: Any) -> str:
    """The one way of writing a JSON value: sorted keys, no spaces, no NaN. Equal values, equal text."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def same_event(first: DpEvent, second: DpEvent) -> bool:
    """Whether two events say exactly the same (every parameter equal to the last bit)."""
    return canonical(event_to_json(first)) == canonical(event_to_json(second))


@dataclass(frozen=True)
class PlannedEvent:
    """Work that a reservation will do: `count` units of it, each costing `event`.

    Args:
        mechanism: Name under which the work begins later, unique within a reservation.
        says: One sentence for people who read the certificate. It is published: no private values.
        event: What ONE unit of work costs (one release, one DP-SGD step).
        count: Units of work at most.
    """

    mechanism: str
    says: str
    event: DpEvent
    count: int = 1

    def __post_init__(self) -> None:
        event_to_json(self.event)
        object.__setattr__(self, "count", _checked(self.count, "integer", "PlannedEvent", "count"))
        if self.count < 1:
            raise LedgerError(
                f"{self.mechanism}: count must be at least 1, not {self.count}; no budget was spent"
            )

    @property
    def total(self) -> DpEvent:
        """The event of all units together."""
        return self.begun(self.count)

    def begun(self, units: int) -> DpEvent:
        """The event of the first `units` units of work (NoOp for none)."""
        from dp_accounting.dp_event import NoOpDpEvent, SelfComposedDpEvent

        if not 0 <= units <= self.count:
            raise LedgerError(f"{self.mechanism}: {units} units begun of {self.count} planned")
        if units == 0:
            return NoOpDpEvent()
        return self.event if units == 1 else SelfComposedDpEvent(self.event, units)


def planned_to_json(planned: PlannedEvent) -> dict[str, Any]:
    """A planned event as the ledger records it."""
    return {
        "mechanism": planned.mechanism, "says": planned.says,
        "event": event_to_json(planned.event), "count": planned.count,
    }  # fmt: skip


def planned_from_json(obj: dict[str, Any]) -> PlannedEvent:
    """What `planned_to_json` wrote."""
    return PlannedEvent(obj["mechanism"], obj["says"], event_from_json(obj["event"]), obj["count"])


def _checked(value: Any, check: str, kind: str, field: str) -> float | int:
    if check in ("integer", "positive_integer"):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise LedgerError(f"{kind}.{field} must be a whole number, not {value!r}")
        number = value.__index__()
        good = number >= (1 if check == "positive_integer" else 0)
    else:
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise LedgerError(f"{kind}.{field} must be a number, not {value!r}")
        number = float(value)
        good = math.isfinite(number) and number >= 0
        good = good and (check != "positive" or number > 0) and (check != "probability" or number <= 1)
    if not good:
        raise LedgerError(f"{kind}.{field} = {value!r} has no meaning ({check.replace('_', ' ')} expected)")
    return number
