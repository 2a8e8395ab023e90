"""Vector moments: by brute force, one unit moves them by its part, noise as stated, once for each reservation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from sfumato.errors import InputError, LedgerError
from sfumato.privacy import vector_moments as module
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import FINE
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.privacy.vector_moments import VECTOR_MOMENTS, MomentsPlan, vector_moments

ALARM = 1e-7
D = 5
fresh = itertools.count()


class Recorder:
    """A reservation that allows everything and remembers what began."""

    def __init__(self) -> None:
        self.id, self.calls = f"fake{next(fresh)}", []

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        self.calls.append((mechanism, event))


def unit_vectors(n: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(n, D))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def directions(columns: int, seed: int = 3) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(D, columns)))[0]


def collection(folder: Path, vectors: np.ndarray, units: Any = None) -> ProtectedVectors:
    private = ProtectedVectors.create(folder / f"index{next(fresh)}", D)
    if len(vectors):
        names = [str(i) for i in range(len(vectors))]
        private.add(vectors, names, names if units is None else [str(unit) for unit in units])
    return private


def plan(**changes: Any) -> MomentsPlan:
    chosen: Any = {
        "center": unit_vectors(1, 7)[0] * 0.4, "noise_multiplier": 2.0, "radius": 0.9, "basis": directions(3)
    }  # fmt: skip
    return MomentsPlan(**(chosen | changes))


def total(private: ProtectedVectors, chosen: MomentsPlan) -> tuple[np.ndarray, float]:
    """The sums before the noise, and its scale, seen where it would be added."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "discrete_gaussian", lambda *given: (seen.append(given), given[0])[1])
        vector_moments(private, chosen, Recorder())  # type: ignore[arg-type]
    ((sums, scale),) = seen
    return sums, scale


def norm(steps: np.ndarray) -> float:
    return math.sqrt(sum(int(step) ** 2 for step in np.ravel(steps)))


@pytest.mark.parametrize("columns", [1, 3, D])
def test_the_sums_by_hand(tmp_path, columns):
    vectors, units = unit_vectors(30), [i // 3 for i in range(27)] + [27, 28, 29]
    chosen = plan(basis=directions(columns))
    upper, lattice = np.triu_indices(columns), np.zeros(D + 1 + columns * (columns + 1) // 2)
    mean, squares, clipped = np.zeros(D), np.zeros((columns, columns)), 0
    for vector, unit in zip(vectors.astype(np.float64), units, strict=True):
        residual = vector - chosen.center
        clipped += np.linalg.norm(residual) > 0.9
        residual *= 0.9 / max(0.9, np.linalg.norm(residual))
        along = residual @ chosen.basis
        product = np.outer(along, along) / 0.9**2
        product[np.triu_indices(columns, 1)] *= math.sqrt(2)
        lattice += np.concatenate([residual / 0.9, [0.5], product[upper]]) / 1.5 / units.count(unit)
        mean, squares = (
            mean + residual / units.count(unit),
            squares + np.outer(along, along) / units.count(unit),
        )
    assert 3 < clipped < 27
    private = collection(tmp_path, vectors, units)
    found, scale = total(private, chosen)
    assert found / FINE == pytest.approx(lattice, abs=6e-5) and scale == 2.0 * FINE
    quiet = vector_moments(private, replace(chosen, noise_multiplier=1e-9), Recorder())  # type: ignore[arg-type]
    assert quiet.count == pytest.approx(12, abs=2e-4)
    assert quiet.residuals == pytest.approx(mean, abs=1e-4)
    assert quiet.squares == pytest.approx(squares, abs=1e-4)
    assert (quiet.squares == quiet.squares.T).all()


def test_blocks_make_no_difference(tmp_path, monkeypatch):
    private = collection(tmp_path, unit_vectors(40), [i % 7 for i in range(40)])
    whole = total(private, plan())[0].tolist()
    for rows in (1, 3, 39):
        monkeypatch.setattr(module, "_ROWS", rows)
        assert total(private, plan())[0].tolist() == whole


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=25), st.integers(0, 99), st.integers(0, 2),
    st.floats(-4, 3), st.integers(1, D), st.booleans(),
)  # fmt: skip
def test_one_unit_moves_the_sums_by_its_own_part_and_no_other(
    tmp_path_factory, units, seed, twins, radius, columns, centered
):
    folder = tmp_path_factory.mktemp("x")
    vectors = unit_vectors(len(units), seed)
    vectors[: twins * 3] = vectors[0]
    basis = directions(columns, seed) + 1e-6 * np.random.default_rng(seed).normal(size=(D, columns))
    center = vectors[-1].astype(np.float64) if centered else plan().center
    chosen = plan(radius=10**radius, basis=basis, center=center)
    gone = np.array(units) == units[0]
    whole, less, alone = (
        total(collection(folder, vectors[some], np.array(units)[some]), chosen)[0]
        for some in (np.ones(len(units), bool), ~gone, gone)
    )
    assert (whole - less).tolist() == alone.tolist() and norm(alone) <= FINE


@pytest.mark.parametrize("longer", [-4e-6, 0, 4e-6])
def test_nothing_of_the_bound_is_wasted(tmp_path, longer):
    """Where the residual is as long as R or longer and lies in the basis, which may be a hair too long."""
    for seed in range(4):
        basis = directions(D, seed) * (1 + longer)
        for chosen in (plan(radius=0.4, basis=basis), plan(radius=1.0, center=np.zeros(D), basis=basis)):
            moved, _ = total(collection(tmp_path, unit_vectors(1, seed)), chosen)
            assert (1 - 2e-5) * FINE < norm(moved) <= FINE


def test_shares_are_rounded_towards_zero(tmp_path):
    """Of an owner of many vectors at full length, a hair each way would add up beyond the bound."""
    for seed in range(4):
        vectors = np.repeat(unit_vectors(1, seed), 1500, 0)
        moved, _ = total(collection(tmp_path, vectors, [0] * 1500), plan(radius=1e-3, basis=directions(D)))
        assert 0.99 * FINE < norm(moved) <= FINE


def test_deleting_a_unit_is_never_having_had_it(tmp_path):
    vectors, units = unit_vectors(20), [i % 4 for i in range(20)]
    private, chosen = collection(tmp_path, vectors, units), plan()
    ProtectedVectors(private.folder, D).delete([str(i) for i in range(20) if i % 4 == 2])  # elsewhere
    some = np.array(units) != 2
    assert total(private, chosen)[0].tolist() == total(
        collection(tmp_path, vectors[some], np.array(units)[some]), chosen
    )[0].tolist()  # fmt: skip


def test_noise_is_as_stated_also_where_there_is_nothing(tmp_path):
    private, chosen = collection(tmp_path, unit_vectors(0)), plan()
    assert chosen.mean_noise == pytest.approx(2 * 0.9 * 1.5)
    assert chosen.count_noise == pytest.approx(2 * 3)
    assert chosen.square_noise == pytest.approx(2 * 0.81 * 1.5)
    drawn = [vector_moments(private, chosen, Recorder()) for _ in range(150)]  # type: ignore[arg-type]
    assert all((moments.squares == moments.squares.T).all() for moments in drawn)
    squares = np.array([moments.squares for moments in drawn])
    columns = [
        (np.array([moments.residuals for moments in drawn]), chosen.mean_noise),
        (np.array([[moments.count] for moments in drawn]), chosen.count_noise),
        (squares[:, range(3), range(3)], chosen.square_noise),
        (squares[:, [0, 0, 1], [1, 2, 2]], chosen.square_noise / math.sqrt(2)),
    ]
    for values, noise in columns:
        stretched = np.square(values).sum() / noise**2
        assert chi2.ppf(ALARM, values.size) < stretched < chi2.isf(ALARM, values.size)
        assert abs(values.mean()) < 6 * noise / math.sqrt(values.size)
    everything = np.concatenate([values for values, _ in columns], 1)
    assert np.abs(np.corrcoef(everything.T) - np.eye(D + 7)).max() < 6 / math.sqrt(150)


# --- charging


def reserved(folder: Path, chosen: MomentsPlan, name: str = "one") -> Any:
    ledger = Ledger.open(folder / "ledger.db", total=Budget(100, 1e-3))
    return ledger.reserve("moments", chosen.planned(), delta=1e-5, key=name)


def numbers(*asked: Any) -> list[float]:
    moments = vector_moments(*asked)
    return [moments.count, *moments.residuals.tolist(), *moments.squares.ravel().tolist()]


def test_a_reservation_buys_one_release(tmp_path):
    private, chosen = collection(tmp_path, unit_vectors(9)), plan()
    reservation = reserved(tmp_path, chosen)
    first = numbers(private, chosen, reservation)
    assert numbers(private, chosen, reservation) == first
    again = ProtectedVectors(private.folder, D)
    assert numbers(again, chosen, reservation) == first
    assert reservation.begun(VECTOR_MOMENTS) == 1
    assert reservation.charged()[0][1] == GaussianDpEvent(2.0)
    assert numbers(private, chosen, reserved(tmp_path, chosen, "two")) != first
    private.delete(["0"])  # forgets what was kept
    with pytest.raises(LedgerError, match="1 of 1"):
        vector_moments(private, chosen, reservation)


def test_nothing_is_drawn_or_kept_before_it_is_on_the_ledger(tmp_path, monkeypatch):
    private, chosen = collection(tmp_path, unit_vectors(9)), plan()
    reservation, draws = reserved(tmp_path, chosen), []
    real = module.discrete_gaussian
    monkeypatch.setattr(module, "discrete_gaussian", lambda *given: (draws.append(given), real(*given))[1])
    with pytest.raises(LedgerError, match="not what was reserved"):
        vector_moments(private, replace(chosen, noise_multiplier=1.9), reservation)
    assert not draws and private._state.answer(f"{VECTOR_MOMENTS}:{reservation.id}") is None
    vector_moments(private, chosen, reservation)
    assert len(draws) == 1


def test_killed_after_the_charge_nothing_is_refunded(tmp_path, monkeypatch):
    private, chosen = collection(tmp_path, unit_vectors(9)), plan()
    reservation = reserved(tmp_path, chosen)

    def die(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "discrete_gaussian", die)
        with pytest.raises(KeyboardInterrupt):
            vector_moments(private, chosen, reservation)
    with pytest.raises(LedgerError, match="1 of 1"):
        vector_moments(private, chosen, reservation)


@pytest.mark.parametrize("change", ["noise_multiplier", "radius"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_plans_without_meaning_are_refused(change, value):
    with pytest.raises(InputError, match="no budget was spent"):
        plan(**{change: value})


@pytest.mark.parametrize("basis", [
    1.001 * directions(3), directions(3)[:, [0, 1, 1]], directions(3) * math.nan, np.zeros((D, 0)), np.ones(D) / D,
    np.eye(D)[:, [0, 1, 2, 3, 4, 4]], np.eye(D + 1)[:, :3], np.eye(D - 1)[:, :3],
])  # fmt: skip
def test_a_basis_that_is_none_is_refused(basis):
    with pytest.raises(InputError, match="no budget was spent"):
        plan(basis=basis)


@pytest.mark.parametrize(
    "center", [np.full(D, math.nan), np.full(D, math.inf), np.zeros((D, 1)), np.zeros(1)]
)
def test_a_center_that_is_none_is_refused(center):
    """One of shape [D, 1] would be spread over D vectors by their place."""
    with pytest.raises(InputError, match="no budget was spent"):
        plan(center=center)
