"""Rules of the noisy mean of vectors and of the vote, as checks that pass on the real code and fail on a planted bug.

The attack runs a mechanism often on two neighbouring data sets, trains a threshold on half of the outcomes and turns
its error rates on the other half into a lower bound on epsilon (Clopper-Pearson). A bound above the claim proves a
bug. A correct mechanism fails with chance below 1e-6.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from scipy.stats import beta, chi2

from sfumato.errors import InputError, LedgerError
from sfumato.privacy import vectors
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent, same_event
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.randomness import SecureStream
from sfumato.privacy.vectors import MeanPlan

ALARM = 1e-7
DELTA = 1e-5
RUNS = 500
STEPS = 1 << 20


def protected(kinds: Any, units: Any = None) -> Any:
    """Images of one colour each, their kind."""
    kinds = np.asarray(kinds, dtype=np.uint8)
    images = np.broadcast_to(kinds.reshape(-1, 1, 1, 1), (len(kinds), 2, 2, 1))
    units = [[row] for row in range(len(kinds))] if units is None else units
    return SimpleNamespace(_images=images, _units=[np.array(unit, dtype=np.int64) for unit in units])


class Allowing:
    """A reservation that allows everything: for attacks on what comes out."""

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        pass


ALLOWING: Any = Allowing()


@dataclass
class Table:
    """An embedding that gives an image of kind k row k of a table."""

    rows: np.ndarray
    batch_size: int = 4

    @property
    def dimension(self) -> int:
        return self.rows.shape[1]

    def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
        if steps is not None:  # the self-test's random images: something of their own
            return np.repeat(images.reshape(len(images), -1).mean(1, keepdims=True), self.dimension, axis=1)
        return self.rows[images[:, 0, 0, 0] % len(self.rows)]


LONG = Table(np.array([[0.0, 0.0], [50.0, 0.0], [50.0, 1.0], [30.0, -40.0], [0.1, 0.1], [np.nan, 0.0]]))
PLAN = MeanPlan(np.zeros(2), clip_norm=0.5, noise_multiplier=2.0, divisor=40.0)


def mean(private: Any, embed: Any = LONG, plan: MeanPlan = PLAN, reservation: Any = ALLOWING) -> Any:
    return vectors.vector_mean(private, embed, plan, reservation)


# --- the attack on the mean: the worst neighbours, a unit more that pulls with its whole length


def epsilon_at_least(without: np.ndarray, with_it: np.ndarray) -> float:
    """Lower confidence bound on epsilon at DELTA, from samples of a statistic on two neighbouring data sets."""
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


def private_enough() -> bool:
    drawn = [
        np.array([mean(protected(kinds))[0][0] for _ in range(RUNS)]) for kinds in ([4] * 3, [4] * 3 + [1])
    ]
    return epsilon_at_least(*drawn) <= epsilon_of([PLAN.event], DELTA)


def test_the_attack_does_not_beat_the_claim():
    assert private_enough()


def unclipped(residual: np.ndarray, plan: MeanPlan) -> np.ndarray:
    return np.trunc(np.nan_to_num(residual) * STEPS / plan.clip_norm).astype(np.int64)


def unit_length(residual: np.ndarray, plan: MeanPlan) -> np.ndarray:
    """What published code does, whatever the clip norm says."""
    return unclipped(residual / max(float(np.linalg.norm(residual)), 1e-9), plan)


def test_clipping_left_out(monkeypatch):
    monkeypatch.setattr(vectors, "_on_lattice", unclipped)
    assert not private_enough()


def test_noise_left_out(monkeypatch):
    monkeypatch.setattr(vectors, "discrete_gaussian", lambda total, scale: total)
    assert not private_enough()


def test_noise_scaled_to_the_mean_and_divided_again(monkeypatch):
    real = vectors.discrete_gaussian
    monkeypatch.setattr(vectors, "discrete_gaussian", lambda total, scale: real(total, scale / PLAN.divisor))
    assert not private_enough()


# --- sensitivity: one unit moves the sum before the noise by at most the clip norm


def lattice_sum(private: Any, embed: Any, plan: MeanPlan) -> list[int]:
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "discrete_gaussian", lambda *given: (seen.append(given), given[0])[1])
        mean(private, embed, plan)
    return seen[0][0].tolist()


def sensitivity_is_the_clip_norm(embed: Any = LONG) -> bool:
    """For units of one image and of three, dropped from the front, the middle and the back."""
    kinds, units = [1, 2, 4, 3, 1, 2, 1, 5, 2], [[0], [1], [2], [3, 7], [4, 5, 6], [8]]
    along = replace(PLAN, basis=np.array([[0.6], [0.8]]), center=np.array([1.0, -1.0]))
    for plan in (PLAN, replace(PLAN, normalise=True), along):
        whole = lattice_sum(protected(kinds, units), embed, plan)
        for gone in range(len(units)):
            less = lattice_sum(protected(kinds, units[:gone] + units[gone + 1 :]), embed, plan)
            if sum((a - b) ** 2 for a, b in zip(whole, less, strict=True)) > STEPS**2:
                return False
    return True


def test_sensitivity():
    assert sensitivity_is_the_clip_norm()


def clipped_by_entry(residual: np.ndarray, plan: MeanPlan) -> np.ndarray:
    along = residual if plan.basis is None else plan.basis.T @ residual
    return np.trunc(np.clip(np.nan_to_num(along) / plan.clip_norm, -1, 1) * STEPS).astype(np.int64)


def rounded_up(residual: np.ndarray, plan: MeanPlan) -> np.ndarray:
    """Rounded away from zero after clipping: the length grows by a hair."""
    along = np.nan_to_num(residual if plan.basis is None else plan.basis.T @ residual)
    factor = min(1.0, plan.clip_norm / max(float(np.linalg.norm(along)), 1e-9))
    return (np.sign(along) * np.ceil(np.abs(along) * factor * STEPS / plan.clip_norm)).astype(np.int64)


@pytest.mark.parametrize("bug", [unclipped, unit_length, clipped_by_entry, rounded_up])
def test_vectors_longer_than_the_clip_norm(monkeypatch, bug):
    monkeypatch.setattr(vectors, "_on_lattice", bug)
    assert not sensitivity_is_the_clip_norm()


def test_every_image_of_a_unit_clipped_and_added(monkeypatch):
    real = vectors._unit_vectors

    def every_image(private: Any, units: list[np.ndarray], *more: Any) -> Any:
        return real(private, [np.array([row]) for unit in units for row in unit], *more)

    monkeypatch.setattr(vectors, "_unit_vectors", every_image)
    assert not sensitivity_is_the_clip_norm()


class SeededByPosition(Table):
    """The published way: one generator for the batch, so an image's noise depends on its place."""

    def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
        return super().__call__(images) + np.random.default_rng(0).normal(size=(len(images), 2), scale=100)


class Centred(Table):
    """What batch normalisation in training mode amounts to."""

    def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
        found = np.nan_to_num(super().__call__(images))
        return found - found.mean(0)


class Dicing(Table):
    def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
        return super().__call__(images) + np.random.default_rng().normal(size=(len(images), 2), scale=100)


@pytest.mark.parametrize("kind", [SeededByPosition, Centred, Dicing])
def test_an_embedding_that_lets_one_image_move_another(monkeypatch, kind):
    embed = kind(LONG.rows)
    with pytest.raises(InputError, match="no budget was spent"):
        sensitivity_is_the_clip_norm(embed)
    monkeypatch.setattr(vectors, "_check_alone", lambda *_: None)
    assert not sensitivity_is_the_clip_norm(embed)


# --- noise: in every direction, as large as stated, none like another, never the same again


def noise_as_stated() -> bool:
    wide, frame = 300, np.linalg.qr(np.random.default_rng(0).normal(size=(300, 200)))[0]
    for plan in (replace(PLAN, center=np.zeros(wide)), replace(PLAN, center=np.zeros(wide), basis=frame)):
        embed = Table(np.ones((1, wide)))
        drawn = np.array([mean(protected([]), embed, plan)[0] for _ in range(6)]) / plan.noise
        along = drawn if plan.basis is None else drawn @ plan.basis
        for squares in ((along**2).sum(0), ((along - along.mean(1, keepdims=True)) ** 2).sum(1)):
            freedom, chance = along.size // len(squares), ALARM / len(squares)  # by direction, by draw
            if (
                not (chi2.ppf(chance, freedom - 1) < squares).all()
                or not (squares < chi2.isf(chance, freedom)).all()
            ):
                return False
        alike = np.abs(along @ along.T)[~np.eye(6, dtype=bool)].max() / along.shape[1]
        total = (along**2).sum()
        if alike > 7 / math.sqrt(along.shape[1]) or not chi2.ppf(ALARM, along.size) < total < chi2.isf(
            ALARM, along.size
        ):
            return False
    return True


def test_noise_is_as_stated():
    assert noise_as_stated()


def in_some_directions(total: np.ndarray, real: Any, scale: float) -> np.ndarray:
    kept = len(total) - 2
    return np.concatenate([real(total[:kept], scale), total[kept:]])


NOISE: dict[str, Any] = {
    "all directions but two": in_some_directions,
    "one draw for all directions": lambda total, real, scale: total + real(np.zeros(1, np.int64), scale),
    "spread over the directions": lambda total, real, scale: real(total, scale / math.sqrt(len(total))),
    "scaled to the mean": lambda total, real, scale: real(total, scale / PLAN.divisor),
    "too small by a fifth": lambda total, real, scale: real(total, scale * 0.8),
    "for replacing a unit": lambda total, real, scale: real(total, scale * 2),
    "averaged over two draws": lambda total, real, scale: (real(total, scale) + real(total, scale)) // 2,
    "none": lambda total, real, scale: total,
    "with a seed": lambda total, real, scale: (
        total + np.rint(np.random.default_rng(0).normal(0, scale, len(total))).astype(np.int64)
    ),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_unlike_what_is_stated(monkeypatch, name):
    real = vectors.discrete_gaussian
    monkeypatch.setattr(vectors, "discrete_gaussian", lambda total, scale: NOISE[name](total, real, scale))
    assert not noise_as_stated()


def divisor_is_public() -> bool:
    """Doubling the units doubles the mean's distance from its centre: the divisor stayed the same."""
    plan = replace(PLAN, noise_multiplier=1e-9, divisor=50.0)
    small, large = (mean(protected([1] * count), plan=plan)[0][0] for count in (30, 60))
    return math.isclose(large, 2 * small, rel_tol=1e-4)


def test_the_divisor_is_public():
    assert divisor_is_public()


def test_a_divisor_from_the_data(monkeypatch):
    real = vectors.vector_mean

    def actual(private: Any, embed: Any, plan: MeanPlan, reservation: Any) -> Any:
        return real(private, embed, replace(plan, divisor=float(len(private._units))), reservation)

    monkeypatch.setattr(vectors, "vector_mean", actual)
    assert not divisor_is_public()


def sampled_as_accounted() -> bool:
    """How many units take part varies as the binomial, round by round, and every unit as often as another."""
    n, q, rounds = 60, 0.4, 150
    plan = replace(PLAN, center=np.zeros(n), sampling_probability=q)
    here = np.array([lattice_sum(protected(range(n)), Table(np.eye(n), 60), plan) for _ in range(rounds)]) > 0
    for seen, count in ((here.sum(1), n), (here.sum(0), rounds)):  # by round, by unit
        statistic = ((seen - count * q) ** 2).sum() / (count * q * (1 - q))
        if not chi2.ppf(ALARM, len(seen)) < statistic < chi2.isf(ALARM, len(seen)):
            return False
    return True


def test_units_are_sampled_as_accounted():
    assert sampled_as_accounted()


COINS: dict[str, Any] = {
    "a fixed number": lambda p, n: np.random.default_rng().permutation(n) < round(p * n),
    "the first ones": lambda p, n: np.arange(n) < round(p * n),
    "one coin for all": lambda p, n: np.full(n, np.random.default_rng().random() < p),
    "everybody": lambda p, n: np.ones(n, dtype=bool),
    "too often": lambda p, n: np.random.default_rng().random(n) < p + 0.1,
    "the same every time": lambda p, n: np.random.default_rng(0).random(n) < p,
}


@pytest.mark.parametrize("name", COINS)
def test_samples_that_are_not_poisson(monkeypatch, name):
    monkeypatch.setattr(SecureStream, "bernoulli", lambda self, p, n: COINS[name](p, n))
    assert not sampled_as_accounted()


# --- only the noisy value leaves, and only once it is on the ledger


def leaves_only_noise(capfd: Any, caplog: Any) -> bool:
    """No number comes out the same twice, and nobody is told of images without a vector or too long for one."""
    embed = Table(np.array([[np.nan, 1.0], [1e308, 1e308], [0.1, 0.2], [0.1, np.inf]]))
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        first, second = (mean(protected([0, 1, 2, 3, 1], [[0], [1, 4], [2], [3]]), embed) for _ in range(2))
    numbers = [np.ravel(out[0]) for out in (first, second)]
    fresh = len(first) == 2 and (numbers[0] != numbers[1]).all()
    return bool(fresh and not caught and capfd.readouterr() == ("", "") and not caplog.records)


def test_only_noise_leaves(capfd, caplog):
    assert leaves_only_noise(capfd, caplog)


@pytest.mark.parametrize("tell", [print, warnings.warn, logging.getLogger("sfumato").debug])
def test_failures_told(monkeypatch, capfd, caplog, tell):
    real = vectors._on_lattice

    def chatty(residual: np.ndarray, plan: MeanPlan) -> np.ndarray:
        if not residual.any():
            tell("an image could not be embedded")
        return real(residual, plan)

    monkeypatch.setattr(vectors, "_on_lattice", chatty)
    assert not leaves_only_noise(capfd, caplog)


def numpy_with(**changes: Any) -> Any:
    return SimpleNamespace(**{**vars(np), **changes})


def test_warnings_of_overflow(monkeypatch, capfd, caplog):
    monkeypatch.setattr(vectors, "np", numpy_with(errstate=lambda **_: contextlib.nullcontext()))
    assert not leaves_only_noise(capfd, caplog)


def test_the_exact_mean_returned_as_well(monkeypatch, capfd, caplog):
    real = vectors.vector_mean

    def debugging(*given: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vectors, "discrete_gaussian", lambda total, scale: total)
            exact = real(*given)[0]
        return np.append(real(*given)[0], exact), given[2].event

    monkeypatch.setattr(vectors, "vector_mean", debugging)
    assert not leaves_only_noise(capfd, caplog)


PLANNED = [PlannedEvent("vector_mean", "", PLAN.event)]


def charged_as_returned(ledger: Ledger) -> bool:
    reservation = ledger.reserve("mean", PLANNED, delta=DELTA)
    _, event = mean(protected([1, 2]), reservation=reservation)
    return same_event(event, PLAN.event) and reservation.begun("vector_mean") == 1


def charged_first(ledger: Ledger, draws: list[Any]) -> bool:
    """When the ledger refuses (a second look, another plan), no noise is drawn and no value leaves."""
    reservation = ledger.reserve("twice", PLANNED, delta=DELTA)
    for plan in (replace(PLAN, noise_multiplier=1.9), replace(PLAN, sampling_probability=0.5), PLAN, PLAN):
        draws.clear()
        refused = plan is not PLAN or reservation.begun("vector_mean") == 1
        try:
            mean(protected([1]), plan=plan, reservation=reservation)
        except LedgerError:
            if draws or not refused:
                return False
        else:
            if refused:
                return False
    return True


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger.open(tmp_path / "x.db", total=Budget(50, 1e-3))


@pytest.fixture
def draws(monkeypatch) -> list[Any]:
    """Filled by every draw of noise."""
    drawn: list[Any] = []
    real = vectors.discrete_gaussian
    monkeypatch.setattr(vectors, "discrete_gaussian", lambda *given: (drawn.append(given), real(*given))[1])
    return drawn


def test_what_is_charged_is_what_was_done(ledger, draws):
    assert charged_as_returned(ledger) and charged_first(ledger, draws)


def test_begin_skipped(ledger, draws, monkeypatch):
    monkeypatch.setattr(Reservation, "begin", lambda self, *_: None)
    assert not charged_as_returned(ledger) and not charged_first(ledger, draws)


def test_another_event_accounted_than_run(ledger, monkeypatch):
    real = vectors.vector_mean
    monkeypatch.setattr(vectors, "vector_mean", lambda *given: (real(*given)[0], GaussianDpEvent(484.0)))
    assert not charged_as_returned(ledger)


def test_an_error_of_the_ledger_swallowed(ledger, draws, monkeypatch):
    real = Reservation.begin

    def careless(self: Reservation, mechanism: str, event: Any) -> None:
        with contextlib.suppress(LedgerError):
            real(self, mechanism, event)

    monkeypatch.setattr(Reservation, "begin", careless)
    assert not charged_first(ledger, draws)


def test_charged_after_the_noise(ledger, draws, monkeypatch):
    real = vectors.vector_mean

    def late(private: Any, embed: Any, plan: MeanPlan, reservation: Any) -> Any:
        out = real(private, embed, plan, ALLOWING)
        reservation.begin("vector_mean", plan.event)
        return out

    monkeypatch.setattr(vectors, "vector_mean", late)
    assert charged_as_returned(ledger)  # this check does not see it
    assert not charged_first(ledger, draws)


# --- the vote: a unit has one


def vote_is_private_enough() -> bool:
    """One unit more, of many images that all fit what nobody else fits."""
    sets, scores = (protected([1]), protected([1] + [0] * 40, [[0], range(1, 41)])), Table(np.eye(2))

    def sample(private: Any) -> np.ndarray:
        chosen = [vectors.nearest_candidate(private, scores, 2, 1.0, ALLOWING, 4)[0] for _ in range(RUNS)]
        return -np.array(chosen, dtype=float)

    return epsilon_at_least(*map(sample, sets)) <= 1.0


def test_the_attack_on_the_vote_does_not_beat_the_claim():
    assert vote_is_private_enough()


def test_votes_without_noise(monkeypatch):
    monkeypatch.setattr(vectors, "_noisy_max", lambda counts, scale: int(np.argmax(counts)))
    assert not vote_is_private_enough()


def test_a_vote_for_every_image(monkeypatch):
    monkeypatch.setattr(vectors, "_one_row_per_unit", lambda private, _: np.concatenate(private._units))
    assert not vote_is_private_enough()
