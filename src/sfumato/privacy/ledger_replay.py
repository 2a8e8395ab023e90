"""Checks a ledger by going through its rows again: the chain, the sums, the prices, the present state."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

from sfumato.errors import LedgerError
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.events import canonical, event_to_json, planned_from_json
from sfumato.privacy.ledger_store import NO_HASH, chained


class Replay:
    """Goes through the entries and derives what the ledger must say."""

    def __init__(self, where: str) -> None:
        self.where, self.hash, self.hashes, self.count = where, NO_HASH, set[str](), 0
        self.charges: dict[str, tuple[str | None, int, str]] = {}
        self.bound: str | None = None
        self._spent = Fraction(0), Fraction(0)
        self._epsilons: dict[str, float] = {}

    def wrong(self, what: str) -> LedgerError:
        return LedgerError(
            f"{self.where} was tampered with or damaged: {what}. Put back a copy and verify that"
        )

    def row(self, seq: int, text: str, digest: str) -> None:
        if seq != self.count:
            raise self.wrong(f"row {self.count} is missing or out of order")
        if digest != chained(self.hash, text):
            raise self.wrong(f"row {seq} does not fit the chain")
        self.hash, self.count = digest, seq + 1
        self.hashes.add(digest)
        try:
            self._apply(seq, json.loads(text))
        except (KeyError, TypeError, ValueError, LedgerError) as error:
            raise self.wrong(f"row {seq} makes no sense ({error})") from error

    def _apply(self, seq: int, body: dict[str, Any]) -> None:
        kind = body["kind"]
        if (kind == "open") != (seq == 0):
            raise ValueError("the opening row is not the first")
        if kind in ("reserve", "refuse"):
            self._check(body["epsilon"], body["planned"], None, body["delta"])
        if kind == "reserve":
            state = {k: body[k] for k in ("label", "epsilon", "delta", "planned")}
            state |= {"status": "open", "begun": {p["mechanism"]: 0 for p in body["planned"]}}
            self._add(body["epsilon"], body["delta"])
            self.charges[body["id"]] = (body["key"], seq, canonical(state))
        elif kind in ("begin", "settle"):
            key, first, text = self.charges[body["id"]]
            state = json.loads(text)
            if state["status"] != "open":
                raise ValueError("work on a settled reservation")
            if kind == "begin":
                plan = next(p for p in state["planned"] if p["mechanism"] == body["mechanism"])
                state["begun"][body["mechanism"]] += body["units"]
                if "mark" in body:
                    state.setdefault("marks", {})[body["mechanism"]] = body["mark"]
                if body["units"] < 1 or state["begun"][body["mechanism"]] > plan["count"]:
                    raise ValueError("more work than planned")
            else:
                if body["given_back"]:
                    self._check(
                        body["epsilon"], state["planned"], state["begun"], body["delta"] or state["delta"]
                    )
                elif (body["epsilon"], body["delta"]) != (state["epsilon"], state["delta"]):
                    raise ValueError("a price changed")
                if not (body["delta"] == state["delta"] or not any(state["begun"].values())):
                    raise ValueError("a delta changed")
                self._add(body["epsilon"], body["delta"])
                self._add(-state["epsilon"], -state["delta"])
                state |= {"status": "settled", **{k: body[k] for k in ("epsilon", "delta", "given_back")}}
            self.charges[body["id"]] = (key, first, canonical(state))
        elif kind == "bind":
            self.bound = body["digest"]
        elif kind not in ("open", "refuse"):
            raise ValueError(f"unknown kind {kind!r}")
        if body["spent"] != [str(part) for part in self._spent]:
            raise ValueError("the sum is wrong")

    def _add(self, epsilon: float, delta: float) -> None:
        self._spent = self._spent[0] + Fraction(epsilon), self._spent[1] + Fraction(delta)

    def _check(
        self, epsilon: float, plan: list[dict[str, Any]], begun: dict[str, int] | None, delta: float
    ) -> None:
        parts = [planned_from_json(p) for p in plan]
        events = [p.total if begun is None else p.begun(begun[p.mechanism]) for p in parts]
        key = canonical([[event_to_json(event) for event in events], delta])
        if key not in self._epsilons:
            self._epsilons[key] = epsilon_of(events, delta)
        if not (math.isfinite(epsilon) and epsilon >= self._epsilons[key] * (1 - 1e-6) - 1e-9):
            raise ValueError(f"epsilon {epsilon} is recorded for work that costs {self._epsilons[key]}")
