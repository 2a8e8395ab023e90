"""Recomputes epsilon from a release's privacy.json with dp-accounting alone; nothing of sfumato is imported.

    python benchmarks/verify_privacy_json.py runs/demo/release [more ...]

For each reservation: the claim, epsilon by privacy loss distributions (PLD) and by Renyi DP (RDP), for adding
or removing one unit. Exit status 1 when a claim differs from its events, or the sums differ from the totals.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

COMPOSITE = {"PoissonSampledDpEvent", "SelfComposedDpEvent"}


def event_of(obj: dict[str, Any]) -> Any:
    """A dp-accounting event from its JSON: type and field names are dp-accounting's own."""
    fields = {name: value for name, value in obj.items() if name != "type"}
    if obj["type"] in COMPOSITE:
        fields["event"] = event_of(fields["event"])
    if obj["type"] == "ComposedDpEvent":
        fields["events"] = [event_of(part) for part in fields["events"]]
    return getattr(dp_event, obj["type"])(**fields)


def pure(event: Any) -> float:
    """Epsilon at delta 0: finite for discrete Laplace noise only."""
    if isinstance(event, dp_event.SelfComposedDpEvent):
        return event.count * pure(event.event)
    if isinstance(event, dp_event.DiscreteLaplaceDpEvent):
        return event.noise_parameter * event.sensitivity
    return float("inf")


def by_pld(events: list[Any], delta: float, claimed: float) -> float:
    bound = sum(pure(event) for event in events)
    if delta == 0:
        return bound
    accountant = PLDAccountant(value_discretization_interval=1e-4 * max(1.0, claimed / 20))
    for event in events:
        accountant.compose(event)
    return min(bound, accountant.get_epsilon(delta))


def by_rdp(events: list[Any], delta: float) -> float:
    bound = sum(pure(event) for event in events)
    if delta == 0:
        return bound
    accountant = RdpAccountant()
    for event in events:
        count = 1
        while isinstance(event, dp_event.SelfComposedDpEvent):
            event, count = event.event, count * event.count
        if isinstance(event, dp_event.DiscreteLaplaceDpEvent):  # e-DP is e^2/2-zCDP, which RDP can compose
            event = dp_event.ZCDpEvent(rho=pure(event) ** 2 / 2)
        accountant.compose(event, count)
    return min(bound, accountant.get_epsilon(delta))


def check(file: Path) -> bool:
    """Prints the figures of one privacy.json; True when all of them agree."""
    certificate = json.loads(file.read_text(encoding="utf-8"))
    print(f"{file}: {certificate['unit']}, {certificate['relation']}")
    print(f"  {'reservation':<24}{'delta':>10}{'claimed':>12}{'PLD':>12}{'RDP':>12}")
    good, total = certificate["relation"] == "add_or_remove_one", {"epsilon": 0.0, "delta": 0.0}
    rdp_total = pld_total = 0.0
    for part in certificate["reservations"]:
        events = [event_of(entry["event"]) for entry in part["events"]]
        pld, rdp = by_pld(events, part["delta"], part["epsilon"]), by_rdp(events, part["delta"])
        tolerance = (1e-6 if part["epsilon"] <= 20 else 2e-3) * max(part["epsilon"], 1e-3)
        same = abs(pld - part["epsilon"]) <= tolerance
        print(
            f"  {part['label'][:22]:<24}{part['delta']:>10.3g}{part['epsilon']:>12.6f}"
            + f"{pld:>12.6f}{rdp:>12.6f}"
            + ("" if same else "   MISMATCH")
        )
        good, pld_total, rdp_total = good and same, pld_total + pld, rdp_total + rdp
        total = {name: total[name] + part[name] for name in total}
    same = all(abs(total[name] - certificate[name]) <= 1e-9 * max(total[name], 1e-12) for name in total)
    print(
        f"  {'total':<24}{certificate['delta']:>10.3g}{certificate['epsilon']:>12.6f}{pld_total:>12.6f}"
        f"{rdp_total:>12.6f}" + ("" if same else "   MISMATCH")
    )
    return good and same


def main() -> int:
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    files = [path / "privacy.json" if path.is_dir() else path for path in map(Path, sys.argv[1:])]
    return 0 if all(list(map(check, files))) else 1


if __name__ == "__main__":
    sys.exit(main())
