"""The nearest-neighbour votes keep every rule, and each planted bug in them is caught.

Each check passes on the real code and fails on the bugs below it. The attack is that of
test_planted_mechanisms: a lower bound on epsilon from telling two neighbouring data sets apart.
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from scipy.stats import beta

from sfumato.errors import InputError, LedgerError
from sfumato.privacy import votes as module
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent, same_event
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.votes import MECHANISM, VoteCounter, nearest_neighbour_histogram_event

ALARM, DELTA, RUNS, NOISE = 1e-7, 1e-5, 1200, 2.0
CANDIDATES = np.array([[0.0] * 4, [255.0] * 4, [100.0] * 4])
LABELS = np.zeros(3, dtype=np.int64)


def protected(values: list[int], units: Any = None) -> Any:
    images = np.repeat(np.array(values, dtype=np.uint8), 4).reshape(-1, 2, 2, 1)
    units = [np.array([row]) for row in range(len(values))] if units is None else [np.array(u) for u in units]
    labels = np.zeros(len(values), dtype=np.int64)
    return SimpleNamespace(_images=images, _labels=labels, _units=units, label_names=("a", "b"))


class Allowing:
    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        pass


ALLOWING: Any = Allowing()


def embed(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


def ask(private: Any, *, noise: float = NOISE, embedding: Any = embed, counter: Any = None) -> np.ndarray:
    counter = counter or VoteCounter(private, embedding, noise, batch_size=4)
    return counter.votes(CANDIDATES, LABELS, ALLOWING)[0]


# --- the attack


def epsilon_at_least(smaller: Any, larger: Any) -> float:
    """Lower confidence bound on epsilon at DELTA, by a threshold on the sum of the answer's cells."""
    counters = [VoteCounter(private, embed, NOISE, batch_size=4) for private in (smaller, larger)]
    without, with_it = (
        np.array([float(ask(None, counter=counter).sum()) for _ in range(RUNS)]) for counter in counters
    )
    half, best = RUNS // 2, 0.0
    for first, second in ((with_it, without), (-without, -with_it)):
        gains = {
            t: math.log(((first[:half] >= t).mean() + 1e-9) / ((second[:half] >= t).mean() + 4 / half))
            for t in np.unique(first[:half])
        }
        t = max(gains, key=lambda value: gains[value])
        hits, misses, n = int((first[half:] >= t).sum()), int((second[half:] >= t).sum()), RUNS - half
        low = beta.ppf(ALARM / 4, hits, n - hits + 1) if hits else 0.0
        high = beta.ppf(1 - ALARM / 4, misses + 1, n - misses) if misses < n else 1.0
        if low > DELTA:
            best = max(best, math.log((low - DELTA) / high))
    return best


def private_enough() -> bool:
    claimed = epsilon_of([GaussianDpEvent(NOISE)], DELTA)
    return epsilon_at_least(protected([0] * 5), protected([0] * 6)) <= claimed


def test_the_attack_does_not_beat_the_claim():
    assert private_enough()


def test_noise_left_out(monkeypatch):
    monkeypatch.setattr(module, "discrete_gaussian", lambda values, scale: np.asarray(values))
    assert not private_enough()


def test_far_too_little_noise(monkeypatch):
    real = module.discrete_gaussian
    monkeypatch.setattr(module, "discrete_gaussian", lambda values, scale: real(values, scale / 16))
    assert not private_enough()


def test_noise_drawn_once_and_kept(monkeypatch):
    kept = np.array([1, -2, 0])
    monkeypatch.setattr(module, "discrete_gaussian", lambda values, scale: np.asarray(values) + kept)
    assert not private_enough()


# --- sensitivity: one unit, one vote


def exact(private: Any, embedding: Any = embed, candidates: Any = CANDIDATES) -> np.ndarray:
    counter = VoteCounter(private, embedding, 1e-9, batch_size=4)
    return counter.votes(candidates, np.zeros(len(candidates), dtype=np.int64), ALLOWING)[0]


def one_vote_each(embedding: Any = embed) -> bool:
    """Whichever unit goes, of one image or several: one cell falls by one, the others stay."""
    values, groups = [0, 10, 53, 53, 240, 250, 255, 0], [[0], [1], [2], [3], [4, 5], [6, 7]]
    private, whole = protected(values, groups), []
    for gone in range(4):  # of the units of a single image, so that the vote is not random
        less = protected(values, [group for i, group in enumerate(groups) if i != gone])
        less._units[-2:] = private._units[-2:] = [np.array([4]), np.array([6])]
        whole = exact(private, embedding)
        change = whole - exact(less, embedding)
        if sorted(change.tolist()) != [0, 0, 1]:
            return False
    many = protected([0] * 30, [range(30)])
    return int(whole.sum()) == 6 and int(np.abs(exact(many, embedding)).sum()) == 1


def test_each_unit_has_one_vote():
    assert one_vote_each()


def test_a_vote_for_each_of_the_two_nearest(monkeypatch):
    real = module._Grid.nearest

    def two(self: Any, voters: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        first = real(self, voters, candidates)
        return np.concatenate([first, (first + 1) % len(candidates)])

    monkeypatch.setattr(module._Grid, "nearest", two)
    assert not one_vote_each()


def test_votes_of_units_that_weigh_by_distance(monkeypatch):
    def weighed(self: Any, voters: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        distance = np.linalg.norm(voters[:, None] - candidates, axis=2)
        times = 1 + (distance.min(1) // 10).astype(int)  # how often each unit votes
        return np.repeat(distance.argmin(1), times)

    monkeypatch.setattr(module._Grid, "nearest", weighed)
    assert not one_vote_each()


def test_every_image_of_a_unit_voting(monkeypatch):
    monkeypatch.setattr(module, "_one_row_per_unit", lambda private, stream: np.concatenate(private._units))
    assert not one_vote_each()


def test_a_search_structure_learnt_from_the_private_images(monkeypatch):
    """Cells laid around the mean of the voters: whoever joins moves the votes of the others."""
    real = module._Grid.nearest

    def learnt(self: Any, voters: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        return real(self, voters - voters.mean(0) + candidates.mean(0), candidates)

    monkeypatch.setattr(module._Grid, "nearest", learnt)
    assert not one_vote_each()


def test_a_neighbour_not_found_counted_for_several(monkeypatch):
    """-1 for "none found", the published bug, among the k nearest: padding lands on the last candidate."""
    real = module._Grid.nearest

    def padded(self: Any, voters: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        found = np.stack([real(self, voters, candidates), np.full(len(voters), -1)], axis=1)
        return np.arange(len(candidates))[found].ravel()

    monkeypatch.setattr(module._Grid, "nearest", padded)
    assert not one_vote_each()


def test_cells_scaled_by_the_number_of_units(monkeypatch):
    """Shares in place of counts: the divisor is private and every cell moves with it."""
    real = np.bincount

    def shares(chosen: np.ndarray, minlength: int = 0) -> np.ndarray:
        counts = real(chosen, minlength=minlength)
        return (100 * counts / max(len(chosen), 1)).astype(np.int64)

    monkeypatch.setattr(module.np, "bincount", shares)
    assert not one_vote_each()


# --- what one image does must not depend on the others


def refuses(embedding: Any) -> bool:
    try:
        VoteCounter(protected([0, 255, 3, 40]), embedding, NOISE, batch_size=4)
    except InputError as error:
        return "no budget was spent" in str(error)
    return False


def batch_normalised(images: np.ndarray) -> np.ndarray:
    features = embed(images)
    return (features - features.mean(0)) / (features.std(0) + 1)


class Remembering:
    """Features relative to all that was seen before: statistics in training mode."""

    def __init__(self) -> None:
        self.seen = np.zeros(4)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.seen += embed(images).mean(0)
        return embed(images) + self.seen


@pytest.mark.parametrize("embedding", [batch_normalised, Remembering()], ids=["batch", "running"])
def test_encoders_that_mix_images_are_refused(embedding):
    assert refuses(embedding) and not refuses(embed)


@pytest.mark.parametrize("embedding", [batch_normalised, Remembering()], ids=["batch", "running"])
def test_an_encoder_that_is_not_checked(monkeypatch, embedding):
    monkeypatch.setattr(module, "_checked", lambda embed, shape, batch_size: (batch_size, 4))
    assert not refuses(embedding)


def place_does_not_matter() -> bool:
    """Rounding that depends on the place in the batch never moves a vote of somebody else."""

    def rounding(images: np.ndarray) -> np.ndarray:
        return embed(images) * np.float32(1 + 2e-7 * np.arange(len(images)))[:, None]

    near = np.array([[200 * (1 + 2e-7 * k)] * 4 for k in range(4)])
    five, six = protected([200] * 5), protected([200] * 6)
    change = exact(six, rounding, near) - exact(five, rounding, near)
    four = exact(protected([200] * 4), rounding, near)
    return sorted(change.tolist()) == [0, 0, 0, 1] and int(four.max()) == 4


def test_the_place_in_a_batch_does_not_matter():
    assert place_does_not_matter()


def test_rounding_of_the_place_let_through(monkeypatch):
    real = module._checked
    monkeypatch.setattr(module, "_checked", lambda e, shape, size: (size, real(e, shape, size)[1]))
    assert not place_does_not_matter()


# --- charged as done, before anything leaves


@pytest.fixture
def reservation(tmp_path) -> Reservation:
    ledger = Ledger.open(tmp_path / "x.db", total=Budget(50, 1e-3))
    plan = PlannedEvent(MECHANISM, "", nearest_neighbour_histogram_event(NOISE), count=3)
    return ledger.reserve("votes", [plan], delta=DELTA)


def charged_as_done(reservation: Reservation) -> bool:
    counter = VoteCounter(protected([0, 255]), embed, NOISE)
    for turn in (1, 2, 3):
        _, event = counter.votes(CANDIDATES, LABELS, reservation)
        if reservation.begun(MECHANISM) != turn or not same_event(event, reservation.planned[0].event):
            return False
    try:
        counter.votes(CANDIDATES, LABELS, reservation)  # a fourth look was not reserved
    except LedgerError:
        return True
    return False


def test_what_is_charged_is_what_was_done(reservation):
    assert charged_as_done(reservation)


def test_only_the_first_vote_charged(reservation, monkeypatch):
    real = Reservation.begin

    def once(self: Reservation, mechanism: str, event: Any) -> None:
        if self.begun(mechanism) == 0:
            real(self, mechanism, event)

    monkeypatch.setattr(Reservation, "begin", once)
    assert not charged_as_done(reservation)


def test_an_error_of_the_ledger_swallowed(reservation, monkeypatch):
    real = Reservation.begin

    def careless(self: Reservation, mechanism: str, event: Any) -> None:
        with contextlib.suppress(LedgerError):
            real(self, mechanism, event)

    monkeypatch.setattr(Reservation, "begin", careless)
    assert not charged_as_done(reservation)


def test_another_event_returned_than_charged(reservation, monkeypatch):
    real = VoteCounter.votes
    monkeypatch.setattr(
        VoteCounter, "votes", lambda self, *given: (real(self, *given)[0], GaussianDpEvent(484.0))
    )
    assert not charged_as_done(reservation)


def begun_before_the_noise() -> bool:
    """When the ledger refuses, or the process dies there, no noise was drawn and no value exists."""
    order: list[str] = []
    real = module.discrete_gaussian
    module.discrete_gaussian = lambda values, scale: (order.append("noise"), real(values, scale))[1]

    class Ordered:
        def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
            order.append("begin")

    watching: Any = Ordered()
    try:
        VoteCounter(protected([0, 1]), embed, NOISE).votes(CANDIDATES, LABELS, watching)
    finally:
        module.discrete_gaussian = real
    return order == ["begin", "noise"]


def test_begun_before_the_noise():
    assert begun_before_the_noise()


def test_begun_after_the_noise(monkeypatch):
    def late(self: Any, features: Any, labels: Any, reservation: Any) -> Any:
        value = module.discrete_gaussian(np.zeros(3, dtype=np.int64), self._noise_multiplier)
        reservation.begin(MECHANISM, self._event)
        return value, self._event

    monkeypatch.setattr(VoteCounter, "votes", late)
    assert not begun_before_the_noise()


def test_never_begun(monkeypatch):
    real = VoteCounter.votes
    monkeypatch.setattr(VoteCounter, "votes", lambda self, f, y, reservation: real(self, f, y, ALLOWING))
    assert not begun_before_the_noise()


def noise_is_fresh() -> bool:
    counter = VoteCounter(protected([0]), embed, 50.0)
    many, labels = np.repeat(CANDIDATES, 40, axis=0), np.zeros(120, dtype=np.int64)
    first, second = (counter.votes(many, labels, ALLOWING)[0] for _ in range(2))
    return bool((first != second).mean() > 0.5)


def test_noise_is_fresh():
    assert noise_is_fresh()


def test_seeding_right_before_the_noise(monkeypatch):
    def seeded(values: np.ndarray, scale: float) -> np.ndarray:
        return values + np.rint(np.random.default_rng(0).normal(0, scale, values.shape)).astype(np.int64)

    monkeypatch.setattr(module, "discrete_gaussian", seeded)
    assert not noise_is_fresh()
