"""Every rule the mechanisms must keep, as a check that passes on the real code and fails on a planted bug.

The central check is an attack: run a mechanism often on two neighbouring data sets, train a threshold on half
of the outcomes, and turn its error rates on the other half into a lower bound on epsilon (Clopper-Pearson). A
bound above the claim proves a bug. Confidence is such that a correct mechanism fails with chance below 1e-6.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from scipy.stats import beta, chi2

from sfumato.privacy import mechanisms
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent, same_event
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.randomness import SecureStream
from sfumato.privacy.sampling import PoissonSampler

ALARM = 1e-7
DELTA = 1e-5
RUNS = 1500


def protected(labels: list[int], *, bright: bool = False) -> Any:
    images = np.zeros((len(labels), 2, 2, 1), dtype=np.uint8) + (255 if bright else 0)
    units = [np.array([row]) for row in range(len(labels))]
    return SimpleNamespace(
        _images=images.astype(np.uint8),
        _labels=np.array(labels, dtype=np.int64),
        _units=units,
        label_names=("a", "b"),
    )


class Allowing:
    """A reservation that allows everything: for attacks on what comes out."""

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        pass


ALLOWING: Any = Allowing()


def classify(images: np.ndarray) -> np.ndarray:
    return np.tile([3.0, 2.0, 1.0, 0.0], (len(images), 1))


# name -> (statistic of one run on the private set, the event's epsilon)
TARGETS: dict[str, tuple[Callable[[Any], float], float]] = {
    "count": (lambda private: mechanisms.count(private, 0.5, ALLOWING)[0], 0.5),
    "label_histogram": (
        lambda private: float(mechanisms.label_histogram(private, 2.0, ALLOWING)[0][0]),
        epsilon_of([GaussianDpEvent(2.0)], DELTA),
    ),
    "semantic_histogram": (
        lambda private: float(
            mechanisms.semantic_histogram(private, classify, 4, 4, 2.0, ALLOWING, 8)[0][0].sum()
        ),
        epsilon_of([GaussianDpEvent(2.0)], DELTA),
    ),
    "mean_images": (
        lambda private: float(mechanisms.mean_images(private, 1, 0.5, 2.0, 100, ALLOWING)[0][0].sum()),
        epsilon_of([GaussianDpEvent(2.0)], DELTA),
    ),
}


def epsilon_at_least(run: Callable[[Any], float], smaller: Any, larger: Any, runs: int = RUNS) -> float:
    """Lower confidence bound on epsilon at DELTA, from distinguishing two neighbouring data sets."""
    without = np.array([run(smaller) for _ in range(runs)])
    with_it = np.array([run(larger) for _ in range(runs)])
    half, best = runs // 2, 0.0
    if with_it[:half].mean() < without[:half].mean():
        without, with_it = -without, -with_it
    for first, second in ((with_it, without), (-without, -with_it)):
        train = np.unique(np.concatenate([first[:half], second[:half]]))
        gains = [
            math.log(((first[:half] >= t).mean() + 1e-9) / ((second[:half] >= t).mean() + 4 / half))
            for t in train
        ]
        t = train[int(np.argmax(gains))]
        hits, misses, n = int((first[half:] >= t).sum()), int((second[half:] >= t).sum()), runs - half
        low = beta.ppf(ALARM / 4, hits, n - hits + 1) if hits else 0.0
        high = beta.ppf(1 - ALARM / 4, misses + 1, n - misses) if misses < n else 1.0
        if low > DELTA:
            best = max(best, math.log((low - DELTA) / high))
    return best


def private_enough(name: str) -> bool:
    """The attack on one mechanism does not exceed its claim."""
    run, claimed = TARGETS[name]
    bright = name == "mean_images"
    return (
        epsilon_at_least(run, protected([0] * 5, bright=bright), protected([0] * 6, bright=bright)) <= claimed
    )


@pytest.mark.parametrize("name", TARGETS)
def test_the_attack_does_not_beat_the_claim(name):
    assert private_enough(name)


@pytest.mark.parametrize("name", ["label_histogram", "semantic_histogram"])
def test_noise_left_out_of_a_histogram(monkeypatch, name):
    monkeypatch.setattr(mechanisms, "discrete_gaussian", lambda values, scale: np.asarray(values))
    assert not private_enough(name)


def test_noise_left_out_of_the_means(monkeypatch):
    monkeypatch.setattr(SecureStream, "gaussian", lambda self, shape: np.zeros(shape))
    assert not private_enough("mean_images")


def test_the_count_revealed(monkeypatch):
    monkeypatch.setattr(mechanisms, "discrete_laplace", lambda value, scale: value)
    assert not private_enough("count")


@pytest.mark.parametrize("name", ["label_histogram", "semantic_histogram"])
def test_a_sensitivity_far_too_small(monkeypatch, name):
    real = mechanisms.discrete_gaussian
    monkeypatch.setattr(mechanisms, "discrete_gaussian", lambda values, scale: real(values, scale / 8))
    assert not private_enough(name)


def noise_std(name: str) -> float:
    """Standard deviation of the noise over the L2 sensitivity that must be: its true multiplier."""
    names = tuple(str(i) for i in range(500))
    private = protected([0, 1])
    private.label_names = names
    if name == "semantic_histogram":
        value, _ = mechanisms.semantic_histogram(private, classify, 4, 4, 6.0, ALLOWING, 2)
        return float(value[2:].std()) / math.sqrt(4)
    if name == "label_histogram":
        value = np.concatenate([mechanisms.label_histogram(private, 6.0, ALLOWING)[0][2:] for _ in range(4)])
        return float(value.std())
    value, _ = mechanisms.mean_images(private, 1, 0.5, 6.0, 500 * 200, ALLOWING)
    return float(value[2:].std()) * 200 / 0.5


def noise_as_stated(name: str) -> bool:
    return abs(noise_std(name) / 6.0 - 1) < 7 / math.sqrt(2 * 1900)


NOISY = ["label_histogram", "semantic_histogram", "mean_images"]


@pytest.mark.parametrize("name", NOISY)
def test_the_noise_is_as_stated(name):
    assert noise_as_stated(name)


@pytest.mark.parametrize("name", NOISY)
def test_sensitivity_halved(monkeypatch, name):
    real, gaussian = mechanisms.discrete_gaussian, SecureStream.gaussian
    monkeypatch.setattr(mechanisms, "discrete_gaussian", lambda values, scale: real(values, scale / 2))
    monkeypatch.setattr(SecureStream, "gaussian", lambda self, shape: gaussian(self, shape) / 2)
    assert not noise_as_stated(name)


def test_sensitivity_of_top_k_forgotten(monkeypatch):
    monkeypatch.setattr(mechanisms, "_at_least", lambda wanted, value, factor, power=1: wanted)
    assert not noise_as_stated("semantic_histogram")


# --- everything that touches the data is charged, with the event it is, before anything leaves


def planned() -> list[PlannedEvent]:
    return [
        PlannedEvent("count", "", mechanisms.count_event(0.5)),
        PlannedEvent("label_histogram", "", mechanisms.label_histogram_event(2.0)),
        PlannedEvent("semantic_histogram", "", mechanisms.semantic_histogram_event(2.0)),
        PlannedEvent("mean_images", "", mechanisms.mean_images_event(2.0)),
    ]


def charged_as_returned(ledger: Ledger) -> bool:
    """Each mechanism's returned event equals the one in the ledger, and exactly one unit of it began."""
    private = protected([0, 1, 1])
    reservation = ledger.reserve("all", planned(), delta=DELTA)
    returned = {
        "count": mechanisms.count(private, 0.5, reservation)[1],
        "label_histogram": mechanisms.label_histogram(private, 2.0, reservation)[1],
        "semantic_histogram": mechanisms.semantic_histogram(private, classify, 4, 2, 2.0, reservation, 8)[1],
        "mean_images": mechanisms.mean_images(private, 1, 0.5, 2.0, 100, reservation)[1],
    }
    return all(
        same_event(plan.event, returned[plan.mechanism]) and reservation.begun(plan.mechanism) == 1
        for plan in reservation.planned
    )


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger.open(tmp_path / "x.db", total=Budget(50, 1e-3))


def test_what_is_charged_is_what_was_done(ledger):
    assert charged_as_returned(ledger)


def test_begin_skipped(ledger, monkeypatch):
    monkeypatch.setattr(Reservation, "begin", lambda self, *_: None)
    assert not charged_as_returned(ledger)


def test_a_query_not_charged(ledger, monkeypatch):
    real = Reservation.begin

    def quiet(self: Reservation, mechanism: str, event: Any) -> None:
        if mechanism != "semantic_histogram":
            real(self, mechanism, event)

    monkeypatch.setattr(Reservation, "begin", quiet)
    assert not charged_as_returned(ledger)


def test_another_event_accounted_than_run(ledger, monkeypatch):
    """The published bug: noise 2 is used, 484 is accounted."""
    real = mechanisms.label_histogram

    def swapped(private: Any, noise: float, reservation: Any) -> Any:
        return real(private, noise, reservation)[0], GaussianDpEvent(484.0)

    monkeypatch.setattr(mechanisms, "label_histogram", swapped)
    assert not charged_as_returned(ledger)


def nothing_leaves_unrecorded(ledger: Ledger) -> bool:
    """When the ledger cannot record, no noise is drawn and no value leaves."""
    reservation = ledger.reserve("once", planned()[1:2], delta=DELTA)
    private = protected([0, 1])
    mechanisms.label_histogram(private, 2.0, reservation)
    try:
        mechanisms.label_histogram(private, 2.0, reservation)  # a second look was not reserved
    except Exception:
        return True
    return False


def test_nothing_leaves_unrecorded(ledger):
    assert nothing_leaves_unrecorded(ledger)


def test_an_error_of_the_ledger_swallowed(ledger, monkeypatch):
    real = Reservation.begin

    def careless(self: Reservation, mechanism: str, event: Any) -> None:
        with contextlib.suppress(Exception):
            real(self, mechanism, event)

    monkeypatch.setattr(Reservation, "begin", careless)
    assert not nothing_leaves_unrecorded(ledger)


# --- randomness, divisors, sampling


def noise_is_fresh() -> bool:
    """Two runs, two streams and two instants never give the same noise."""
    private = protected([0, 1])
    private.label_names = tuple(str(i) for i in range(100))
    histograms = [mechanisms.label_histogram(private, 50.0, ALLOWING)[0][2:] for _ in range(2)]
    means = [mechanisms.mean_images(private, 1, 0.5, 2.0, 10_000, ALLOWING)[0][2:] for _ in range(2)]
    seeds = {SecureStream().seed() for _ in range(3)}
    return (histograms[0] != histograms[1]).any() and (means[0] != means[1]).all() and len(seeds) == 3


def test_noise_is_fresh():
    assert noise_is_fresh()


def test_a_stream_with_a_fixed_key(monkeypatch):
    monkeypatch.setattr("sfumato.privacy.randomness.os.urandom", bytes)
    assert not noise_is_fresh()


def test_seeding_right_before_the_noise(monkeypatch):
    def seeded(values: np.ndarray, scale: float) -> np.ndarray:
        return values + np.rint(np.random.default_rng(0).normal(0, scale, values.shape)).astype(np.int64)

    monkeypatch.setattr(mechanisms, "discrete_gaussian", seeded)
    assert not noise_is_fresh()


def divisor_is_public() -> bool:
    """Doubling the units doubles the mean's distance from its center: the divisor stayed the same."""
    values = []
    for labels in ([0] * 100, [0] * 200):
        private = protected(labels, bright=True)
        values.append(mechanisms.mean_images(private, 1, 0.1, 1e-6, 2000, ALLOWING)[0][0].mean())
    return bool(abs(values[1] / values[0] - 2) < 0.01)


def test_the_divisor_is_public():
    assert divisor_is_public()


def test_a_divisor_from_the_data(monkeypatch):
    real = mechanisms.mean_images

    def actual_counts(private: Any, *args: Any, **options: Any) -> Any:
        counts = np.bincount(private._labels, minlength=len(private.label_names))
        return real(private, *args, **options, label_counts=counts)

    monkeypatch.setattr(mechanisms, "mean_images", actual_counts)
    assert not divisor_is_public()


def sampled_as_accounted(sampler: Any, n: int, q: float, rounds: int = 3000) -> bool:
    """Batch sizes vary as the binomial, and membership in one batch says nothing about the next."""
    member = np.zeros((rounds, n), dtype=bool)
    for row in member:
        row[sampler.sample()] = True
    sizes = member.sum(axis=1)
    spread = sizes.var(ddof=1) * (rounds - 1) / (n * q * (1 - q))
    varied = chi2.ppf(1e-12, rounds - 1) * 0.95 < spread < chi2.ppf(1 - 1e-12, rounds - 1) * 1.05
    rate = abs(member.mean() - q) < 7 * math.sqrt(q / (rounds * n))
    again = abs((member[1:] & member[:-1]).mean() - q * q) < 8 * math.sqrt(q * q / (rounds * n))
    return bool(varied and rate and again)


def test_poisson_sampling_is_what_is_accounted():
    assert sampled_as_accounted(PoissonSampler(40, 0.25, SecureStream()), 40, 0.25)


class Shuffled:
    """The published bug: one shuffle an epoch, cut into batches of fixed size, accounted as Poisson."""

    def __init__(self) -> None:
        self.rng, self.left = np.random.default_rng(), []

    def sample(self) -> np.ndarray:
        if not self.left:
            self.left = list(self.rng.permutation(40).reshape(4, 10))
        return self.left.pop()


class FixedSize:
    def sample(self) -> np.ndarray:
        return np.random.default_rng().choice(40, 10, replace=False)


class Sticky:
    """One Poisson batch used again and again."""

    def __init__(self) -> None:
        self.batch = PoissonSampler(40, 0.25, SecureStream()).sample()

    def sample(self) -> np.ndarray:
        return self.batch


@pytest.mark.parametrize("bug", [Shuffled, FixedSize, Sticky])
def test_batches_that_are_not_poisson(bug):
    assert not sampled_as_accounted(bug(), 40, 0.25)


def unit_counts_once() -> bool:
    """A unit of many images moves a histogram no more than a unit of one."""
    private = protected([0] * 30)
    private._units = [np.arange(30)]
    return float(mechanisms.label_histogram(private, 0.01, ALLOWING)[0].sum()) <= 1


def test_a_unit_counts_once():
    assert unit_counts_once()


def test_every_image_of_a_unit_counted(monkeypatch):
    monkeypatch.setattr(
        mechanisms, "_one_row_per_unit", lambda private, stream: np.arange(len(private._labels))
    )
    assert not unit_counts_once()
