"""The ledger: what it grants, refuses and gives back; faults; tampering; many processes and kills."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from fractions import Fraction
from pathlib import Path

import pytest
from dp_accounting.dp_event import (
    DiscreteLaplaceDpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import BudgetError, InputError, LedgerError
from sfumato.privacy import ledger_store
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger

QUERY = GaussianDpEvent(50.0)
STEP = PoissonSampledDpEvent(0.25, GaussianDpEvent(12.0))
PLAN = [PlannedEvent("semantic_histogram", "classes", QUERY), PlannedEvent("dp_sgd", "steps", STEP, 40)]


def laplace(epsilon: float, name: str = "count") -> PlannedEvent:
    return PlannedEvent(name, "a number", DiscreteLaplaceDpEvent(epsilon, 1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.ledger.db"


@pytest.fixture
def ledger(file: Path) -> Ledger:
    return Ledger.open(file, total=Budget(8, 1e-5), name="x-rays")


def edit(file: Path, *statements: str) -> None:
    with sqlite3.connect(file) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def test_a_new_ledger_is_empty_and_stays(file, ledger):
    for opened in (
        ledger,
        Ledger.open(file),
        Ledger.open(f"sqlite:///{file}"),
        Ledger.open(str(file), total=Budget(8, 1e-5)),
    ):
        assert (opened.total, opened.name) == (Budget(8, 1e-5), "x-rays")
        assert (opened.spent.epsilon, opened.remaining.epsilon, opened.remaining.delta) == (0, 8, 1e-5)
        assert opened.reservations() == [] and opened.verify(ledger.head) == 1
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_full_price_counts_at_once(ledger):
    reservation = ledger.reserve("synthesize", PLAN, delta=5e-6)
    assert reservation.epsilon == epsilon_of([QUERY, SelfComposedDpEvent(STEP, 40)], 5e-6)
    assert (reservation.delta, reservation.status, reservation.label) == (5e-6, "open", "synthesize")
    assert list(reservation.planned) == PLAN
    assert ledger.spent.epsilon == reservation.epsilon
    assert ledger.reservations() == [reservation]


def test_across_reservations_epsilon_and_delta_add(ledger):
    first = ledger.reserve("a", PLAN, delta=1e-6)
    second = ledger.reserve("b", [laplace(0.5)], delta=0)
    third = ledger.reserve("c", [PlannedEvent("histogram", "", GaussianDpEvent(9.0))], delta=2e-6)
    exact = sum(Fraction(r.epsilon) for r in (first, second, third))
    assert Fraction(ledger.spent.epsilon) >= exact and ledger.spent.epsilon == pytest.approx(
        float(exact), rel=1e-15
    )
    assert ledger.spent.delta == pytest.approx(3e-6)
    assert Fraction(ledger.remaining.epsilon) <= 8 - exact


def test_beyond_the_budget_is_refused_recorded_and_free(ledger):
    ledger.reserve("a", [laplace(7.5)], delta=0)
    before = ledger.spent
    with pytest.raises(BudgetError, match=r"no budget was spent") as error:
        ledger.reserve("b", [laplace(0.6)], delta=0)
    assert "0.5" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BudgetError):
        ledger.reserve("c", [PlannedEvent("h", "", GaussianDpEvent(100.0))], delta=1.1e-5)
    assert ledger.spent == before
    assert [(r["label"], r["epsilon"]) for r in ledger.refusals()] == [
        ("b", 0.6),
        ("c", pytest.approx(0.0, abs=0.1)),
    ]
    ledger.reserve("d", [laplace(0.5)], delta=0)  # to the last bit
    assert ledger.remaining.epsilon == 0 and ledger.verify() == 5


@pytest.mark.parametrize("parts", [3, 7, 10, 49])
def test_splitting_a_budget_in_floating_point_is_not_refused(file, parts):
    ledger = Ledger.open(file, total=Budget(1, 1e-5))
    for index in range(parts):
        ledger.reserve(f"part {index}", [laplace(1 / parts)], delta=1e-5 / parts)
    assert ledger.spent.epsilon <= 1 + 1e-9 and ledger.spent.delta <= 1e-5 * (1 + 1e-9)
    with pytest.raises(BudgetError):
        ledger.reserve("more", [laplace(0.01)], delta=0)


@pytest.mark.parametrize("event, delta", [(GaussianDpEvent(0.0), 1e-6), (GaussianDpEvent(1.0), 0.0)])
def test_an_infinite_epsilon_never_enters(ledger, event, delta):
    with pytest.raises(LedgerError, match="no finite epsilon"):
        ledger.reserve("x", [PlannedEvent("m", "", event)], delta=delta)
    assert ledger.spent.epsilon == 0 and ledger.verify() == 1


def test_a_nan_epsilon_never_enters(ledger, monkeypatch):
    monkeypatch.setattr("sfumato.privacy.ledger.epsilon_of", lambda *_, **__: math.nan)
    with pytest.raises(LedgerError, match="no finite epsilon"):
        ledger.reserve("x", PLAN, delta=1e-6)
    with pytest.raises(InputError):
        monkeypatch.undo()
        ledger.reserve("x", PLAN, delta=math.nan)


def test_a_plan_names_each_mechanism_once(ledger):
    for plan in ([], [laplace(0.1), laplace(0.2)]):
        with pytest.raises(LedgerError, match="no budget was spent"):
            ledger.reserve("x", plan, delta=0)


def test_only_what_was_reserved_may_begin(ledger):
    reservation = ledger.reserve("s", PLAN, delta=5e-6)
    for mechanism, event, units in [
        ("label_histogram", QUERY, 1),
        ("semantic_histogram", GaussianDpEvent(50.0000001), 1),
        ("semantic_histogram", STEP, 1),
        ("semantic_histogram", QUERY, 2),
        ("dp_sgd", STEP, 41),
        ("dp_sgd", STEP, 0),
        ("dp_sgd", STEP, -1),
        ("dp_sgd", STEP, True),
        ("dp_sgd", SelfComposedDpEvent(STEP, 40), 1),
    ]:
        rows = ledger.verify()
        with pytest.raises(LedgerError):
            reservation.begin(mechanism, event, units)
        assert ledger.verify() == rows
    reservation.begin("semantic_histogram", QUERY)
    reservation.begin("dp_sgd", STEP, 39)
    reservation.begin("dp_sgd", STEP)
    with pytest.raises(LedgerError, match="40 of 40"):
        reservation.begin("dp_sgd", STEP)
    assert (reservation.begun("semantic_histogram"), reservation.begun("dp_sgd")) == (1, 40)
    with pytest.raises(LedgerError, match="not reserved"):
        reservation.begun("label_histogram")


def test_work_from_a_state_kept_elsewhere_goes_on_from_the_mark_that_the_ledger_knows(file, ledger):
    reservation = ledger.reserve("s", PLAN, delta=5e-6)
    assert reservation.mark("dp_sgd") == ""
    reservation.begin("dp_sgd", STEP, mark="a")
    reservation.begin("dp_sgd", STEP, mark="b", after="a")
    for after in ("a", "", "c"):
        with pytest.raises(LedgerError, match=r"another copy.*nothing was released"):
            reservation.begin("dp_sgd", STEP, mark="d", after=after)
    assert (reservation.mark("dp_sgd"), reservation.begun("dp_sgd")) == ("b", 2)
    reservation.begin("dp_sgd", STEP)  # without a mark nothing is asked and nothing changes
    assert (reservation.mark("dp_sgd"), reservation.begun("dp_sgd")) == ("b", 3)
    assert ledger.verify() == 5
    edit(file, """UPDATE sfumato_reservations SET state = replace(state, '"dp_sgd":"b"', '"dp_sgd":"a"')""")
    with pytest.raises(LedgerError, match="differs from its history"):
        ledger.verify()


def test_begin_is_durable_before_it_returns(file, ledger):
    reservation = ledger.reserve("s", PLAN, delta=5e-6)
    child = os.fork()
    if child == 0:
        reservation.begin("dp_sgd", STEP, 7)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert Ledger.open(file).reservations()[0].begun("dp_sgd") == 7


def test_settle_gives_everything_back_when_nothing_began(ledger):
    reservation = ledger.reserve("s", PLAN, delta=5e-6)
    reservation.settle()
    assert (reservation.status, reservation.epsilon, reservation.delta) == ("settled", 0, 0)
    assert (ledger.spent.epsilon, ledger.spent.delta) == (0, 0)
    assert all(type(event).__name__ == "NoOpDpEvent" for _, event in reservation.charged())


def test_settle_keeps_the_full_price_once_outputs_may_have_been_seen(ledger):
    reservation = ledger.reserve("s", PLAN, delta=5e-6)
    full = reservation.epsilon
    reservation.begin("semantic_histogram", QUERY)
    reservation.begin("dp_sgd", STEP, 10)
    reservation.settle()
    assert reservation.epsilon == full == ledger.spent.epsilon
    assert reservation.charged()[1][1] == SelfComposedDpEvent(STEP, 40)


def test_settle_gives_unbegun_work_back_when_outputs_were_not_seen(ledger):
    reservation = ledger.reserve("s", PLAN, delta=5e-6)
    reservation.begin("dp_sgd", STEP, 10)
    reservation.settle(outputs_unseen=True)
    assert reservation.epsilon == epsilon_of([SelfComposedDpEvent(STEP, 10)], 5e-6) == ledger.spent.epsilon
    assert reservation.delta == 5e-6
    reservation.settle()  # again changes nothing
    with pytest.raises(LedgerError, match="settled"):
        reservation.begin("dp_sgd", STEP)
    assert ledger.verify() == 4


def test_the_same_key_resumes_and_another_plan_under_it_is_refused(file, ledger):
    first = ledger.reserve("s", PLAN, delta=5e-6, key="runs/a")
    first.begin("dp_sgd", STEP, 3)
    again = Ledger.open(file).reserve("s", PLAN, delta=5e-6, key="runs/a")
    assert again.id == first.id and again.begun("dp_sgd") == 3
    for plan, delta in ((PLAN[:1], 5e-6), (PLAN, 4e-6)):
        with pytest.raises(LedgerError, match="other parameters"):
            ledger.reserve("s", plan, delta=delta, key="runs/a")
    assert len(ledger.reservations()) == 1
    other = ledger.reserve("s", [laplace(0.1)], delta=0, key="runs/b")
    assert other.id != first.id


def test_another_total_is_refused(file, ledger):
    for total in (Budget(9, 1e-5), Budget(8, 1e-6)):
        with pytest.raises(LedgerError, match="fixed at creation"):
            Ledger.open(file, total=total)


def test_a_missing_ledger_says_how_to_make_one(file):
    for where in (file, str(file), f"sqlite:///{file}"):
        with pytest.raises(InputError, match="sfumato ledger create"):
            Ledger.open(where)
    assert not file.exists()


@pytest.mark.parametrize("content", [b"", b"hello " * 400, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_file_that_is_no_ledger(file, content):
    file.write_bytes(content)
    for total in (None, Budget(8, 1e-5)):
        with pytest.raises(LedgerError) as error:
            Ledger.open(file, total=total)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert file.read_bytes() == content


def test_another_database_is_no_ledger(file):
    edit(file, "CREATE TABLE other (x)")
    with pytest.raises(LedgerError, match="not a ledger"):
        Ledger.open(file)


def test_a_damaged_page_is_noticed(file, ledger):
    for _ in range(20):
        ledger.reserve("x", [laplace(0.1)], delta=0)
    data = bytearray(file.read_bytes())
    data[5000:9000] = os.urandom(4000)
    file.write_bytes(data)
    with pytest.raises(LedgerError):
        Ledger.open(file).verify()


def test_a_locked_ledger_says_so(file, ledger, monkeypatch):
    monkeypatch.setattr(ledger_store, "LOCK_TIMEOUT_S", 0.2)
    impatient = Ledger.open(file)
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="in use by another process"):
        impatient.reserve("x", [laplace(0.1)], delta=0)
    holder.execute("ROLLBACK")
    holder.close()
    impatient.reserve("x", [laplace(0.1)], delta=0)


def test_a_read_only_ledger_can_be_read_but_not_charged(tmp_path):
    folder = tmp_path / "ledgers"
    Ledger.open(folder / "x.db", total=Budget(8, 1e-5)).reserve("x", [laplace(0.1)], delta=0)
    read_only = Ledger.open(f"sqlite:///file:{folder / 'x.db'}?mode=ro&uri=true")
    assert read_only.spent.epsilon == pytest.approx(0.1) and read_only.verify() == 2
    with pytest.raises(LedgerError, match="cannot be written"):
        read_only.reserve("y", [laplace(0.1)], delta=0)


def test_a_place_that_cannot_hold_a_ledger(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match="no budget was spent"):
        Ledger.open(tmp_path / "file" / "x.db", total=Budget(1, 1e-5))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "nonsense://x", "://"])
def test_urls_that_cannot_hold_a_ledger(url):
    with pytest.raises(InputError):
        Ledger.open(url, total=Budget(1, 1e-5))


def test_postgresql_without_its_driver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(LedgerError, match="psycopg") as error:
        Ledger.open("postgresql://owner:hunter2@host/db", total=Budget(1, 1e-5))
    assert "hunter2" not in str(error.value)


def test_binding_to_a_data_set(file, ledger):
    assert ledger.bind("digest of the folder")
    assert Ledger.open(file).bind("digest of the folder")
    assert not ledger.bind("digest of another folder")
    assert b"digest of" not in file.read_bytes()
    assert ledger.verify() == 2


@pytest.fixture
def used(file: Path, ledger: Ledger) -> Ledger:
    reservation = ledger.reserve("s", PLAN, delta=5e-6, key="k")
    reservation.begin("semantic_histogram", QUERY)
    reservation.begin("dp_sgd", STEP, 5)
    with pytest.raises(BudgetError):
        ledger.reserve("t", [laplace(9.0)], delta=0)
    reservation.settle(outputs_unseen=True)
    ledger.reserve("u", [laplace(0.25)], delta=0)
    assert ledger.verify(ledger.head) == 7
    return ledger


def rehashed(file: Path) -> None:
    """What somebody does who knows the format: recomputes the whole chain after an edit."""
    with sqlite3.connect(file) as db:
        head = ledger_store.NO_HASH
        rows = db.execute("SELECT seq, body FROM sfumato_entries ORDER BY seq").fetchall()
        for seq, body in rows:
            head = ledger_store.chained(head, body)
            db.execute("UPDATE sfumato_entries SET hash = ? WHERE seq = ?", (head, seq))
        db.execute("UPDATE sfumato_meta SET head = ?, rows = ?", (head, len(rows)))
    db.close()


TAMPERINGS = {
    "an edited epsilon": ["UPDATE sfumato_entries SET body = "
        "replace(body, '\"epsilon\":0.25', '\"epsilon\":0.05')"],
    "an edited total": ["UPDATE sfumato_entries SET body = "
        "replace(body, '\"epsilon\":8.0', '\"epsilon\":80.0')"],
    "a deleted row in the middle": ["DELETE FROM sfumato_entries WHERE seq = 3"],
    "a deleted last row": ["DELETE FROM sfumato_entries WHERE seq = 6"],
    "rows in another order": [
        "UPDATE sfumato_entries SET seq = -1 WHERE seq = 2",
        "UPDATE sfumato_entries SET seq = 2 WHERE seq = 3",
        "UPDATE sfumato_entries SET seq = 3 WHERE seq = -1",
    ],
    "renumbered after a deletion": [
        "DELETE FROM sfumato_entries WHERE seq = 3",
        "UPDATE sfumato_entries SET seq = seq - 1 WHERE seq > 3",
    ],
    "begun work undone": ["UPDATE sfumato_reservations SET state = "
        "replace(state, '\"dp_sgd\":5', '\"dp_sgd\":0')"],
    "a reservation removed": ["DELETE FROM sfumato_reservations WHERE key IS NULL"],
    "a key removed": ["UPDATE sfumato_reservations SET key = NULL"],
    "another head": ["UPDATE sfumato_meta SET head = 'abc'"],
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERINGS)
def test_tampering_is_found(file, used, what):
    edit(file, *TAMPERINGS[what])
    with pytest.raises(LedgerError, match="tampered"):
        used.verify()


@pytest.mark.parametrize(
    "old, new",
    [
        ('"epsilon":0.25', '"epsilon":0.05'),  # a price below what the events cost
        ('"noise_parameter":0.25', '"noise_parameter":0.45'),
        ('"units":5', '"units":50'),
        ('"units":5', '"units":-5'),
        ('"spent":["1', '"spent":["2'),
        ('"kind":"refuse"', '"kind":"ignore"'),
    ],
)
def test_a_forged_history_must_still_make_sense(file, used, old, new):
    with sqlite3.connect(file) as db:
        changed = db.execute("UPDATE sfumato_entries SET body = replace(body, ?, ?)", (old, new)).rowcount
        states = db.execute(
            "UPDATE sfumato_reservations SET state = replace(state, ?, ?)", (old, new)
        ).rowcount
    db.close()
    assert changed and states
    rehashed(file)
    with pytest.raises(LedgerError, match="tampered"):
        used.verify()


def test_an_older_copy_is_found_by_a_head_kept_elsewhere(file, used, tmp_path):
    shutil.copy(file, tmp_path / "copy")
    used.reserve("later", [laplace(0.5)], delta=0)
    head = used.head
    shutil.copy(tmp_path / "copy", file)
    assert used.verify() == 7  # by itself the copy is consistent: this is what the chain cannot see
    with pytest.raises(LedgerError, match="older copy"):
        used.verify(head)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_whatever_happens_the_ledger_adds_up(tmp_path_factory, data):
    ledger = Ledger.open(tmp_path_factory.mktemp("l") / "x.db", total=Budget(2, 1e-5))
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["reserve", "begin", "settle"]))
        existing = ledger.reservations()
        if action == "reserve" or not existing:
            epsilon, count = data.draw(st.floats(0.01, 1)), data.draw(st.integers(1, 3))
            plan = [PlannedEvent("count", "", DiscreteLaplaceDpEvent(epsilon, 1), count)]
            left = ledger.remaining
            try:
                ledger.reserve("r", plan, delta=data.draw(st.sampled_from([0.0, 1e-6])))
            except BudgetError:
                assert ledger.remaining == left
        else:
            chosen = data.draw(st.sampled_from(existing))
            try:
                if action == "begin":
                    chosen.begin("count", chosen.planned[0].event, data.draw(st.integers(1, 2)))
                else:
                    chosen.settle(outputs_unseen=data.draw(st.booleans()))
            except LedgerError:
                pass
        assert ledger.spent.epsilon <= 2 * (1 + 1e-9) and ledger.spent.delta <= 1e-5 * (1 + 1e-9)
        assert ledger.spent.epsilon == pytest.approx(sum(r.epsilon for r in ledger.reservations()), abs=1e-12)
    ledger.verify()


def hammer(file: str, log: str, count: int, epsilon: float) -> None:
    """Reserves, begins and settles until told otherwise, noting each begun unit after it was allowed to."""
    ledger = Ledger.open(file)
    with open(log, "a", buffering=1) as notes:
        for _ in range(count):
            try:
                reservation = ledger.reserve("h", [laplace(epsilon)], delta=0)
            except BudgetError:
                return
            if random.random() < 0.3:
                reservation.settle()
                continue
            reservation.begin("count", DiscreteLaplaceDpEvent(epsilon, 1))
            notes.write(reservation.id + "\n")
            if random.random() < 0.8:
                reservation.settle()


def hammering(
    tmp_path: Path, *, total: float, epsilon: float, processes: int, kills: int, count: int
) -> Ledger:
    file = tmp_path / "shared.db"
    ledger = Ledger.open(file, total=Budget(total, 0.0))
    context = multiprocessing.get_context("fork")
    logs = []

    def start() -> multiprocessing.process.BaseProcess:
        logs.append(tmp_path / f"log{len(logs)}")
        process = context.Process(target=hammer, args=(str(file), str(logs[-1]), count, epsilon))
        process.start()
        return process

    workers = [start() for _ in range(processes)]
    for _ in range(kills):
        time.sleep(random.uniform(0.05, 0.4))
        victim = random.randrange(processes)
        if workers[victim].is_alive():
            workers[victim].kill()
        workers[victim].join()
        workers[victim] = start()
    for worker in workers:
        worker.join()
    assert not any(worker.exitcode not in (0, -signal.SIGKILL) for worker in workers)
    ledger.verify()
    begun = {r.id for r in ledger.reservations() if r.begun("count")}
    noted = {line for log in logs if log.exists() for line in log.read_text().split()}
    assert noted <= begun  # whatever was allowed out is charged
    assert len(noted) * epsilon <= total * (1 + 1e-9)
    assert ledger.spent.epsilon <= total * (1 + 1e-9)
    return ledger


def test_processes_and_kills_never_overspend(tmp_path):
    ledger = hammering(tmp_path, total=2.0, epsilon=0.01, processes=3, kills=6, count=100)
    assert len(ledger.reservations()) >= 150


@pytest.mark.slow
def test_ten_thousand_reservations_and_kills_never_overspend(tmp_path):
    ledger = hammering(tmp_path, total=70.0, epsilon=0.01, processes=8, kills=200, count=10_000)
    assert len(ledger.reservations()) >= 7_000


def test_two_processes_may_create_the_same_ledger_at_once(tmp_path):
    file = tmp_path / "new.db"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=lambda: Ledger.open(file, total=Budget(1, 1e-5))) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert Ledger.open(file).verify() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["new.db"]


def test_thousands_of_equal_units_stay_quick(ledger):
    plan = [PlannedEvent("query", "", PoissonSampledDpEvent(0.001, GaussianDpEvent(2.0)), 5000)]
    reservation = ledger.reserve("q", plan, delta=1e-6)
    start = time.monotonic()
    for _ in range(20):
        reservation.begin("query", plan[0].event, 100)
    assert time.monotonic() - start < 5
    reservation.settle(outputs_unseen=True)
    assert ledger.verify() == 23


def test_rows_hold_canonical_json_only(file, used):
    with sqlite3.connect(file) as db:
        bodies = [row[0] for row in db.execute("SELECT body FROM sfumato_entries")]
    db.close()
    assert all(json.dumps(json.loads(b), sort_keys=True, separators=(",", ":")) == b for b in bodies)
