"""How a ledger is stored: three tables, serialised durable transactions, a chain of hashes.

SQLite: one writer at a time (BEGIN IMMEDIATE), synchronous=EXTRA, so that a committed charge survives a power
cut. PostgreSQL: writers queue for a lock on the single row of the meta table.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event as sql_event
from sqlalchemy import exc

from sfumato.errors import InputError, LedgerError
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import canonical

FORMAT = "sfumato-ledger/1"
LOCK_TIMEOUT_S = 60.0
NO_HASH = "0" * 64

_tables = sql.MetaData()
META = sql.Table(
    "sfumato_meta", _tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("format", sql.Text), sql.Column("rows", sql.Integer),
    sql.Column("head", sql.Text), sql.Column("bound", sql.Text),
)  # fmt: skip
ENTRIES = sql.Table(
    "sfumato_entries", _tables,
    sql.Column("seq", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("hash", sql.Text, nullable=False),
)  # fmt: skip
CHARGES = sql.Table(  # the present state of each reservation; `verify` derives it again from the entries
    "sfumato_reservations", _tables,
    sql.Column("id", sql.Text, primary_key=True), sql.Column("key", sql.Text, unique=True),
    sql.Column("seq", sql.Integer), sql.Column("state", sql.Text, nullable=False),
)  # fmt: skip


@contextlib.contextmanager
def transaction(engine: sql.Engine, where: str, *, write: bool = False) -> Iterator[sql.Connection]:
    """One serialised transaction; whatever was written is on disk when it ends without error."""
    try:
        with engine.connect().execution_options(sfumato_write=write) as db, db.begin():
            yield db
    except exc.DBAPIError as error:
        raise LedgerError(_explain(where, error)) from error


def chained(previous: str, body: str) -> str:
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()


def head_row(db: sql.Connection, lock: bool = False) -> Any:
    query = sql.select(META)
    row = db.execute(query.with_for_update() if lock else query).first()
    if row is None or row.format != FORMAT:
        raise LedgerError(f"the ledger's head row is missing or not of format {FORMAT}. Put back a copy")
    return row


def spent_now(db: sql.Connection) -> tuple[Fraction, Fraction]:
    row = db.execute(sql.select(ENTRIES.c.body).order_by(ENTRIES.c.seq.desc()).limit(1)).first()
    if row is None:
        raise LedgerError("the ledger has no rows. Put back a copy")
    epsilon, delta = json.loads(row.body)["spent"]
    return Fraction(epsilon), Fraction(delta)


def append(db: sql.Connection, body: dict[str, Any], spent: tuple[Fraction, Fraction]) -> int:
    """Adds a row behind the head, with the sum that holds after it. Returns its number."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = canonical({**body, "spent": [str(part) for part in spent], "time": now})
    meta = head_row(db)
    digest = chained(meta.head, text)
    db.execute(sql.insert(ENTRIES).values(seq=meta.rows, body=text, hash=digest))
    db.execute(sql.update(META).values(rows=meta.rows + 1, head=digest))
    return int(meta.rows)


def parse_url(where: str | Path) -> sql.URL:
    text = os.fspath(where)
    if "://" not in text:
        return sql.URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        url = sql.make_url(text)
    except exc.ArgumentError as error:
        raise InputError(
            "--ledger: not a database URL; give a path or, for example, sqlite:///x.db"
        ) from error
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername.startswith("sqlite") and url.database in (None, "", ":memory:"):
        raise InputError(
            "--ledger: a ledger must outlive the program, so it needs a file; give sqlite:///x.db"
        )
    return url


def make_engine(url: sql.URL) -> sql.Engine:
    """Connections are opened for each transaction: nothing is inherited by a forked process."""
    sqlite = url.drivername.startswith("sqlite")
    arguments: dict[str, Any] = {"timeout": LOCK_TIMEOUT_S} if sqlite else {}
    try:
        engine = sql.create_engine(url, poolclass=sql.NullPool, connect_args=arguments)
    except ModuleNotFoundError as error:
        raise LedgerError(
            f"the ledger URL needs the Python package {error.name}; no budget was spent. Install it "
            '(for PostgreSQL: pip install "psycopg[binary]"), or use an SQLite file'
        ) from error
    except exc.NoSuchModuleError as error:
        raise InputError(
            f"--ledger: unknown kind of database {url.drivername!r}; give a path of a file"
        ) from error
    if sqlite:

        @sql_event.listens_for(engine, "connect")
        def _durable(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # transactions are begun below, not by the driver
            connection.execute("PRAGMA synchronous = EXTRA")

        @sql_event.listens_for(engine, "begin")
        def _begin(connection: sql.Connection) -> None:
            write = connection.get_execution_options().get("sfumato_write", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def create_file(file: Path, total: Budget, name: str) -> None:
    """Writes a new ledger aside and links it into place: never seen half made, never overwritten."""
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with transaction(make_engine(parse_url(part)), str(file), write=True) as db:
                create_tables(db, total, name)
            with contextlib.suppress(FileExistsError):  # another process was first: its ledger stands
                os.link(part, file)
        finally:
            part.unlink(missing_ok=True)
        directory = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise LedgerError(
            f"{file} cannot be created ({error.strerror}); no budget was spent. Choose another folder"
        ) from error


def create_tables(db: sql.Connection, total: Budget, name: str) -> None:
    _tables.create_all(db)
    db.execute(sql.insert(META).values(id=1, format=FORMAT, rows=0, head=NO_HASH, bound=None))
    body = {
        "kind": "open", "format": FORMAT, "name": name, "salt": secrets.token_hex(16),
        "total": {"epsilon": total.epsilon, "delta": total.delta},
    }  # fmt: skip
    append(db, body, (Fraction(0), Fraction(0)))


def missing(where: str) -> InputError:
    return InputError(
        f"there is no ledger at {where}; no budget was spent. Create one for this data set with "
        f"`sfumato ledger create {where} --epsilon E --delta D`, where E and D are all it may ever cost"
    )


def _explain(where: str, error: exc.DBAPIError) -> str:
    text = str(error.orig)
    known = {
        "not a database": "is not a ledger, or damaged. Check the path, or put back a copy",
        "malformed": "is damaged. Put back a copy",
        "no such table": "is a database but not a ledger. Check the path",
        "locked": f"was in use by another process for {LOCK_TIMEOUT_S:g} s. Try again when that has ended",
        "readonly": "cannot be written. Make the file and its folder writable",
        "unable to open": "cannot be opened. Check the path and its permissions",
        "full": "cannot be written, the disk is full. Free some space",
        "disk I/O": "cannot be read or written (input/output error). Check the disk",
    }
    advice = next((advice for sign, advice in known.items() if sign in text), f"cannot be used ({text})")
    return f"{where} {advice}; nothing was recorded and nothing was released"
