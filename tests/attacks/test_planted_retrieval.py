"""Rules of questions to a private collection, as checks that pass on the real code and fail on a planted bug.

The attack asks one fresh collection after another, with and without a canary, trains a threshold on half of the answers
and turns its error rates on the other half into a lower bound on epsilon (Clopper-Pearson). A bound above the claim
proves a bug. A correct mechanism fails with chance below 1e-6.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta, chi2

from sfumato.errors import LedgerError
from sfumato.privacy import private_query, vector_moments, vector_search
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.private_query import BALL_QUERY, FINE, Ball, BallPlan, NearestPlan
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.privacy.query_state import USED_UNIT, QueryState
from sfumato.privacy.vector_moments import MomentsPlan

ALARM, DELTA, RUNS, D = 1e-7, 1e-5, 300, 3
X, Y, Z = np.eye(D)
fresh = itertools.count()
TOPK = NearestPlan(2, 4.0, 4)
BALL = BallPlan(4.0, 0.5, 4)
BUDGETS = BallPlan(6.0, 0.5, 4, per_unit_cap=2)
EVERYWHERE = Ball(X, -2.0, -X)  # every residual points the canary's way


class Allowing:
    """A reservation that allows everything: for attacks on what comes out."""

    status = "open"

    def __init__(self, plan: Any) -> None:
        self.id, self.planned, self.calls = "allowing", tuple(plan.planned()), []
        self.marks: dict[str, str] = {}

    def begin(self, mechanism: str, event: Any, units: int = 1, *, mark: str = "", after: str = "") -> None:
        self.marks[mechanism] = mark
        self.calls.append(mechanism)

    def mark(self, mechanism: str) -> str:
        return self.marks.get(mechanism, "")

    def begun(self, mechanism: str) -> int:
        return self.calls.count(mechanism)


def collection(folder: Path, vectors: Any, units: Any = None) -> ProtectedVectors:
    """Row i is called "i"; units of one each unless told."""
    vectors = np.asarray(vectors, np.float32).reshape(-1, D)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    private = ProtectedVectors.create(folder / f"index{next(fresh)}", D)
    if len(vectors):
        names = [str(i) for i in range(len(vectors))]
        private.add(vectors, names, names if units is None else [str(unit) for unit in units])
    return private


def ask(private: Any, plan: Any, reservation: Any, key: Any = None, ball: Ball = EVERYWHERE) -> np.ndarray:
    key = f"key {next(fresh)}" if key is None else str(key)
    if isinstance(plan, NearestPlan):
        return private_query.nearest_mean(private, ball.direction, plan, reservation, key)[0]
    return private_query.ball_sum(private, ball, plan, reservation, key)[0]


def ledger_at(folder: Path) -> Ledger:
    return Ledger.open(folder / f"{next(fresh)}.db", total=Budget(1e3, 1e-3))


def reserved(folder: Path, plan: Any) -> Any:
    return ledger_at(folder).reserve("retrieve", plan.planned(), delta=DELTA)


def used(private: ProtectedVectors) -> dict[str, int]:
    with sqlite3.connect(private.folder / "state.db") as db:
        found = dict(db.execute("SELECT name, used FROM units").fetchall())
    db.close()
    return found


# --- the attack: a canary that pulls with its whole length


def epsilon_at_least(without: np.ndarray, with_it: np.ndarray) -> float:
    """Lower confidence bound on epsilon at DELTA, from samples of a statistic on two neighbouring collections."""
    half, best = len(without) // 2, 0.0
    for first, second in ((with_it, without), (-without, -with_it)):
        train = np.unique(np.concatenate([first[:half], second[:half]]))[:, None]
        gains = ((first[:half] >= train).mean(1) + 1e-9) / ((second[:half] >= train).mean(1) + 4 / half)
        at = train[int(np.argmax(gains))]
        hits, misses, n = int((first[half:] >= at).sum()), int((second[half:] >= at).sum()), len(first) - half
        low = beta.ppf(ALARM / 4, hits, n - hits + 1) if hits else 0.0
        high = beta.ppf(1 - ALARM / 4, misses + 1, n - misses) if misses < n else 1.0
        if low > DELTA:
            best = max(best, math.log((low - DELTA) / high))
    return best


class Forgetful(QueryState):
    """A state that starts anew for each run of the attack, without a disk: what a fresh index would be."""

    def __init__(self, private: ProtectedVectors) -> None:
        self._spent, self._changes = np.zeros(len(private._unit_of), np.int64), private._seen

    def exclusive(self) -> Any:
        return contextlib.nullcontext()

    def changes(self) -> int:
        return self._changes

    def answer(self, key: str) -> None:
        return None

    def keep(self, key: str, value: np.ndarray) -> None:
        pass

    def get_in_step(self, reservation: Any, query: Any) -> None:
        pass

    def use(  # type: ignore[override]
        self,
        reservation: Any,
        query: Any,
        units: np.ndarray,
        costs: np.ndarray,
        cap: int,
        key: str,
        answer: Any,
    ) -> np.ndarray:
        active = self._spent[units] + costs <= cap
        self._spent[units[active]] += costs[active]
        reservation.begin(query.mechanism, query.event)
        return answer(active)


def statistic(private: Any, plan: Any, questions: int) -> float:
    """All answers to the same question of a fresh index, along the canary and its count."""
    private._state, reservation = Forgetful(private), Allowing(plan)
    answers = np.array([ask(private, plan, reservation) for _ in range(questions)])
    if isinstance(plan, NearestPlan):
        return float(answers[:, 0].sum())
    heard = answers[: plan.per_unit_cap]  # afterwards the canary is out
    return float((heard[:, 0] / plan.residual_noise + 0.5 * heard[:, -1] / plan.count_noise).sum())


def private_enough(folder: Path, plan: Any, questions: int) -> bool:
    others = [-X, -X, -X + 0.1 * Y]
    drawn = []
    for vectors in (others, [*others, X]):
        private = collection(folder, vectors)
        drawn.append(np.array([statistic(private, plan, questions) for _ in range(RUNS)]))
    claim = [part.total for part in replace(plan, queries=questions).planned()]
    return epsilon_at_least(*drawn) <= epsilon_of(claim, DELTA)


ATTACKED = {"top-k": (TOPK, 1), "ball": (BALL, 1), "budgets": (BUDGETS, 4)}


@pytest.mark.parametrize("kind", ATTACKED)
def test_the_attack_does_not_beat_the_claim(tmp_path, kind):
    assert private_enough(tmp_path, *ATTACKED[kind])


def no_noise(total: np.ndarray, scale: float) -> np.ndarray:
    return total


def weak_noise(total: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(total + scale / 12 * np.random.default_rng().normal(size=total.shape))


@pytest.mark.parametrize("bug", [no_noise, weak_noise])
@pytest.mark.parametrize("kind", ATTACKED)
def test_noise_left_out_or_a_mean_of_twelve_accounted_as_a_sum(tmp_path, kind, bug, monkeypatch):
    monkeypatch.setattr(private_query, "discrete_gaussian", bug)
    assert not private_enough(tmp_path, *ATTACKED[kind])


# --- the same attack on the moments of the whole collection


def moments_private_enough(folder: Path) -> bool:
    """A canary of three vectors, ten radii from the center; all of its part lies in the first numbers."""
    plan, drawn = MomentsPlan(-X, 3.0, 0.2, np.eye(D)), []
    for vectors, units in (([-X] * 3, [0, 1, 2]), ([-X] * 3 + [X] * 3, [0, 1, 2, 3, 3, 3])):
        private = collection(folder, vectors, units)
        private._state, heard = Forgetful(private), []
        for _ in range(RUNS):
            found = vector_moments.vector_moments(private, plan, Allowing(plan))  # type: ignore[arg-type]
            heard.append(
                found.residuals[0] / plan.mean_noise
                + found.count / plan.count_noise / 2
                + found.squares[0, 0] / plan.square_noise
            )
        drawn.append(np.array(heard))
    return epsilon_at_least(*drawn) <= epsilon_of([part.total for part in plan.planned()], DELTA)


def test_the_attack_on_moments_does_not_beat_the_claim(tmp_path):
    assert moments_private_enough(tmp_path)


def no_length(steps: np.ndarray) -> np.ndarray:
    """Nothing is too long: neither a residual nor a part."""
    return np.zeros(len(steps))


@pytest.mark.parametrize(
    "name, bug", [("discrete_gaussian", no_noise), ("discrete_gaussian", weak_noise), ("_squares", no_length)]
)
def test_moments_without_noise_or_clipping(tmp_path, monkeypatch, name, bug):
    monkeypatch.setattr(vector_moments, name, bug)
    assert not moments_private_enough(tmp_path)


# --- noise: as large as stated, also where nothing is near


def noise_as_stated(folder: Path) -> bool:
    nowhere = Ball(X, 2.0, X)
    for plan, vectors in ((TOPK, []), (TOPK, [X]), (BALL, []), (BALL, [X]), (BUDGETS, []), (BUDGETS, [X])):
        private = collection(folder, vectors)
        private._state = Forgetful(private)
        quiet = replace(plan, noise_multiplier=1e-9)
        base = ask(private, quiet, Allowing(quiet), ball=nowhere)
        drawn = np.array([ask(private, plan, Allowing(plan), ball=nowhere) for _ in range(150)]) - base
        if isinstance(plan, NearestPlan):
            scaled = drawn / plan.noise
        else:
            scaled = drawn / np.append(np.full(D, plan.residual_noise), plan.count_noise)
        squares = np.square(scaled).sum()
        if not chi2.ppf(ALARM, scaled.size) < squares < chi2.isf(ALARM, scaled.size):
            return False
    return True


def test_noise(tmp_path):
    assert noise_as_stated(tmp_path)


def half(total: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(total + scale / 2 * np.random.default_rng().normal(size=total.shape))


def none_for_nothing(total: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(total + scale * np.random.default_rng().normal(size=total.shape)) if total.any() else total


@pytest.mark.parametrize("bug", [no_noise, half, none_for_nothing])
def test_noise_that_is_too_small(tmp_path, monkeypatch, bug):
    monkeypatch.setattr(private_query, "discrete_gaussian", bug)
    assert not noise_as_stated(tmp_path)


# --- sensitivity: one unit more, and what was there before the noise


VECTORS = np.random.default_rng(3).normal(size=(16, D))
OWNERS = [0, 0, 0, 0, 1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 0, 9]


def exact(private: Any, plan: Any, ball: Ball) -> np.ndarray:
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_query, "discrete_gaussian", lambda *given: (seen.append(given[0]), given[0])[1])
        ask(private, plan, Allowing(plan), ball=ball)
    return seen[0]


def sensitivity_as_stated(folder: Path) -> bool:
    """For every owner gone, whatever the question; also in the released value, where a divisor would show."""
    owners = np.array(OWNERS)
    with_all = collection(folder, VECTORS, OWNERS)
    with_all._state = Forgetful(with_all)
    for gone in range(10):
        less = collection(folder, VECTORS[owners != gone], owners[owners != gone])
        less._state = Forgetful(less)
        for plan, bound in (
            (NearestPlan(5, 1.0, 9), 2),
            (NearestPlan(40, 1.0, 9), 2),
            (replace(BALL, queries=99), 1),
        ):
            for ball in (EVERYWHERE, Ball(Y, 0.2, X / 2)):
                moved = exact(with_all, plan, ball) - exact(less, plan, ball)
                if sum(int(step) ** 2 for step in moved) > (bound * FINE) ** 2:
                    return False
                quiet = replace(plan, noise_multiplier=1e-9)
                one, other = (ask(p, quiet, Allowing(quiet), ball=ball) for p in (with_all, less))
                if isinstance(plan, NearestPlan):
                    if np.linalg.norm(one - other) > 2 / plan.neighbours + 1e-4:
                        return False
                elif np.linalg.norm((one - other)[:-1]) > plan.radius * (1 + 1e-4):
                    return False
    return True


def test_sensitivity(tmp_path):
    assert sensitivity_as_stated(tmp_path)


def padded_to_k(real: Any) -> Any:
    """Fewer than k found: -1, which numpy reads as the last record, again and again (faiss and its users)."""

    def heads(private: Any, direction: np.ndarray, plan: NearestPlan, lists: Any) -> np.ndarray:
        rows = real(private, direction, plan, lists)
        last = np.flatnonzero(private._alive)[-1:]
        return np.concatenate([rows, np.repeat(last, plan.neighbours - len(rows))])

    return heads


def every_vector_of_a_unit(real: Any) -> Any:
    return lambda private, direction, plan, lists: vector_search.ranked(
        private, direction, plan.neighbours, lists
    )[0]


def cut_off_where_the_rest_is_far(real: Any) -> Any:
    """Stops when the first ranks hold fewer than k units, taking what it has."""

    def heads(private: Any, direction: np.ndarray, plan: NearestPlan, lists: Any) -> np.ndarray:
        rows = vector_search.ranked(private, direction, 4, lists)[0]
        _, first = np.unique(private._unit_of[rows], return_index=True)
        few = rows[np.sort(first)]
        return few if len(few) < 3 else real(private, direction, plan, lists)

    return heads


@pytest.mark.parametrize("bug", [padded_to_k, every_vector_of_a_unit, cut_off_where_the_rest_is_far])
def test_wrong_neighbours(tmp_path, monkeypatch, bug):
    monkeypatch.setattr(private_query, "_heads", bug(private_query._heads))
    assert not sensitivity_as_stated(tmp_path)


def test_divided_by_the_number_that_was_found(tmp_path, monkeypatch):
    real = private_query._on_lattice

    def mean_of_what_is_there(vectors: np.ndarray) -> np.ndarray:
        return real(vectors) * 40 // max(1, len(vectors))

    monkeypatch.setattr(private_query, "_on_lattice", mean_of_what_is_there)
    assert not sensitivity_as_stated(tmp_path)


def unclipped(residuals: np.ndarray, lengths: np.ndarray, radius: float, weight: float) -> np.ndarray:
    stretched = np.column_stack([residuals / radius, np.full(len(residuals), weight)]) / math.hypot(1, weight)
    return np.trunc(stretched * FINE).astype(np.int64)


def count_on_top(residuals: np.ndarray, lengths: np.ndarray, radius: float, weight: float) -> np.ndarray:
    """The residual clipped to 1 and the count beside it: together longer than 1."""
    clipped = residuals / np.maximum(radius, lengths)[:, None]
    return np.trunc(np.column_stack([clipped, np.full(len(residuals), weight)]) * FINE).astype(np.int64)


@pytest.mark.parametrize("bug", [unclipped, count_on_top])
def test_parts_longer_than_one(tmp_path, monkeypatch, bug):
    monkeypatch.setattr(private_query, "clipped_parts", bug)
    assert not sensitivity_as_stated(tmp_path)


# --- budgets: charged, kept, and nobody's business but one's own


def budgets_hold(folder: Path) -> bool:
    """A unit in every ball pays for each, across new handles, and is out when its budget is used up."""
    private = collection(folder, [X, Y, Z])
    plan = replace(BUDGETS, noise_multiplier=1e-3, queries=9)
    reservation, before, here = Allowing(plan), used(private), []
    for i in range(9):
        here.append(round(float(ask(private, plan, reservation, i)[-1])))
        now = used(private)
        paid = [now[unit] - before[unit] for unit in now]
        if min(paid) < 0 or (here[-1] > 0) != (max(paid) > 0) or max(now.values()) > 2 * USED_UNIT:
            return False
        before, private = now, ProtectedVectors(private.folder, D)
    return here[0] == 3 and here[-1] == 0


def test_budgets(tmp_path):
    assert budgets_hold(tmp_path)


def test_the_charge_skipped(tmp_path, monkeypatch):
    real = QueryState.use
    monkeypatch.setattr(
        QueryState,
        "use",
        lambda self, paid, query, units, costs, *more: real(
            self, paid, query, units, np.zeros_like(costs), *more
        ),
    )
    assert not budgets_hold(tmp_path)


def test_the_cap_not_looked_at(tmp_path, monkeypatch):
    real = QueryState.use
    monkeypatch.setattr(
        QueryState,
        "use",
        lambda self, paid, query, units, costs, cap, *more: real(
            self, paid, query, units, costs, 1 << 60, *more
        ),
    )
    assert not budgets_hold(tmp_path)


def test_budgets_refunded_when_opened_again(tmp_path, monkeypatch):
    real = QueryState.__init__

    def refunding(self: QueryState, path: Path) -> None:
        real(self, path)
        with sqlite3.connect(path) as db:
            db.execute("UPDATE units SET used = 0")
            db.execute("UPDATE meta SET used = 0")
        db.close()

    monkeypatch.setattr(QueryState, "__init__", refunding)
    assert not budgets_hold(tmp_path)


def test_half_the_price(tmp_path, monkeypatch):
    """The norm charged where its square is due, and halves where wholes are: both let a unit in too often."""
    monkeypatch.setattr(private_query, "USED_UNIT", USED_UNIT / 2)
    private, plan = collection(tmp_path, [X]), replace(BUDGETS, noise_multiplier=1e-9)
    ask(private, plan, Allowing(plan))
    (paid,) = used(private).values()
    part = exact(collection(tmp_path, [X]), plan, EVERYWHERE)
    assert paid < sum(int(step) ** 2 for step in part) / FINE**2 * USED_UNIT
    monkeypatch.undo()
    honest = collection(tmp_path, [X])
    ask(honest, plan, Allowing(plan))
    (paid,) = used(honest).values()
    assert 0 <= paid - sum(int(step) ** 2 for step in part) / FINE**2 * USED_UNIT < 1


def charges_are_ones_own(folder: Path) -> bool:
    """What everybody else is charged is the same without one unit, to the last bit."""
    plan, charged, owners = replace(BUDGETS, noise_multiplier=1e-9, queries=9), [], np.array(OWNERS)
    for some in (owners > -1, owners != 5):
        private, reservation = collection(folder, VECTORS[some], owners[some]), Allowing(plan)
        for i, ball in enumerate((EVERYWHERE, Ball(Y, 0.2, X / 2), Ball(X, 0.5, Y / 2), Ball(Z, 0.0, Z))):
            ask(private, plan, reservation, i, ball)
        charged.append(used(private))
    charged[0].pop("5")
    return charged[0] == charged[1]


def test_what_others_are_charged(tmp_path):
    assert charges_are_ones_own(tmp_path)


def nearest_few(
    vectors: Any, queries: np.ndarray, thresholds: np.ndarray, lists: Any = None
) -> list[np.ndarray]:
    """Top-k paid from units' own budgets: the absence of one brings another in, which then pays, and so drops out of
    later answers. What it pays depends on who else is there, so no individual budget bounds anything (rule 22)."""
    return [np.sort(vector_search.ranked(vectors, query, 3, lists)[0]) for query in queries]


def test_top_k_paid_from_units_own_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr(private_query, "within", nearest_few)
    assert not charges_are_ones_own(tmp_path)


def test_why_top_k_may_not_be_paid_from_units_own_budgets(tmp_path, monkeypatch):
    """By hand, k = 1 and one participation each. A is nearest to the first question and pays all it has. Were it not
    there, B would have paid, and would be out when the second question comes, to which A is not even near: A moves an
    answer after its budget is used up, by what is not its own."""
    monkeypatch.setattr(
        private_query, "within",
        lambda vectors, queries, *_: [vector_search.ranked(vectors, query, 1)[0] for query in queries],
    )  # fmt: skip
    plan, a, b = BallPlan(1e-9, 0.1, 9, per_unit_cap=1), X, X + 0.3 * Y
    counts = {}
    for name, vectors in (("both", [a, b]), ("b", [b])):
        private, reservation = collection(tmp_path, vectors), Allowing(plan)
        answers = [ask(private, plan, reservation, i, Ball(d, 0, np.zeros(D))) for i, d in enumerate((X, Y))]
        counts[name] = [round(float(answer[-1])) for answer in answers]
    assert counts == {"both": [1, 1], "b": [1, 0]}


def kernels_by_place(real: Any) -> Any:
    """What a batch does to rounding: a part that depends on how many others there are."""

    def parts(private: Any, rows: np.ndarray, center: np.ndarray, plan: BallPlan) -> Any:
        units, found = real(private, rows, center, plan)
        return units, found - np.sign(found) * (len(rows) % 3)

    return parts


def test_parts_that_depend_on_the_others_in_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(private_query, "_parts", kernels_by_place(private_query._parts))
    assert not charges_are_ones_own(tmp_path)


# --- the ledger: never more than was planned, never free


def ledger_holds(folder: Path, plan: Any, mechanism: str) -> bool:
    """Every new question is one more on the ledger, and none is answered after the last; the same one is free."""
    private, reservation = collection(folder, [X, Y]), reserved(folder, plan)
    for i in range(plan.queries):
        first = ask(private, plan, reservation, i)
        again = ask(ProtectedVectors(private.folder, D), plan, reservation, i)
        if reservation.begun(mechanism) != i + 1 or (first != again).any():
            return False
    with contextlib.suppress(LedgerError):
        ask(private, plan, reservation, "one more")
        return False
    return True


LEDGERS = {"top-k": (TOPK, "nearest_mean"), "ball": (BALL, "ball_sum"), "budgets": (BUDGETS, BALL_QUERY)}


@pytest.mark.parametrize("kind", LEDGERS)
def test_the_ledger(tmp_path, kind):
    assert ledger_holds(tmp_path, *LEDGERS[kind])


@pytest.mark.parametrize("kind", LEDGERS)
def test_begin_skipped(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(Reservation, "begin", lambda self, *_, **__: None)
    assert not ledger_holds(tmp_path, *LEDGERS[kind])


@pytest.mark.parametrize("kind", ["top-k", "ball"])  # the number of questions of budgets is checked twice
def test_errors_of_the_ledger_swallowed(tmp_path, kind, monkeypatch):
    real = Reservation.begin

    def careless(self: Reservation, mechanism: str, event: Any) -> None:
        with contextlib.suppress(LedgerError):
            real(self, mechanism, event)

    monkeypatch.setattr(Reservation, "begin", careless)
    assert not ledger_holds(tmp_path, *LEDGERS[kind])


@pytest.mark.parametrize("kind", LEDGERS)
def test_answers_not_kept(tmp_path, kind, monkeypatch):
    """Fresh noise for the same question is another look."""
    monkeypatch.setattr(QueryState, "_keep", lambda *_: None)
    assert not ledger_holds(tmp_path, *LEDGERS[kind])


def rollback_is_noticed(folder: Path) -> bool:
    private, reservation = collection(folder, [X, Y]), reserved(folder, BUDGETS)
    ask(private, BUDGETS, reservation)
    old = (private.folder / "state.db").read_bytes()
    ask(private, BUDGETS, reservation)
    (private.folder / "state.db").write_bytes(old)
    with contextlib.suppress(LedgerError):
        ask(ProtectedVectors(private.folder, D), BUDGETS, reservation)
        return False
    return True


def test_an_older_state_put_back(tmp_path, monkeypatch):
    assert rollback_is_noticed(tmp_path)
    monkeypatch.setattr(
        QueryState, "get_in_step",
        lambda self, paid, query: (paid.begun(query.mechanism), paid.mark(query.mechanism)),
    )  # fmt: skip
    assert not rollback_is_noticed(tmp_path)
