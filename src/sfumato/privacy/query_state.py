"""What an index must never forget: each unit's used budget, how many queries began, and the answers that were given.

One SQLite file beside the private vectors, written as durably as the ledger. It is private: how much of its budget a
unit has used says which prompts it was near to. Nothing here is ever shown.

**Never free.** A query first writes what each unit used, that one more query was asked, a random mark and the noisy
answer, in one transaction; then the ledger counts it under that mark; only then the answer leaves. Before any answer
leaves, a kept one too, count and mark must agree. Where this file is one ahead of the ledger's mark, a process was
killed in between, and the ledger is brought up to it. A file that is missing, damaged, behind the ledger, be it by one
query, or a copy that went on by itself, is refused: budgets never start again.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sql
from filelock import FileLock

from sfumato.errors import InputError, LedgerError
from sfumato.privacy.ledger_store import make_engine, parse_url, transaction

if TYPE_CHECKING:
    from sfumato.privacy.events import PlannedEvent
    from sfumato.privacy.ledger import Reservation

FORMAT = "sfumato-index-state/1"
USED_UNIT = 1 << 20
"""What a unit uses in a query is counted in 2^-20 of the squared norm 1, rounded up."""

_tables = sql.MetaData()
_META = sql.Table(
    "meta", _tables,
    sql.Column("id", sql.Integer, primary_key=True), sql.Column("format", sql.Text), sql.Column("index", sql.Text),
    sql.Column("queries", sql.Integer), sql.Column("mark", sql.Text), sql.Column("before", sql.Text),
    sql.Column("used", sql.Integer), sql.Column("changes", sql.Integer),
)  # fmt: skip
_UNITS = sql.Table(
    "units", _tables,
    sql.Column("unit", sql.Integer, primary_key=True), sql.Column("name", sql.Text, unique=True),
    sql.Column("used", sql.Integer, nullable=False),
)  # fmt: skip
_RECORDS = sql.Table(
    "records", _tables,
    sql.Column("row", sql.Integer, primary_key=True), sql.Column("name", sql.Text, unique=True),
    sql.Column("unit", sql.Integer, nullable=False),
)  # fmt: skip
_ANSWERS = sql.Table(
    "answers", _tables, sql.Column("key", sql.Text, primary_key=True), sql.Column("value", sql.LargeBinary)
)


class QueryState:
    """The state file of one index. Make it with `create`, open it with the constructor."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file() or path.stat().st_size == 0:
            raise LedgerError(
                f"{path} is missing or empty: it holds what each record has used of its budget, and never starts again "
                "at zero; nothing was released. Put back the copy that belongs to this index"
            )
        self._engine = make_engine(parse_url(path))
        self._lock = FileLock(f"{path}.lock")
        with self._transaction() as db:
            self.index = str(self._meta(db)["index"])
            used = db.execute(sql.select(sql.func.coalesce(sql.func.sum(_UNITS.c.used), 0))).scalar_one()
            if used != self._meta(db)["used"]:
                raise self._damaged("what its records used does not add up")

    @classmethod
    def create(cls, path: Path) -> QueryState:
        """A new state file; its name must not be taken."""
        if path.exists():
            raise InputError(f"{path} is there already; no budget was spent. Choose another folder")
        with transaction(make_engine(parse_url(path)), str(path), write=True) as db:
            _tables.create_all(db)
            first = {"id": 1, "format": FORMAT, "index": secrets.token_hex(8)}
            db.execute(sql.insert(_META).values(**first, queries=0, mark="", before="", used=0, changes=0))
        path.chmod(0o600)
        return cls(path)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """One process and thread at a time; may be entered again inside."""
        with self._lock:
            yield

    def changes(self) -> int:
        """Goes up whenever records come or go."""
        with self._transaction() as db:
            return int(self._meta(db)["changes"])

    def records(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows int64 [N] in ascending order, unit of each int64 [N]) of all records that are not deleted."""
        with self._transaction() as db:
            found = db.execute(sql.select(_RECORDS.c.row, _RECORDS.c.unit).order_by(_RECORDS.c.row)).all()
        table = np.array(found, np.int64).reshape(-1, 2)
        return table[:, 0].copy(), table[:, 1].copy()

    def add(self, first_row: int, names: Sequence[str], units: Sequence[str]) -> None:
        """New records from `first_row` on; a unit that was here before goes on with what it has used.

        Raises InputError when a name is taken or comes twice.
        """
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise InputError(
                f"the record id {twice!r} comes twice; no budget was spent. Give each record its own id"
            )
        with self._transaction(write=True) as db:
            there = {row.name: int(row.unit) for row in db.execute(sql.select(_UNITS.c.name, _UNITS.c.unit))}
            fresh = [name for name in dict.fromkeys(units) if name not in there]
            number = len(there)
            there |= {name: number + position for position, name in enumerate(fresh)}
            if fresh:
                db.execute(
                    sql.insert(_UNITS), [{"unit": there[name], "name": name, "used": 0} for name in fresh]
                )
            for start in range(0, len(names), 500):
                part = list(names[start : start + 500])
                taken = db.execute(sql.select(_RECORDS.c.name).where(_RECORDS.c.name.in_(part))).first()
                if taken is not None:
                    raise InputError(
                        f"the record id {taken.name!r} is in the index already; no budget was spent. Delete it "
                        "first, or give the new record another id"
                    )
            rows = [
                {"row": first_row + i, "name": name, "unit": there[unit]}
                for i, (name, unit) in enumerate(zip(names, units, strict=True))
            ]
            if rows:
                db.execute(sql.insert(_RECORDS), rows)
            db.execute(sql.update(_META).values(changes=_META.c.changes + 1))

    def rows_of(self, names: Sequence[str]) -> list[int]:
        """The rows of these records. InputError when a name is not there, or comes twice."""
        rows: dict[str, int] = {}
        with self._transaction() as db:
            for name in names:
                found = db.execute(sql.select(_RECORDS.c.row).where(_RECORDS.c.name == name)).first()
                if found is None or name in rows:
                    raise InputError(f"there is no record {name!r} in the index; nothing was deleted")
                rows[name] = int(found.row)
        return list(rows.values())

    def delete(self, names: Sequence[str]) -> None:
        """Forget these records and every answer that was kept; what their units used stays used.

        Raises InputError, and deletes nothing, when a name is not there.
        """
        rows = self.rows_of(names)
        with self._transaction(write=True) as db:
            for row in rows:
                db.execute(sql.delete(_RECORDS).where(_RECORDS.c.row == row))
            db.execute(sql.delete(_ANSWERS))
            db.execute(sql.update(_META).values(changes=_META.c.changes + 1))

    def answer(self, key: str) -> np.ndarray | None:
        """The noisy vector that was answered under this key, float64 [k], or None."""
        with self._transaction() as db:
            row = db.execute(sql.select(_ANSWERS.c.value).where(_ANSWERS.c.key == key)).first()
        return None if row is None else np.frombuffer(row.value, np.float64).copy()

    def keep(self, key: str, value: np.ndarray) -> None:
        """Keep an answer that was paid for."""
        with self._transaction(write=True) as db:
            self._keep(db, key, value)

    def use(
        self,
        reservation: Reservation,
        query: PlannedEvent,
        units: np.ndarray,
        costs: np.ndarray,
        cap: int,
        key: str,
        answer: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """One query: let each unit use its cost where that keeps it within the cap, and count it in the ledger.

        query: what the ledger counts, for free: what the units' budgets are worth must have begun there. units, costs:
        int64 [M], each unit once. answer: bool [M] -> float64 [k], the noisy answer from the units that may still take
        part. It is returned when all is written.

        Raises:
            LedgerError: All planned queries were asked, or this file and the ledger do not belong together, or one of
                them is an older copy.
        """
        begun, known = self.get_in_step(reservation, query)
        if reservation.status != "open" or begun >= query.count:
            raise LedgerError(
                f"{query.mechanism}: {begun} of {query.count} reserved queries were asked, or the reservation is "
                "settled; nothing was released. Make a new index for more"
            )
        mark = secrets.token_hex(8)
        with self._transaction(write=True) as db:
            found = db.execute(
                sql.text(
                    "SELECT u.unit, u.used FROM json_each(:units) AS j JOIN units AS u ON u.unit = j.value"
                ),
                {"units": json.dumps(units.tolist())},
            ).all()
            used = {int(row[0]): int(row[1]) for row in found}
            if len(used) < len(units):
                raise self._damaged("it lacks units that its records name")
            before = np.array([used[unit] for unit in units.tolist()], np.int64)
            active = before + costs <= cap
            value = answer(active)
            now = np.stack([units[active], (before + costs)[active]], 1)
            db.execute(
                sql.text(
                    "UPDATE units SET used = json_extract(j.value, '$[1]') FROM json_each(:now) AS j "
                    "WHERE units.unit = json_extract(j.value, '$[0]')"
                ),
                {"now": json.dumps(now.tolist())},
            )
            self._keep(db, key, value)
            db.execute(
                sql.update(_META).values(
                    queries=_META.c.queries + 1,
                    mark=mark,
                    before=known,
                    used=_META.c.used + int(costs[active].sum()),
                )
            )
        reservation.begin(query.mechanism, query.event, mark=mark, after=known)
        return value

    def get_in_step(self, reservation: Reservation, query: PlannedEvent) -> tuple[int, str]:
        """Before any answer leaves, a kept one too: this file and the ledger went the same way, question by question.

        A question that was written here and that the ledger did not count, because a process was killed or the ledger
        was out of reach, is counted now. Returns the number of questions and the last one's mark. LedgerError where
        either is an older copy, or a copy that went on elsewhere.
        """
        begun, mark = reservation.begun(query.mechanism), reservation.mark(query.mechanism)
        with self._transaction() as db:
            meta = self._meta(db)
        if (meta["queries"], meta["before"]) == (begun + 1, mark):
            reservation.begin(query.mechanism, query.event, mark=meta["mark"], after=mark)
        elif (meta["queries"], meta["mark"]) != (begun, mark):
            raise self._damaged(
                f"it knows of {meta['queries']} queries and the ledger of {begun}, or of others: one of them is an "
                "older copy, or a copy that was asked elsewhere"
            )
        return meta["queries"], meta["mark"]

    def _keep(self, db: sql.Connection, key: str, value: np.ndarray) -> None:
        db.execute(sql.delete(_ANSWERS).where(_ANSWERS.c.key == key))
        db.execute(sql.insert(_ANSWERS).values(key=key, value=np.asarray(value, np.float64).tobytes()))

    def _meta(self, db: sql.Connection) -> dict[str, Any]:
        row = db.execute(sql.select(_META)).mappings().first()
        if row is None or row["format"] != FORMAT:
            raise self._damaged(f"its first row is gone or not of format {FORMAT}")
        return dict(row)

    def _damaged(self, what: str) -> LedgerError:
        return LedgerError(
            f"{self._path} cannot be trusted: {what}; nothing was released. Put back the copy that belongs to the "
            "ledger, or make a new index"
        )

    @contextlib.contextmanager
    def _transaction(self, write: bool = False) -> Iterator[sql.Connection]:
        with transaction(self._engine, str(self._path), write=write) as db:
            yield db
