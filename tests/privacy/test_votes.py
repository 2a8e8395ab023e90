"""Nearest-neighbour votes: against brute force, sensitivity, exactness, order of work, refusals."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from sfumato.errors import InputError, LedgerError
from sfumato.privacy import votes as module
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.randomness import LATTICE
from sfumato.privacy.votes import (
    MECHANISM,
    VoteCounter,
    nearest_neighbour_histogram,
    nearest_neighbour_histogram_event,
)

NO_NOISE = 1e-9
"""So little noise that the exact sum comes out (for tests of the sum only)."""


def protected(labels: Any, units: Any = None, *, names: int = 3, seed: int = 0, images: Any = None) -> Any:
    labels = np.asarray(labels, dtype=np.int64)
    if images is None:
        images = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 3, 1), dtype=np.uint8)
    units = [np.array([row]) for row in range(len(labels))] if units is None else [np.array(u) for u in units]
    return SimpleNamespace(
        _images=images, _labels=labels, _units=units, label_names=tuple(f"label {i}" for i in range(names))
    )


def pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        self.calls.append((mechanism, event))


class Refusing(Recorder):
    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        raise LedgerError("not reserved")


def exact(private: Any, features: Any, labels: Any, embed: Any = pixels, batch_size: int = 64) -> np.ndarray:
    reservation: Any = Recorder()
    features, labels = np.asarray(features, dtype=float), np.asarray(labels)
    return nearest_neighbour_histogram(
        private, features, labels, embed, NO_NOISE, reservation, batch_size=batch_size
    )[0]


def brute_force(private: Any, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """One unit at a time, in whole-number arithmetic of any size."""
    out = np.zeros(len(features), dtype=int)
    for unit in private._units:
        x = private._images[unit[0]].ravel().tolist()
        best = None
        for m, (c, label) in enumerate(zip(features.tolist(), labels.tolist(), strict=True)):
            if label != private._labels[unit[0]]:
                continue
            distance = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(x, c, strict=True))
            if best is None or distance < best[0]:
                best = distance, m
        if best is not None:
            out[best[1]] += 1
    return out


CASES = st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(0, 10**6))


def case(units: int, candidates: int, seed: int) -> tuple[Any, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    private = protected(draw.integers(0, 3, units), seed=seed)
    return private, draw.integers(0, 256, (candidates, 9)).astype(float), draw.integers(0, 3, candidates)


@settings(max_examples=50, deadline=None)
@given(CASES)
def test_the_exact_votes_are_those_of_brute_force(drawn):
    private, features, labels = case(*drawn)
    assert exact(private, features, labels).tolist() == brute_force(private, features, labels).tolist()


def test_many_units_and_candidates_against_plain_numpy(monkeypatch):
    monkeypatch.setattr(module, "_CELLS_AT_ONCE", 3000)  # several blocks of voters
    draw = np.random.default_rng(1)
    private = protected(draw.integers(0, 3, 400), images=draw.integers(0, 256, (400, 3, 3, 1), np.uint8))
    features, labels = draw.normal(120, 70, (90, 9)), draw.integers(0, 3, 90)
    distance = ((private._images.reshape(400, 1, 9) - features) ** 2).sum(2)
    distance[private._labels[:, None] != labels] = np.inf
    wanted = np.bincount(distance.argmin(1), minlength=90)
    assert exact(private, features, labels).tolist() == wanted.tolist()


@settings(max_examples=50, deadline=None)
@given(CASES, st.data())
def test_one_unit_changes_one_cell_by_one(drawn, data):
    """Sensitivity, whichever unit goes; a unit whose label has no candidate changes nothing."""
    private, features, labels = case(*drawn)
    if not private._units:
        return
    gone = data.draw(st.integers(0, len(private._units) - 1))
    less = protected(
        np.delete(private._labels, gone), images=np.delete(private._images, gone, axis=0), names=3
    )
    change = exact(private, features, labels) - exact(less, features, labels)
    voted = int(private._labels[gone] in labels)
    assert sorted(change.tolist()) == [0] * (len(features) - voted) + [1] * voted
    if voted:
        assert labels[change.argmax()] == private._labels[gone]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_a_unit_of_several_images_votes_once(size, seed):
    draw = np.random.default_rng(seed)
    private = protected(draw.integers(0, 3, 2 * size), units=[range(size), range(size, 2 * size)], seed=seed)
    features = pixels(private._images)
    total = exact(private, features, private._labels)
    assert total.sum() == 2 and total[:size].sum() == 1


def test_every_image_of_a_unit_votes_equally_often():
    private = protected([0, 1, 1], units=[[0, 1, 2]])
    features = pixels(private._images)
    seen = sum(exact(private, features, [0, 1, 1]) for _ in range(200))
    assert np.abs(seen / 200 - 1 / 3).max() < 6 * np.sqrt(2 / 9 / 200)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batch_size_is_a_speed_knob(batch_size):
    private, features, labels = case(20, 9, 5)
    assert (exact(private, features, labels, batch_size=batch_size) == exact(private, features, labels)).all()


def test_an_embedding_never_meets_another_shape_or_company():
    """Batches are padded with zeros to one size, so a network cannot tell how many units there are."""
    shapes: set[tuple[int, ...]] = set()

    def embed(images: np.ndarray) -> np.ndarray:
        shapes.add(images.shape)
        return pixels(images)

    exact(protected([0, 1, 2, 0, 1]), np.zeros((1, 9)), [0], embed, batch_size=4)
    assert shapes == {(4, 3, 3, 1)}


def test_rounding_that_depends_on_the_place_makes_images_go_one_by_one():
    sizes: list[int] = []

    def embed(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return pixels(images) * (1 + np.arange(len(images)) * 1e-7)[:, None]

    private, features, labels = case(10, 4, 2)
    got = exact(private, features, labels, embed, batch_size=8)
    assert sizes[-10:] == [1] * 10
    assert got.tolist() == exact(private, features, labels).tolist()


def test_near_ties_do_not_depend_on_the_place_in_a_block():
    """Equal units must vote alike, however a matrix product rounds at the edges of its tiles."""
    draw = np.random.default_rng(0)
    one = draw.integers(0, 256, (1, 9, 9, 3), dtype=np.uint8)
    near = pixels(one)[0] + draw.normal(0, 1e-6, (50, 243))
    for units in (1, 2, 3, 5, 17, 64, 65):
        private = protected([0] * units, images=np.repeat(one, units, axis=0))
        assert sorted(exact(private, near, [0] * 50))[-1] == units


def test_ties_go_to_the_first_candidate():
    private = protected([1, 1], images=np.zeros((2, 3, 3, 1), dtype=np.uint8))
    assert exact(private, np.ones((4, 9)), [0, 1, 1, 1]).tolist() == [0, 2, 0, 0]


def test_far_away_candidates_and_features_without_spread():
    private = protected([0, 0], images=np.full((2, 3, 3, 1), 200, dtype=np.uint8))
    assert exact(private, np.zeros((1, 9)), [0]).tolist() == [2]
    assert exact(private, [[1e30] * 9, [-1e30] * 9], [0, 0]).sum() == 2
    assert exact(private, np.stack([np.zeros(9), np.full(9, 1e-20)]), [0, 0]).tolist() == [0, 2]
    assert exact(private, np.stack([np.zeros(9), np.full(9, 1e-310)]), [0, 0]).sum() == 2
    huge = exact(private, [[1.0] * 9, [0.0] * 9], [0, 0], lambda x: pixels(x) * 1e30)
    assert huge.tolist() == [2, 0]


def test_no_units_at_all_still_gets_noise():
    private = protected([], images=np.zeros((0, 3, 3, 1), dtype=np.uint8))
    recorder: Any = Recorder()
    value, _ = nearest_neighbour_histogram(
        private, np.zeros((50, 9)), np.zeros(50, int), pixels, 30.0, recorder
    )
    assert np.any(value != 0) and value.dtype == np.int64 and len(recorder.calls) == 1


# --- the order of work


def test_begins_its_event_before_the_noise_and_returns_it(monkeypatch):
    order: list[str] = []
    real = module.discrete_gaussian

    def noise(values: Any, scale: float) -> Any:
        order.append(f"noise {scale}")
        return real(values, scale)

    monkeypatch.setattr(module, "discrete_gaussian", noise)

    class Ordered(Recorder):
        def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
            super().begin(mechanism, event, units)
            order.append("begin")

    recorder: Any = Ordered()
    counter = VoteCounter(protected([0, 1]), pixels, 2.0)
    assert order == []
    for _ in range(2):
        value, event = counter.votes(np.zeros((5, 9)), np.zeros(5, int), recorder)
        assert value.shape == (5,) and value.dtype == np.int64
        assert event == GaussianDpEvent(2.0) == nearest_neighbour_histogram_event(2.0)
    assert order == ["begin", "noise 2.0"] * 2
    assert recorder.calls == [(MECHANISM, GaussianDpEvent(2.0))] * 2
    order.clear()
    refusing: Any = Refusing()
    with pytest.raises(LedgerError):
        counter.votes(np.zeros((5, 9)), np.zeros(5, int), refusing)
    assert order == []


def test_against_a_real_ledger_each_call_is_one_unit_of_work(tmp_path):
    ledger = Ledger.open(tmp_path / "x.db", total=Budget(8, 1e-5))
    plan = PlannedEvent(MECHANISM, "votes", nearest_neighbour_histogram_event(5.0), count=3)
    reservation = ledger.reserve("votes", [plan], delta=1e-6)
    asked = np.zeros((4, 9)), np.zeros(4, int)
    with pytest.raises(LedgerError, match="not what was reserved"):
        nearest_neighbour_histogram(protected([0]), *asked, pixels, 4.0, reservation)
    assert reservation.begun(MECHANISM) == 0
    counter = VoteCounter(protected([0]), pixels, 5.0)
    for done in (1, 2, 3):
        counter.votes(*asked, reservation)
        assert reservation.begun(MECHANISM) == done
    with pytest.raises(LedgerError, match="3 of 3"):
        counter.votes(*asked, reservation)
    assert reservation.epsilon == pytest.approx(epsilon_of([GaussianDpEvent(5 / np.sqrt(3))], 1e-6), rel=1e-3)


@pytest.mark.parametrize("iterations, noise", [(1, 3.0), (5, 4.0), (10, 8.0)])
def test_what_all_votes_cost_against_the_closed_form(iterations, noise):
    """T votes are one Gaussian of multiplier sigma / sqrt(T); Balle and Wang 2018 give its delta in closed form."""
    mu = np.sqrt(iterations) / noise

    def delta_at(epsilon: float) -> float:
        return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    wanted = brentq(lambda epsilon: delta_at(epsilon) - 1e-5, 0, 50)
    plan = PlannedEvent(MECHANISM, "votes", nearest_neighbour_histogram_event(noise), count=iterations)
    assert wanted <= epsilon_of([plan.total], 1e-5) <= wanted * 1.01


def test_the_discrete_noise_costs_what_is_stated():
    grid = 2e-5
    discrete = privacy_loss_distribution.from_discrete_gaussian_mechanism(
        4.0 * LATTICE, sensitivity=LATTICE, value_discretization_interval=grid
    ).self_compose(5)
    stated = epsilon_of([GaussianDpEvent(4.0)] * 5, 1e-5)
    assert discrete.get_epsilon_for_delta(1e-5) == pytest.approx(stated, abs=6 * grid + 1e-4)


def test_noise_has_the_stated_size():
    recorder: Any = Recorder()
    value, _ = nearest_neighbour_histogram(
        protected([0]), np.zeros((4000, 9)), np.ones(4000, int), pixels, 6.0, recorder
    )
    assert abs(value.std() / 6 - 1) < 7 / np.sqrt(2 * 4000) and abs(value.mean()) < 7 * 6 / np.sqrt(4000)


# --- nothing leaves, nothing is spent on what cannot work


def test_a_counter_gives_nothing_away():
    counter: Any = VoteCounter(protected([0, 1]), pixels, 2.0)
    assert repr(counter) == "VoteCounter(noise_multiplier=2)" and counter
    for reach in (
        len, iter, copy.copy, copy.deepcopy, pickle.dumps, np.asarray, lambda c: c[0], lambda c: 1 in c,
    ):  # fmt: skip
        with pytest.raises(TypeError, match="no access"):
            reach(counter)
    assert all(name.startswith("_") for name in vars(counter))


def test_what_a_counter_holds_is_under_names_that_other_rooms_may_not_touch():
    """tests/data/test_handle_discipline.py looks for exactly these; here: they are what holds the features."""
    counter = VoteCounter(protected([0, 1, 1]), pixels, 2.0)
    arrays = {name for name, value in vars(counter).items() if isinstance(value, np.ndarray)}
    assert arrays == {"_units", "_labels"}
    discipline = (Path(__file__).parents[1] / "data" / "test_handle_discipline.py").read_text("utf-8")
    assert 'HANDLE = {"_images", "_labels", "_units"}' in discipline


def test_the_bar_does_not_tell_how_many_units_there_are(capsys):
    for units in (3, 11):
        VoteCounter(protected([0] * units), pixels, 2.0, batch_size=2)
        assert capsys.readouterr().err.splitlines()[-1].startswith("embed private images: 100/100 % in")


def running_mean(images: np.ndarray) -> np.ndarray:
    features = pixels(images)
    return features - features.mean(0)


@pytest.mark.parametrize(
    "embed",
    [
        lambda images: pixels(images)[:-1],
        lambda images: pixels(images)[:, :, None],
        lambda images: pixels(images)[:, :0],
        lambda images: np.where(pixels(images) == 255, np.nan, pixels(images)),
        lambda images: np.where(pixels(images) == 255, np.inf, pixels(images)),
        lambda images: pixels(images) + np.random.default_rng().normal(0, 50, (len(images), 9)),
        running_mean,
    ],
    ids=["too few", "3-d", "empty", "nan", "inf", "random", "batch statistics"],
)
def test_an_embedding_that_makes_no_sense(embed):
    images = np.full((2, 3, 3, 1), 255, dtype=np.uint8)
    recorder: Any = Recorder()
    with pytest.raises(InputError, match="no budget was spent"):
        nearest_neighbour_histogram(
            protected([0, 1], images=images), np.zeros((2, 9)), np.zeros(2, int), embed, 2.0, recorder
        )
    assert recorder.calls == []


def test_nan_for_a_private_image_only():
    private = protected([0], images=np.zeros((1, 3, 3, 1), dtype=np.uint8))
    with pytest.raises(InputError, match="no budget was spent"):
        VoteCounter(
            private, lambda x: np.where(pixels(x[:, :]).sum(1, keepdims=True) == 0, np.nan, pixels(x)), 1
        )


@pytest.mark.parametrize(
    "features, labels",
    [
        (np.zeros((0, 9)), np.zeros(0, int)),
        (np.zeros((2, 8)), np.zeros(2, int)),
        (np.zeros(9), np.zeros(1, int)),
        (np.full((2, 9), np.nan), np.zeros(2, int)),
        (np.full((2, 9), np.inf), np.zeros(2, int)),
        (np.zeros((2, 9)), np.zeros(3, int)),
        (np.zeros((2, 9)), np.zeros(2)),
        (np.zeros((2, 9)), np.array([0, -1])),
        (np.zeros((2, 9)), np.array([0, 3])),
    ],
)
def test_candidates_that_make_no_sense(features, labels):
    recorder: Any = Recorder()
    with pytest.raises(InputError, match="no budget was spent"):
        nearest_neighbour_histogram(protected([0, 1]), features, labels, pixels, 2.0, recorder)
    assert recorder.calls == []


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_noise_without_meaning(value):
    with pytest.raises(InputError, match="no budget was spent"):
        VoteCounter(protected([0, 1]), pixels, value)


def test_batch_size_without_meaning():
    with pytest.raises(InputError, match="no budget was spent"):
        VoteCounter(protected([0, 1]), pixels, 1.0, batch_size=0)
