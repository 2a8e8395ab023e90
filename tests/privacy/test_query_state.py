"""The state of an index: what was used stays used, whatever is lost, put back, killed or asked at the same time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import NoOpDpEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError, LedgerError
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.query_state import USED_UNIT, QueryState

QUERY, EVENT = "ball_query", NoOpDpEvent()
SIX = PlannedEvent(QUERY, "", EVENT, 6)
ALL = np.arange(3)
ONE = np.full(3, USED_UNIT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def state(path: Path) -> QueryState:
    made = QueryState.create(path)
    made.add(0, ["a", "b", "c"], ["u", "v", "w"])
    return made


@pytest.fixture
def reservation(tmp_path: Path) -> Reservation:
    ledger = Ledger.open(tmp_path / "ledger.db", total=Budget(1, 1e-5))
    return ledger.reserve("retrieve", [SIX], delta=1e-5)


def edit(file: Path, *statements: str) -> None:
    with sqlite3.connect(file) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def used(file: Path) -> dict[str, int]:
    with sqlite3.connect(file) as db:
        found = dict(db.execute("SELECT name, used FROM units").fetchall())
    db.close()
    return found


def silent(active: np.ndarray) -> np.ndarray:
    return np.array([float(active.sum())])


def ask(
    state: QueryState, reservation: Any, key: str = "q", cap: int = 2, answer: Any = silent, query: Any = SIX
) -> np.ndarray:
    """One query in which each unit takes part in full."""
    return state.use(reservation, query, ALL, ONE, cap * USED_UNIT, key, answer)


# --- the file


def test_a_new_state_is_empty_closed_to_others_and_takes_no_name_twice(path):
    state = QueryState.create(path)
    assert [part.tolist() for part in state.records()] == [[], []] and state.answer("x") is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(InputError, match="no budget was spent"):
        QueryState.create(path)


def nothing(file: Path) -> None:
    file.unlink()


def zeros(file: Path) -> None:
    file.write_bytes(b"")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def text(file: Path) -> None:
    file.write_text("used: 0\n" * 1000)


def another(file: Path) -> None:
    file.unlink()
    edit(file, "CREATE TABLE other (x)")


def reset(file: Path) -> None:
    edit(file, "UPDATE units SET used = 0 WHERE name = 'v'")


def no_meta(file: Path) -> None:
    edit(file, "DELETE FROM meta")


def other_format(file: Path) -> None:
    edit(file, "UPDATE meta SET format = 'sfumato-index-state/0'")


def no_units(file: Path) -> None:
    edit(file, "DELETE FROM units")


@pytest.mark.parametrize(
    "harm", [nothing, zeros, truncated, text, another, reset, no_meta, other_format, no_units]
)
def test_a_lost_or_damaged_state_is_refused_and_never_starts_at_zero(path, state, reservation, harm):
    ask(state, reservation)
    harm(path)
    with pytest.raises(LedgerError):
        QueryState(path)
    with pytest.raises(LedgerError):
        QueryState(path)  # nor after a first look at it


@pytest.mark.parametrize("harm", [nothing, zeros, truncated, text, another, no_meta, no_units])
def test_harm_to_a_state_that_is_open_is_refused_too(path, state, reservation, harm):
    ask(state, reservation)
    harm(path)
    before = reservation.begun(QUERY)
    with pytest.raises(LedgerError):
        ask(state, reservation, "other")
    assert reservation.begun(QUERY) == before
    with pytest.raises(LedgerError):
        QueryState(path)


# --- records and units


def test_rows_and_units_are_numbered_in_the_order_of_coming(state):
    state.add(3, ["d", "e", "f"], ["x", "v", "x"])
    rows, units = state.records()
    assert rows.tolist() == [0, 1, 2, 3, 4, 5] and units.tolist() == [0, 1, 2, 3, 1, 3]
    assert rows.dtype == units.dtype == np.int64


def test_ids_that_are_taken_or_come_twice_add_nothing(state, path):
    before = path.read_bytes(), state.changes()
    for names in (["d", "d"], ["d", "b"]):
        with pytest.raises(InputError, match=f"'{names[1]}'.*no budget was spent"):
            state.add(3, names, ["new", "new"])
    with pytest.raises(InputError, match="'c' is in the index already"):
        state.add(3, [*map(str, range(1200)), "c"], ["new"] * 1201)
    with pytest.raises(ValueError, match="zip"):
        state.add(3, ["d", "e"], ["new"])
    assert (path.read_bytes(), state.changes()) == before


def test_records_go_and_come_back_with_what_their_unit_used(path, state, reservation):
    ask(state, reservation)
    state.keep("plain", np.ones(2))
    before = state.changes()
    assert state.rows_of(["c", "a"]) == [2, 0]
    state.delete(["c", "a"])
    assert state.changes() > before and [part.tolist() for part in state.records()] == [[1], [1]]
    assert state.answer("q") is None and state.answer("plain") is None
    state.add(2, ["a"], ["u"])
    assert [part.tolist() for part in state.records()] == [[1, 2], [1, 0]]
    assert used(path) == {"u": USED_UNIT, "v": USED_UNIT, "w": USED_UNIT}
    assert ask(state, reservation, cap=1) == [0.0]
    QueryState(path)


@pytest.mark.parametrize("names", [["nobody"], ["a", "nobody"], ["a", "a"]])
def test_deleting_what_is_not_there_deletes_nothing(state, names):
    state.keep("k", np.ones(1))
    with pytest.raises(InputError, match="nothing was deleted"):
        state.delete(names)
    assert len(state.records()[0]) == 3 and state.answer("k") is not None


def test_answers_are_kept_to_the_last_bit(state):
    value = np.array([0.1, -np.pi * 1e-300, 5e300])
    state.keep("k", value)
    state.keep("k", value * 2)
    found = state.answer("k")
    assert found is not None and found.tolist() == (value * 2).tolist() and state.answer("K") is None
    found[0] = 0  # its own


# --- what is used


def test_a_unit_takes_part_exactly_until_its_cap(path, state, reservation):
    cap = 2 * USED_UNIT
    taken = []
    for costs in ([USED_UNIT, 1, 0], [USED_UNIT, cap - 1, 0], [1, 1, cap], [0, 0, 1]):
        state.use(
            reservation, SIX, ALL, np.array(costs), cap, "k",
            lambda active: (taken.append(active.tolist()), np.ones(1))[1],
        )  # fmt: skip
    assert taken == [[True] * 3, [True] * 3, [False, False, True], [True, True, False]]
    assert used(path) == {"u": cap, "v": cap, "w": cap}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cap=st.integers(0, 3000),
    asked=st.lists(st.dictionaries(st.integers(0, 5), st.integers(0, 1500), max_size=6), max_size=8),
    reopen=st.booleans(),
)
def test_nobody_ever_uses_more_than_the_cap_and_sums_add_up(tmp_path_factory, cap, asked, reopen):
    path = tmp_path_factory.mktemp("state") / "state.db"
    state = QueryState.create(path)
    state.add(0, list("abcdef"), list("uvwxyz"))

    class Counting:
        begun_so_far, status, marked = 0, "open", ""

        def mark(self, mechanism: str) -> str:
            return self.marked

        def begin(self, mechanism: str, event: Any, *, mark: str, after: str) -> None:
            assert after == self.marked and mark != after
            self.begun_so_far, self.marked = self.begun_so_far + 1, mark

        def begun(self, mechanism: str) -> int:
            return self.begun_so_far

    reservation: Any = Counting()
    mine = dict.fromkeys(range(6), 0)
    for costs in asked:
        units = np.array(sorted(costs), np.int64)
        active: list[bool] = []
        state.use(
            reservation, PlannedEvent(QUERY, "", EVENT, 99), units,
            np.array([costs[u] for u in units.tolist()], np.int64), cap, "k",
            lambda a, into=active: (into.extend(a.tolist()), np.ones(1))[1],
        )  # fmt: skip
        assert active == [mine[u] + costs[u] <= cap for u in units.tolist()]
        for unit, here in zip(units.tolist(), active, strict=True):
            mine[unit] += costs[unit] * here
        if reopen:
            state = QueryState(path)
    assert used(path) == {name: mine[i] for i, name in enumerate("uvwxyz")} and max(mine.values()) <= cap


# --- in step with the ledger


def test_no_query_begins_beyond_what_was_reserved(path, state, reservation):
    for number in range(6):
        ask(state, reservation, str(number), cap=100)
    before = used(path)
    for _ in range(2):
        with pytest.raises(LedgerError, match="6 of 6"):
            ask(state, reservation, "more", cap=100)
    assert reservation.begun(QUERY) == 6 and used(path) == before and state.answer("more") is None


def test_a_settled_reservation_answers_nothing(path, state, reservation):
    ask(state, reservation)
    reservation.settle()
    with pytest.raises(LedgerError, match="settled"):
        ask(state, reservation, "more")
    assert set(used(path).values()) == {USED_UNIT} and state.answer("more") is None


def test_what_fails_before_the_answer_was_never_asked(path, state, reservation):
    def crash(_: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ask(state, reservation, answer=crash)
        assert state.answer("q") is None and set(used(path).values()) == {0}
        assert reservation.begun(QUERY) == 0
        state = QueryState(path)
    assert ask(state, reservation) == [3.0] and reservation.begun(QUERY) == 1
    assert set(used(path).values()) == {USED_UNIT}


class Watched:
    """A reservation, with something to do before and after a query is counted."""

    status = "open"

    def __init__(self, real: Reservation, before: Any = None, after: Any = None) -> None:
        self.real, self.before, self.after = real, before or (lambda: None), after or (lambda: None)

    def begun(self, mechanism: str) -> int:
        return self.real.begun(mechanism)

    def mark(self, mechanism: str) -> str:
        return self.real.mark(mechanism)

    def begin(self, mechanism: str, event: Any, **marks: str) -> None:
        self.before()
        self.real.begin(mechanism, event, **marks)
        self.after()


def refused() -> None:
    raise LedgerError("no")


def test_an_answer_that_the_ledger_did_not_count_does_not_leave_and_is_counted_next(path, state, reservation):
    with pytest.raises(LedgerError, match="no"):
        ask(state, Watched(reservation, refused))
    assert set(used(path).values()) == {USED_UNIT} and reservation.begun(QUERY) == 0
    with pytest.raises(LedgerError, match="no"):
        state.get_in_step(Watched(reservation, refused), SIX)
    state.get_in_step(reservation, SIX)
    assert reservation.begun(QUERY) == 1
    state.get_in_step(reservation, SIX)
    assert ask(QueryState(path), reservation, "then", cap=3) == [3.0] and reservation.begun(QUERY) == 2


def put_back(copy: Path, path: Path) -> None:
    for suffix in ("", "-wal", "-journal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
        if Path(f"{copy}{suffix}").exists():
            shutil.copy(f"{copy}{suffix}", f"{path}{suffix}")


def set_aside(path: Path, copy: Path) -> Path:
    for suffix in ("", "-wal", "-journal", "-shm"):
        if Path(f"{path}{suffix}").exists():
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    return copy


def test_once_a_kept_answer_left_the_copy_from_before_it_is_refused(path, state, reservation, tmp_path):
    """Written, not counted: then the answer is asked for again, and a copy from before the question is put back."""
    ask(state, reservation, cap=9)
    old = set_aside(path, tmp_path / "old.db")
    with pytest.raises(LedgerError, match="no"):
        ask(state, Watched(reservation, refused), "k", cap=9)
    state.get_in_step(reservation, SIX)  # as before every kept answer
    put_back(old, path)
    with pytest.raises(LedgerError, match="older copy"):
        ask(QueryState(path), reservation, "k", cap=9)


def test_of_two_copies_that_went_on_by_themselves_one_is_refused(path, state, reservation, tmp_path):
    """Both know of as many questions as the ledger, but not of the same ones."""
    ask(state, reservation, cap=9)
    old = set_aside(path, tmp_path / "old.db")
    with pytest.raises(LedgerError, match="no"):
        ask(state, Watched(reservation, refused), "one", cap=9)
    ahead = set_aside(path, tmp_path / "ahead.db")
    put_back(old, path)
    ask(QueryState(path), reservation, "other", cap=9)
    put_back(ahead, path)
    for work in (
        lambda: QueryState(path).get_in_step(reservation, SIX),
        lambda: ask(QueryState(path), reservation, "new"),
    ):
        with pytest.raises(LedgerError, match="asked elsewhere"):
            work()


def test_of_two_copies_asked_at_once_one_answers(path, state, reservation, tmp_path):
    other = tmp_path / "other.db"
    set_aside(path, other)
    seen: list[Any] = []
    both = Watched(
        reservation, before=lambda: seen.append(ask(QueryState(other), reservation, "theirs", cap=9))
    )
    with pytest.raises(LedgerError, match="another copy"):
        ask(state, both, "mine", cap=9)
    assert len(seen) == 1 and reservation.begun(QUERY) == 1
    with pytest.raises(LedgerError, match="asked elsewhere"):
        QueryState(path).get_in_step(reservation, SIX)


@pytest.mark.parametrize("where", ["answer", "written", "counted"])
def test_killed_anywhere_the_next_query_goes_on_and_nothing_is_refunded(path, state, reservation, where):
    ask(state, reservation)

    def kill(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    killing = Watched(reservation, kill if where == "written" else None, kill)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            ask(state, killing, "k", answer=kill if where == "answer" else silent)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    state = QueryState(path)
    done = where != "answer"
    assert set(used(path).values()) == {(1 + done) * USED_UNIT} and (state.answer("k") is not None) == done
    assert reservation.begun(QUERY) == (2 if where == "counted" else 1)
    assert ask(state, reservation, "then", cap=3) == [3.0]
    assert reservation.begun(QUERY) == 2 + done and set(used(path).values()) == {(2 + done) * USED_UNIT}


@pytest.mark.parametrize("behind", [1, 2])
def test_an_older_copy_of_the_state_is_refused(path, state, reservation, tmp_path, behind):
    ask(state, reservation, cap=9)
    shutil.copy(path, tmp_path / "old.db")
    for number in range(behind):
        ask(state, reservation, str(number), cap=9)
    shutil.copy(tmp_path / "old.db", path)
    for opened in (QueryState(path), state, QueryState(path)):
        with pytest.raises(LedgerError, match="older copy"):
            ask(opened, reservation, "new", cap=9)
    assert reservation.begun(QUERY) == 1 + behind


def test_a_copy_from_the_middle_of_a_query_is_refused_too(path, state, reservation, tmp_path):
    """Whatever moment of a query a copy of the state is from: put back after the query it is refused."""
    copies: list[Path] = []

    def copy(name: str) -> None:
        copies.append(set_aside(path, tmp_path / name))

    ask(state, reservation, cap=9)
    watched, real = Watched(reservation), reservation.begun
    watched.begun = lambda mechanism: (copy(f"checked{len(copies)}.db"), real(mechanism))[1]  # type: ignore[method-assign]
    ask(state, watched, "k", cap=9, answer=lambda active: (copy("asked.db"), silent(active))[1])
    assert len(copies) >= 2 and copies[-1].name == "asked.db"
    for each in copies:
        put_back(each, path)
        with pytest.raises(LedgerError, match="older copy"):
            ask(QueryState(path), reservation, "new", cap=9)


def test_an_older_copy_of_the_ledger_and_a_new_state_are_refused(path, state, reservation, tmp_path):
    ask(state, reservation)
    shutil.copy(tmp_path / "ledger.db", tmp_path / "old.db")
    for key in ("second", "third"):
        ask(state, reservation, key)
    fresh = QueryState.create(tmp_path / "fresh.db")
    fresh.add(0, ["a", "b", "c"], ["u", "v", "w"])
    with pytest.raises(LedgerError, match="older copy"):
        ask(fresh, reservation)
    shutil.copy(tmp_path / "old.db", tmp_path / "ledger.db")
    with pytest.raises(LedgerError, match="older copy"):
        ask(state, reservation, "new")


# --- one at a time


def test_the_lock_lets_one_thread_in_and_lets_it_in_again(path, state):
    inside, most = [0], [0]

    def enter(opened: QueryState) -> None:
        for _ in range(5):
            with opened.exclusive(), opened.exclusive():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    other = QueryState(path)
    threads = [threading.Thread(target=enter, args=(opened,)) for opened in (state, state, other, other)]
    run(threads)
    assert most == [1]


def run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def in_children(*work: Callable[[], None]) -> None:
    """Each in a forked process of its own, at the same time."""
    children = []
    for each in work:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                each()
                code = 0
            os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(work)


def test_threads_and_processes_together_spend_no_more_than_the_cap(path, state, tmp_path):
    ledger = Ledger.open(tmp_path / "shared.db", total=Budget(1, 1e-5))
    many = PlannedEvent(QUERY, "", EVENT, 24)
    reservation = ledger.reserve("retrieve", [many], delta=1e-5)

    def work() -> None:
        def few(opened: QueryState) -> None:
            for _ in range(3):
                with opened.exclusive():
                    ask(opened, reservation, cap=10, query=many)

        opened = QueryState(path)
        run([threading.Thread(target=few, args=(opened,)) for _ in range(2)])

    in_children(work, work, work, work)
    assert reservation.begun(QUERY) == 24 and set(used(path).values()) == {10 * USED_UNIT}
    QueryState(path)
