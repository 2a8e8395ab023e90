"""Codebook sums: by brute force, one unit moves them by its part, noise as stated, once for each reservation."""

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
from sfumato.privacy import codebook_sums as module
from sfumato.privacy.budget import Budget
from sfumato.privacy.codebook_sums import CODEBOOK, CodebookPlan, codebook_sums
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import FINE
from sfumato.privacy.protected_vectors import ProtectedVectors

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


def collection(folder: Path, vectors: np.ndarray, units: Any = None) -> ProtectedVectors:
    private = ProtectedVectors.create(folder / f"index{next(fresh)}", D)
    if len(vectors):
        names = [str(i) for i in range(len(vectors))]
        private.add(vectors, names, names if units is None else [str(unit) for unit in units])
    return private


def plan(count: int = 4, **changes: Any) -> CodebookPlan:
    chosen: Any = {
        "centers": unit_vectors(count, 7) * np.linspace(0.9, 0.2, count)[:, None],
        "noise_multiplier": 2.0,
        "radius": 0.6,
    }
    return CodebookPlan(**(chosen | changes))


def total(private: ProtectedVectors, chosen: CodebookPlan) -> tuple[np.ndarray, float]:
    """The sums before the noise, and its scale, seen where it would be added."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "discrete_gaussian", lambda *given: (seen.append(given), given[0])[1])
        codebook_sums(private, chosen, Recorder())  # type: ignore[arg-type]
    ((sums, scale),) = seen
    return sums, scale


def norm(steps: np.ndarray) -> float:
    return math.sqrt(sum(int(step) ** 2 for step in np.ravel(steps)))


@pytest.mark.parametrize("columns", [None, 2])
def test_the_sums_by_hand(tmp_path, columns):
    basis = None if columns is None else np.linalg.qr(np.random.default_rng(3).normal(size=(D, columns)))[0]
    vectors, units = unit_vectors(30), [i // 3 for i in range(27)] + [27, 28, 29]
    chosen = plan(basis=basis, count_weight=0.7)
    wanted = np.zeros((4, (columns or D) + 1))
    for vector, unit in zip(vectors.astype(np.float64), units, strict=True):
        nearest = np.square(chosen.centers - vector).sum(1).argmin()
        residual = vector - chosen.centers[nearest]
        residual = residual if basis is None else residual @ basis
        part = np.append(residual / max(0.6, np.linalg.norm(residual)), 0.7) / math.hypot(1, 0.7)
        wanted[nearest] += part / units.count(unit)
    private = collection(tmp_path, vectors, units)
    found, scale = total(private, chosen)
    assert found / FINE == pytest.approx(wanted, abs=2e-5) and scale == 2.0 * FINE
    quiet = codebook_sums(private, replace(chosen, noise_multiplier=1e-9), Recorder())  # type: ignore[arg-type]
    stretch = math.hypot(1, 0.7)
    assert quiet[:, :-1] == pytest.approx(wanted[:, :-1] * stretch * 0.6, abs=2e-5)
    assert quiet[:, -1] == pytest.approx(wanted[:, -1] * stretch / 0.7, abs=4e-5)


def test_blocks_make_no_difference(tmp_path, monkeypatch):
    private = collection(tmp_path, unit_vectors(40), [i % 7 for i in range(40)])
    whole = total(private, plan())[0].tolist()
    for rows in (1, 3, 39):
        monkeypatch.setattr(module, "_ROWS", rows)
        assert total(private, plan())[0].tolist() == whole


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=25), st.integers(0, 99), st.integers(0, 2),
    st.floats(-4, 4), st.floats(-3, 3), st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_one_unit_moves_the_sums_by_its_own_part_and_no_other(
    tmp_path_factory, units, seed, twins, radius, weight, columns
):
    folder = tmp_path_factory.mktemp("x")
    vectors = unit_vectors(len(units), seed)
    vectors[: twins * 3] = vectors[0]
    basis = (
        None if columns is None else np.linalg.qr(np.random.default_rng(seed).normal(size=(D, columns)))[0]
    )
    centers = np.concatenate([vectors[:2].astype(np.float64), plan().centers, plan().centers[:1]])
    chosen = plan(centers=centers, radius=10**radius, count_weight=10**weight, basis=basis)
    gone = np.array(units) == units[0]
    whole, less, alone = (
        total(collection(folder, vectors[some], np.array(units)[some]), chosen)[0]
        for some in (np.ones(len(units), bool), ~gone, gone)
    )
    assert (whole - less).tolist() == alone.tolist() and norm(alone) <= FINE


def test_shares_are_rounded_towards_zero(tmp_path):
    """Of an owner of many vectors at full length, a hair each way would add up beyond the bound."""
    for seed in range(4):
        vectors = np.repeat(unit_vectors(1, seed), 1500, 0)
        moved, _ = total(collection(tmp_path, vectors, [0] * 1500), plan(radius=1e-3))
        assert 0.99 * FINE < norm(moved) <= FINE


def test_deleting_a_unit_is_never_having_had_it(tmp_path):
    vectors, units = unit_vectors(20), [i % 4 for i in range(20)]
    private, chosen = collection(tmp_path, vectors, units), plan()
    private.delete([str(i) for i in range(20) if i % 4 == 2])
    some = np.array(units) != 2
    assert total(private, chosen)[0].tolist() == total(
        collection(tmp_path, vectors[some], np.array(units)[some]), chosen
    )[0].tolist()  # fmt: skip


def test_noise_is_as_stated_also_where_there_is_nothing(tmp_path):
    chosen = plan(300, centers=np.random.default_rng(0).normal(size=(300, D)), count_weight=0.3)
    assert chosen.residual_noise == pytest.approx(2 * 0.6 * math.hypot(1, 0.3))
    assert chosen.count_noise == pytest.approx(2 * math.hypot(1, 0.3) / 0.3)
    drawn = codebook_sums(collection(tmp_path, unit_vectors(0)), chosen, Recorder())  # type: ignore[arg-type]
    assert drawn.shape == (300, D + 1)
    for values, noise in ((drawn[:, :-1], chosen.residual_noise), (drawn[:, -1], chosen.count_noise)):
        squares = np.square(values).sum() / noise**2
        assert chi2.ppf(ALARM, values.size) < squares < chi2.isf(ALARM, values.size)
        assert abs(values.mean()) < 6 * noise / math.sqrt(values.size)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(D + 1)).max() < 6 / math.sqrt(300)


# --- charging


def reserved(folder: Path, chosen: CodebookPlan, name: str = "one") -> Any:
    ledger = Ledger.open(folder / "ledger.db", total=Budget(100, 1e-3))
    return ledger.reserve("codebook", chosen.planned(), delta=1e-5, key=name)


def test_a_reservation_buys_one_release(tmp_path):
    private, chosen = collection(tmp_path, unit_vectors(9)), plan()
    reservation = reserved(tmp_path, chosen)
    first = codebook_sums(private, chosen, reservation)
    assert codebook_sums(private, chosen, reservation).tolist() == first.tolist()
    again = ProtectedVectors(private.folder, D)
    assert codebook_sums(again, chosen, reservation).tolist() == first.tolist()
    assert reservation.begun(CODEBOOK) == 1
    assert reservation.charged()[0][1] == GaussianDpEvent(2.0)
    other = codebook_sums(private, chosen, reserved(tmp_path, chosen, "two"))
    assert (other != first).any()
    private.delete(["0"])  # forgets what was kept
    with pytest.raises(LedgerError, match="1 of 1"):
        codebook_sums(private, chosen, reservation)


def test_nothing_is_drawn_or_kept_before_it_is_on_the_ledger(tmp_path, monkeypatch):
    private, chosen = collection(tmp_path, unit_vectors(9)), plan()
    reservation, draws = reserved(tmp_path, chosen), []
    real = module.discrete_gaussian
    monkeypatch.setattr(module, "discrete_gaussian", lambda *given: (draws.append(given), real(*given))[1])
    with pytest.raises(LedgerError, match="not what was reserved"):
        codebook_sums(private, replace(chosen, noise_multiplier=1.9), reservation)
    assert not draws and private._state.answer(f"{CODEBOOK}:{reservation.id}") is None
    codebook_sums(private, chosen, reservation)
    assert len(draws) == 1


def test_killed_after_the_charge_nothing_is_refunded(tmp_path, monkeypatch):
    private, chosen = collection(tmp_path, unit_vectors(9)), plan()
    reservation = reserved(tmp_path, chosen)

    def die(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "discrete_gaussian", die)
        with pytest.raises(KeyboardInterrupt):
            codebook_sums(private, chosen, reservation)
    with pytest.raises(LedgerError, match="1 of 1"):
        codebook_sums(private, chosen, reservation)


@pytest.mark.parametrize("change", ["noise_multiplier", "radius", "count_weight"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_plans_without_meaning_are_refused(change, value):
    with pytest.raises(InputError, match="no budget was spent"):
        plan(**{change: value})
