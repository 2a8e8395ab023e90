"""Rules of private model selection, as checks that pass on the real code and fail on a planted bug.

The attack tries the worst neighbours there are: two candidates without a right answer, and one unit that only
the first judges rightly. How often the second is chosen on either set bounds epsilon from below
(Clopper-Pearson); a bound above the claim proves a bug. A correct mechanism fails with chance below 1e-6.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta

from sfumato.errors import InputError
from sfumato.privacy import selection
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent, same_event
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.selection import MODEL_SELECTION, best_candidate, model_selection_event

ALARM = 1e-7
EPSILON = 1.0
RUNS = 1200


def protected(values: list[int], units: list[list[int]] | None = None) -> Any:
    """Images of one colour each, all with label 0."""
    images = np.broadcast_to(np.array(values, np.uint8).reshape(-1, 1, 1, 1), (len(values), 2, 2, 1))
    units = [[row] for row in range(len(values))] if units is None else units
    return SimpleNamespace(
        _images=images, _labels=np.zeros(len(values), np.int64), _units=[np.array(unit) for unit in units],
        label_names=("a", "b"), has_labels=True,
    )  # fmt: skip


class Allowing:
    """A reservation that allows everything: for attacks on what comes out."""

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        pass


ALLOWING: Any = Allowing()


def right(images: np.ndarray) -> np.ndarray:
    return np.zeros(len(images), np.int64)


def wrong(images: np.ndarray) -> np.ndarray:
    return np.ones(len(images), np.int64)


def share_of_the_wrong(private: Any) -> tuple[float, float]:
    """Confidence bounds on how often the candidate without a right answer is chosen."""
    hits = sum(best_candidate(private, [wrong, right], EPSILON, ALLOWING, 2)[0] == 0 for _ in range(RUNS))
    low = beta.ppf(ALARM / 4, hits, RUNS - hits + 1) if hits else 0.0
    high = beta.ppf(1 - ALARM / 4, hits + 1, RUNS - hits) if hits < RUNS else 1.0
    return float(low), float(high)


def private_enough() -> bool:
    """The attack does not exceed the claim, in either direction."""
    (low, high), (low_more, high_more) = share_of_the_wrong(protected([])), share_of_the_wrong(protected([7]))
    pairs = [(low, high_more), (low_more, high), (1 - high, 1 - low_more), (1 - high_more, 1 - low)]
    return all(first <= math.exp(EPSILON) * second for first, second in pairs)


def test_the_attack_does_not_beat_the_claim():
    assert private_enough()


def test_noise_for_twice_the_epsilon(monkeypatch):
    real = selection._noisy_max
    monkeypatch.setattr(selection, "_noisy_max", lambda counts, scale: real(counts, scale / 2))
    assert not private_enough()


def test_noise_left_out(monkeypatch):
    monkeypatch.setattr(selection, "_noisy_max", lambda counts, scale: int(np.argmax(counts)))
    assert not private_enough()


def test_units_counted_twice(monkeypatch):
    real = selection._one_row_per_unit
    monkeypatch.setattr(selection, "_one_row_per_unit", lambda *given: np.repeat(real(*given), 2))
    assert not private_enough()


# --- sensitivity: one unit moves all counts one way, by at most one


def exact(private: Any, candidates: Any) -> np.ndarray:
    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_noisy_max", lambda counts, scale: (seen.append(counts.copy()), 0)[1])
        best_candidate(private, candidates, EPSILON, ALLOWING, 8)
    return seen[0]


def dark(images: np.ndarray) -> np.ndarray:
    return (images.mean(axis=(1, 2, 3)) > 100).astype(np.int64)


def darker_than_the_batch(images: np.ndarray) -> np.ndarray:
    """What batch normalisation in training mode amounts to."""
    each = images.mean(axis=(1, 2, 3))
    return (each > each.mean() + 1).astype(np.int64)


def sensitivity_is_one(candidates: Any) -> bool:
    """For a unit of one image and one of three, with bright and with dark images around."""
    values, units = [10, 20, 30, 40, 250, 255, 251], [[0], [1], [2], [3], [4, 5, 6]]
    whole = exact(protected(values, units), candidates)
    changes = [
        whole - exact(protected(values, [unit for unit in units if unit != gone]), candidates)
        for gone in units
    ]
    return all(set(change) <= {0, 1} for change in changes)


def test_sensitivity():
    assert sensitivity_is_one([right, dark, wrong])


def test_images_counted_instead_of_units(monkeypatch):
    monkeypatch.setattr(selection, "_one_row_per_unit", lambda private, _: np.concatenate(private._units))
    assert not sensitivity_is_one([right, dark, wrong])


def test_a_candidate_that_mixes_the_batch(monkeypatch):
    with pytest.raises(InputError, match="by itself"):
        sensitivity_is_one([right, darker_than_the_batch])
    monkeypatch.setattr(selection, "_check_by_itself", lambda *_: None)
    assert not sensitivity_is_one([right, darker_than_the_batch])


def batches_are_alike() -> bool:
    """A candidate never learns how many units there are from the shape of its batches."""
    shapes = set()

    def noting(images: np.ndarray) -> np.ndarray:
        shapes.add(images.shape)
        return right(images)

    for count in (0, 3, 8, 9):
        exact(protected([5] * count), [right, noting])
    return len(shapes) == 1


def test_batches_are_alike():
    assert batches_are_alike()


def test_batches_of_another_shape(monkeypatch):
    real = selection._answers
    monkeypatch.setattr(
        selection, "_answers",
        lambda candidate, position, images: real(candidate, position, images[: np.count_nonzero(images[:, 0, 0, 0])]),
    )  # fmt: skip
    assert not batches_are_alike()


# --- charged as what it is, before anything leaves


def charged_as_returned(ledger: Ledger) -> bool:
    plan = PlannedEvent(MODEL_SELECTION, "", model_selection_event(EPSILON))
    reservation = ledger.reserve("selection", [plan], delta=0)
    _, event = best_candidate(protected([1, 2]), [right, wrong], EPSILON, reservation, 2)
    return same_event(event, plan.event) and reservation.begun(MODEL_SELECTION) == 1


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger.open(tmp_path / "x.db", total=Budget(5, 1e-5))


def test_what_is_charged_is_what_was_done(ledger):
    assert charged_as_returned(ledger)


def test_begin_skipped(ledger, monkeypatch):
    monkeypatch.setattr(Reservation, "begin", lambda self, *_: None)
    assert not charged_as_returned(ledger)


def noise_is_fresh() -> bool:
    """The choice is not the same again and again."""
    drawn = {best_candidate(protected([]), [right, wrong], EPSILON, ALLOWING, 2)[0] for _ in range(40)}
    return drawn == {0, 1}


def test_noise_is_fresh():
    assert noise_is_fresh()


def test_noise_with_a_fixed_seed(monkeypatch):
    def seeded(counts: np.ndarray, scale: float) -> int:
        return int(np.argmax(counts + np.random.default_rng(0).exponential(scale, len(counts))))

    monkeypatch.setattr(selection, "_noisy_max", seeded)
    assert not noise_is_fresh()
