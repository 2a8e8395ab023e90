"""The persistent account of one protected data set: its total budget, every charge, every refusal.

Life of a charge: `reserve` counts the full price against the budget at once; `begin` records, durably, that a
unit of work starts, before any value computed from private data leaves the mechanism; `settle` closes.

What composes how. Inside a reservation all parameters are fixed when it is made, so its events compose by
privacy loss distribution. Across reservations parameters may depend on anything released before, so their
(epsilon, delta) add: basic composition is a valid filter under full adaptivity (Rogers et al. 2016;
Whitehouse et al. 2023). Work that never began is given back only if the decision to stop did not depend
on this reservation's own outputs; otherwise the price at a data-dependent stopping point would be an
odometer, which PLD composition is not.

Sums are exact (rational arithmetic). A reservation fits when the sum stays within `total` times (1 + 1e-9):
splitting a budget in floating point must not be refused for the last bit. What is spent is recorded and
certified as it is, never rounded down.

Rows are hash-chained. `verify` finds every edit, deletion or reordering made without recomputing the chain.
Somebody who can write to the file can also recompute all of it, or put back an older copy: that is found only
by comparing with a head kept elsewhere (every certificate holds one), `verify(head)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sql

from sfumato.errors import BudgetError, LedgerError
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Amount, Budget
from sfumato.privacy.events import (
    PlannedEvent,
    canonical,
    event_from_json,
    event_to_json,
    planned_from_json,
    planned_to_json,
    same_event,
)
from sfumato.privacy.ledger_replay import Replay
from sfumato.privacy.ledger_store import (
    CHARGES,
    ENTRIES,
    META,
    append,
    create_file,
    create_tables,
    head_row,
    make_engine,
    missing,
    parse_url,
    spent_now,
    transaction,
)

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

SLACK = Fraction(1, 10**9)


class Ledger:
    """One protected data set's account. Make it with `Ledger.open`; several processes may share it."""

    def __init__(self, engine: sql.Engine, where: str) -> None:
        self._engine, self._where = engine, where

    def __repr__(self) -> str:
        return f"Ledger({self._where!r})"

    @classmethod
    def open(cls, where: str | Path, *, total: Budget | None = None, name: str = "") -> Ledger:
        """Opens the ledger at `where`, or creates it there when `total` is given.

        Args:
            where: Path of an SQLite file, or any SQLAlchemy URL (`sqlite:///x.db`, `postgresql://...`).
            total: The whole budget of the data set, fixed for ever at creation. None opens what exists.
            name: Public name of the data set, recorded at creation.

        Raises:
            InputError: There is no ledger and no total to create one with.
            LedgerError: Another total is recorded, or the file is no ledger, locked or damaged.
        """
        url = parse_url(where)
        shown = (url.database or "") if url.drivername.startswith("sqlite") else url.render_as_string()
        file = Path(shown.removeprefix("file:")) if url.drivername.startswith("sqlite") else None
        if file is not None and not file.exists():
            if total is None:
                raise missing(shown)
            create_file(file, total, name)
        if file is not None and file.is_file() and file.stat().st_size == 0:
            raise LedgerError(
                f"{shown} is empty: the ledger was lost. Put back a copy; do not start a new one"
            )
        ledger = cls(make_engine(url), shown)
        if file is None:
            with ledger._transaction(write=True) as db:
                there = sql.inspect(db).has_table(META.name)
                if not there and total is None:
                    raise missing(shown)
                if not there and total is not None:
                    create_tables(db, total, name)
        recorded = ledger.total
        if total is not None and (total.epsilon, total.delta) != (recorded.epsilon, recorded.delta):
            raise LedgerError(
                f"{shown} was created for a total of epsilon {recorded.epsilon:g}, delta {recorded.delta:g}, "
                f"not epsilon {total.epsilon:g}, delta {total.delta:g}; no budget was spent. The total is "
                "fixed at creation: open the ledger without one, or use another file for another data set"
            )
        return ledger

    @property
    def total(self) -> Budget:
        """The whole budget, as fixed at creation."""
        total = self._first()["total"]
        return Budget(total["epsilon"], total["delta"])

    @property
    def name(self) -> str:
        """The public name given at creation."""
        return str(self._first()["name"])

    @property
    def spent(self) -> Amount:
        """Sum over all reservations, open ones at their full price; rounded up."""
        with self._transaction() as db:
            epsilon, delta = spent_now(db)
        return Amount(_up(epsilon), _up(delta))

    @property
    def remaining(self) -> Amount:
        """What a new reservation may cost at most; rounded down, never below zero."""
        total = self.total
        with self._transaction() as db:
            epsilon, delta = spent_now(db)
        return Amount(_down(Fraction(total.epsilon) - epsilon), _down(Fraction(total.delta) - delta))

    @property
    def head(self) -> str:
        """Hash of the last row: keep it elsewhere, and `verify(head)` finds an older copy put back."""
        with self._transaction() as db:
            return str(head_row(db).head)

    def reservations(self) -> list[Reservation]:
        """All reservations that were granted, oldest first."""
        with self._transaction() as db:
            rows = db.execute(sql.select(CHARGES.c.id).order_by(CHARGES.c.seq)).all()
        return [Reservation(self, row.id) for row in rows]

    def refusals(self) -> list[dict[str, Any]]:
        """All requests that were refused: label, epsilon, delta, time."""
        with self._transaction() as db:
            rows = db.execute(sql.select(ENTRIES.c.body).order_by(ENTRIES.c.seq)).all()
        bodies = [json.loads(row.body) for row in rows]
        return [
            {k: b[k] for k in ("label", "epsilon", "delta", "time")} for b in bodies if b["kind"] == "refuse"
        ]

    def reserve(
        self, label: str, planned: Sequence[PlannedEvent], *, delta: float, key: str | None = None
    ) -> Reservation:
        """Counts the price of all planned work against the budget, or refuses.

        Args:
            label: Public name of the work, e.g. "synthesize".
            planned: All that may be done under this reservation, parameters fixed from now on.
            delta: The reservation's delta; its epsilon is the PLD figure at that delta.
            key: Public name of the run. The same key with the same plan returns the existing reservation, so
                that running the same command again resumes instead of paying twice.

        Raises:
            BudgetError: Beyond what is left. The refusal is recorded, nothing is spent.
            LedgerError: No finite epsilon; mechanism named twice; key used before with another plan.
        """
        plan = [planned_to_json(p) for p in planned]
        if not plan or len({p["mechanism"] for p in plan}) < len(plan):
            raise LedgerError(
                f"{label}: a plan names each mechanism once and has at least one; no budget was spent"
            )
        if key is not None and (found := self._by_key(key, plan, delta)) is not None:
            return found
        epsilon = epsilon_of([p.total for p in planned], delta)
        if not math.isfinite(epsilon):
            raise LedgerError(
                f"{label}: the planned work has no finite epsilon at delta {delta:g}; no budget was spent. "
                "Give it noise, or a delta above 0"
            )
        entry = {"label": label, "key": key, "epsilon": epsilon, "delta": float(delta), "planned": plan}
        total = self.total
        with self._transaction(write=True) as db:
            head_row(db, lock=True)
            if key is not None and (found := self._by_key(key, plan, delta, db)) is not None:
                return found
            spent = spent_now(db)
            after = spent[0] + Fraction(epsilon), spent[1] + Fraction(float(delta))
            fits = after[0] <= Fraction(total.epsilon) * (1 + SLACK) and after[1] <= Fraction(total.delta) * (
                1 + SLACK
            )
            if not fits:
                append(db, {"kind": "refuse", **entry}, spent)
            else:
                ident = secrets.token_hex(8)
                seq = append(db, {"kind": "reserve", "id": ident, **entry}, after)
                state = {k: entry[k] for k in ("label", "epsilon", "delta", "planned")}
                state |= {"status": "open", "begun": {p["mechanism"]: 0 for p in plan}}
                db.execute(sql.insert(CHARGES).values(id=ident, key=key, seq=seq, state=canonical(state)))
                return Reservation(self, ident)
        left = self.remaining
        raise BudgetError(
            f"{label} would cost epsilon {epsilon:.6g} at delta {delta:g}, but {self._where} has epsilon "
            f"{left.epsilon:.6g}, delta {left.delta:g} left of epsilon {total.epsilon:g}, delta "
            f"{total.delta:g}; no budget was spent. Ask for less; `sfumato "
            "ledger show` lists what was spent"
        )

    def bind(self, fingerprint: str) -> bool:
        """Ties the ledger to a data set by a salted hash of its fingerprint, at first use.

        Returns:
            False when it was tied to another fingerprint before. That is no error, folders grow; warn then.
        """
        salt = self._first()["salt"]
        digest = hashlib.sha256(f"{salt}\n{fingerprint}".encode()).hexdigest()
        with self._transaction() as db:
            bound = head_row(db).bound
        if bound is None:
            with self._transaction(write=True) as db:
                bound = head_row(db, lock=True).bound
                if bound is None:
                    append(db, {"kind": "bind", "digest": digest}, spent_now(db))
                    db.execute(sql.update(META).values(bound=digest))
                    bound = digest
        return bound == digest

    def verify(self, *heads: str) -> int:
        """Checks every row: the chain of hashes, the sums, the epsilons (recomputed) and the present state.

        Args:
            heads: Heads kept elsewhere, e.g. in certificates, which must be part of the chain.

        Returns:
            Number of rows checked.

        Raises:
            LedgerError: The first thing found wrong.
        """
        with self._transaction() as db:
            meta = head_row(db)
            rows = db.execute(sql.select(ENTRIES).order_by(ENTRIES.c.seq)).all()
            charges = db.execute(sql.select(CHARGES)).all()
        replay = Replay(self._where)
        for row in rows:
            replay.row(row.seq, row.body, row.hash)
        if (meta.rows, meta.head) != (len(rows), replay.hash):
            raise replay.wrong(
                f"it records {meta.rows} rows, but {len(rows)} are there or the last one was changed"
            )
        present = {c.id: (c.key, c.seq, c.state) for c in charges}
        if present != replay.charges or meta.bound != replay.bound:
            raise replay.wrong("the state of a reservation differs from its history")
        for head in heads:
            if head not in replay.hashes:
                raise replay.wrong(
                    f"the head {head[:12]}… is not part of it: an older copy was put back, or rows cut"
                )
        return len(rows)

    def _by_key(
        self, key: str, plan: list[dict[str, Any]], delta: float, db: sql.Connection | None = None
    ) -> Reservation | None:
        with contextlib.nullcontext(db) if db is not None else self._transaction() as connection:
            row = connection.execute(sql.select(CHARGES).where(CHARGES.c.key == key)).first()
        if row is None:
            return None
        state = json.loads(row.state)
        if canonical(state["planned"]) != canonical(plan) or state["delta"] != delta:
            raise LedgerError(
                f"the run {key!r} was reserved with other parameters; no budget was spent. Run it with the "
                "options it was started with, or choose another output folder for a new run"
            )
        return Reservation(self, row.id)

    def _first(self) -> dict[str, Any]:
        with self._transaction() as db:
            row = db.execute(sql.select(ENTRIES.c.body).where(ENTRIES.c.seq == 0)).first()
        if row is None:
            raise LedgerError(f"{self._where} is damaged: its first row is gone. Put back a copy")
        return json.loads(row.body)

    @contextlib.contextmanager
    def _transaction(self, write: bool = False) -> Iterator[sql.Connection]:
        """One serialised transaction; whatever was written is on disk when it ends without error."""
        with transaction(self._engine, self._where, write=write) as db:
            yield db


@dataclass(frozen=True)
class Reservation:
    """A granted request. Its figures are read from the ledger, so they are current in every process."""

    ledger: Ledger
    id: str

    @property
    def label(self) -> str:
        return str(self._state()["label"])

    @property
    def epsilon(self) -> float:
        """What it counts for: the full price until settled."""
        return float(self._state()["epsilon"])

    @property
    def delta(self) -> float:
        return float(self._state()["delta"])

    @property
    def status(self) -> str:
        """`open` or `settled`."""
        return str(self._state()["status"])

    @property
    def planned(self) -> tuple[PlannedEvent, ...]:
        return tuple(planned_from_json(p) for p in self._state()["planned"])

    def begun(self, mechanism: str) -> int:
        """Units of work of that mechanism that began, whatever became of them."""
        return int(_of(self._state()["begun"], mechanism, self.label))

    def charged(self) -> list[tuple[PlannedEvent, DpEvent]]:
        """What a certificate must state: each planned part with the event counted for it now."""
        state = self._state()
        parts = [planned_from_json(p) for p in state["planned"]]
        given_back = state.get("given_back", False)
        return [(p, p.begun(state["begun"][p.mechanism]) if given_back else p.total) for p in parts]

    def mark(self, mechanism: str) -> str:
        """The mark of that mechanism's unit of work that began last; empty where none has one."""
        return str(self._state().get("marks", {}).get(mechanism, ""))

    def begin(
        self, mechanism: str, event: DpEvent, units: int = 1, *, mark: str = "", after: str = ""
    ) -> None:
        """Records that `units` units of the planned work start now. Durable when it returns.

        To be called before any value computed from private data leaves the mechanism, with the event the
        mechanism really is. Begun work is spent, whatever happens after.

        mark, after: for work that goes on from a state kept elsewhere: a new random mark of that state, and the mark it
        had before. The ledger lets only the state go on that it knows, so that of two copies one is refused.

        Raises:
            LedgerError: Not planned, another event than planned, more units than planned, settled, or the mark
                before is not the last one.
        """
        with self.ledger._transaction(write=True) as db:
            head_row(db, lock=True)
            state = self._state(db)
            label = state["label"]
            if state["status"] != "open":
                raise LedgerError(f"{label}: the reservation is settled; {mechanism} did not begin")
            begun = _of(state["begun"], mechanism, label)
            plan = next(p for p in state["planned"] if p["mechanism"] == mechanism)
            if not same_event(event, event_from_json(plan["event"])):
                raise LedgerError(
                    f"{label}: {mechanism} is not what was reserved ({canonical(event_to_json(event))} "
                    f"instead of {canonical(plan['event'])}); it did not begin and nothing was released"
                )
            if isinstance(units, bool) or units < 1 or begun + units > plan["count"]:
                raise LedgerError(
                    f"{label}: {mechanism} has begun {begun} of {plan['count']} reserved units, {units} more "
                    "cannot begin; nothing was released. Reserve more for a new run"
                )
            body = {"kind": "begin", "id": self.id, "mechanism": mechanism, "units": int(units)}
            if mark:
                marks = state.setdefault("marks", {})
                if marks.get(mechanism, "") != after:
                    raise LedgerError(
                        f"{label}: {mechanism} went on from another copy of its state meanwhile; nothing was released. "
                        "Use one copy only"
                    )
                marks[mechanism] = body["mark"] = mark
            state["begun"][mechanism] = begun + units
            append(db, body, spent_now(db))
            self._store(db, state)

    def settle(self, *, outputs_unseen: bool = False) -> None:
        """Closes the reservation; nothing more can begin. Settling again changes nothing.

        If nothing began, everything is given back. If everything began, the full price stays. In between,
        unbegun work is given back only with `outputs_unseen=True`, the caller's word that the decision to
        stop did not depend on anything this reservation released (a fixed deadline, a crash); otherwise the
        full price stays.
        """
        state = self._state()
        if state["status"] != "open":
            return
        parts = [planned_from_json(p) for p in state["planned"]]
        begun = dict(state["begun"])
        none, everything = not any(begun.values()), all(begun[p.mechanism] == p.count for p in parts)
        given_back = none or (outputs_unseen and not everything)
        epsilon, delta = state["epsilon"], state["delta"]
        if none:
            epsilon, delta = 0.0, 0.0
        elif given_back:
            epsilon = min(epsilon, epsilon_of([p.begun(begun[p.mechanism]) for p in parts], delta))
        with self.ledger._transaction(write=True) as db:
            head_row(db, lock=True)
            state = self._state(db)
            if state["status"] != "open":
                return
            if state["begun"] != begun:
                raise LedgerError(
                    f"{state['label']}: work began while settling; settle again when it has ended"
                )
            spent = spent_now(db)
            spent = (
                spent[0] - Fraction(state["epsilon"]) + Fraction(epsilon),
                spent[1] - Fraction(state["delta"]) + Fraction(delta),
            )
            body = {
                "kind": "settle",
                "id": self.id,
                "epsilon": epsilon,
                "delta": delta,
                "given_back": given_back,
            }
            append(db, body, spent)
            state |= {"status": "settled", "epsilon": epsilon, "delta": delta, "given_back": given_back}
            self._store(db, state)

    def _state(self, db: sql.Connection | None = None) -> dict[str, Any]:
        with contextlib.nullcontext(db) if db is not None else self.ledger._transaction() as connection:
            row = connection.execute(sql.select(CHARGES.c.state).where(CHARGES.c.id == self.id)).first()
        if row is None:
            raise LedgerError(f"{self.ledger._where} has no reservation {self.id}")
        return json.loads(row.state)

    def _store(self, db: sql.Connection, state: dict[str, Any]) -> None:
        db.execute(sql.update(CHARGES).where(CHARGES.c.id == self.id).values(state=canonical(state)))


def _of(begun: dict[str, int], mechanism: str, label: str) -> int:
    if mechanism not in begun:
        raise LedgerError(f"{label}: {mechanism} was not reserved; it did not begin and nothing was released")
    return begun[mechanism]


def _up(value: Fraction) -> float:
    out = float(value)
    return out if Fraction(out) >= value else math.nextafter(out, math.inf)


def _down(value: Fraction) -> float:
    out = float(max(value, Fraction(0)))
    return out if Fraction(out) <= max(value, Fraction(0)) else math.nextafter(out, 0.0)
