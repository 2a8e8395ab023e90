"""Mechanisms: exact sums and their sensitivity, noise, order of work, refusals before anything is spent."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import DiscreteLaplaceDpEvent, GaussianDpEvent
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError, LedgerError
from sfumato.privacy import mechanisms
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.randomness import LATTICE, SecureStream

NO_NOISE = 1e-9
"""A noise multiplier so small that what comes out is the exact sum (for tests of the sum only)."""


def protected(
    labels: Any, units: Any = None, *, size: int = 4, names: int = 3, seed: int = 0, images: Any = None
) -> Any:
    labels = np.asarray(labels, dtype=np.int64)
    if images is None:
        images = np.random.default_rng(seed).integers(0, 256, (len(labels), size, size, 1), dtype=np.uint8)
    units = [np.array([row]) for row in range(len(labels))] if units is None else [np.array(u) for u in units]
    return SimpleNamespace(
        _images=images, _labels=labels, _units=units, label_names=tuple(f"label {i}" for i in range(names))
    )


class Recorder:
    """A reservation that allows everything and remembers what began."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        self.calls.append((mechanism, event))


class Refusing(Recorder):
    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        raise LedgerError("not reserved")


def brightness(images: np.ndarray) -> np.ndarray:
    """A public classifier of 6 classes, each image by itself."""
    flat = images.reshape(len(images), -1).astype(float)
    return flat[:, :6]


def run_all(private: Any, reservation: Any, noise: float = 2.0) -> list[tuple[Any, Any]]:
    return [
        mechanisms.count(private, 0.5, reservation),
        mechanisms.label_histogram(private, noise, reservation),
        mechanisms.semantic_histogram(private, brightness, 6, 2, noise, reservation),
        mechanisms.mean_images(private, 2, 1.0, noise, 10, reservation),
    ]


def test_each_begins_its_event_and_returns_it():
    recorder = Recorder()
    results = run_all(protected([0, 1, 2, 1]), recorder)
    assert [event for _, event in results] == [event for _, event in recorder.calls]
    assert recorder.calls == [
        ("count", DiscreteLaplaceDpEvent(0.5, 1)),
        ("label_histogram", GaussianDpEvent(2.0)),
        ("semantic_histogram", GaussianDpEvent(2.0)),
        ("mean_images", GaussianDpEvent(2.0)),
    ]
    assert [event for _, event in recorder.calls] == [
        mechanisms.count_event(0.5),
        mechanisms.label_histogram_event(2.0),
        mechanisms.semantic_histogram_event(2.0),
        mechanisms.mean_images_event(2.0),
    ]
    assert isinstance(results[0][0], int)
    assert results[1][0].shape == (3,) and results[1][0].dtype == np.int64
    assert results[2][0].shape == (3, 6) and results[2][0].dtype == np.int64
    means = results[3][0]
    assert means.shape == (3, 2, 4, 4, 1) and means.dtype == np.float32 and np.abs(means).max() <= 1


@pytest.mark.parametrize("index", range(4))
def test_noise_is_drawn_only_after_begin_and_a_refusal_releases_nothing(monkeypatch, index):
    order = []
    for name in ("discrete_gaussian", "discrete_laplace"):
        real = getattr(mechanisms, name)
        monkeypatch.setattr(mechanisms, name, lambda *a, real=real: (order.append("noise"), real(*a))[1])
    real_gaussian = SecureStream.gaussian
    monkeypatch.setattr(
        SecureStream, "gaussian", lambda self, shape: (order.append("noise"), real_gaussian(self, shape))[1]
    )
    run = [
        lambda r: mechanisms.count(protected([0]), 0.5, r),
        lambda r: mechanisms.label_histogram(protected([0]), 2.0, r),
        lambda r: mechanisms.semantic_histogram(protected([0]), brightness, 6, 2, 2.0, r),
        lambda r: mechanisms.mean_images(protected([0]), 1, 1.0, 2.0, 5, r),
    ][index]

    class Ordered(Recorder):
        def begin(self, *args: Any) -> None:
            order.append("begin")

    run(Ordered())
    assert order == ["begin", "noise"]
    order.clear()
    with pytest.raises(LedgerError):
        run(Refusing())
    assert order == []


def test_against_a_real_ledger_another_event_is_refused(tmp_path):
    ledger = Ledger.open(tmp_path / "x.db", total=Budget(8, 1e-5))
    plan = [PlannedEvent(mechanisms.LABEL_HISTOGRAM, "labels", mechanisms.label_histogram_event(5.0))]
    reservation = ledger.reserve("labels", plan, delta=1e-6)
    with pytest.raises(LedgerError, match="not what was reserved"):
        mechanisms.label_histogram(protected([0, 1]), 4.0, reservation)
    assert reservation.begun("label_histogram") == 0
    mechanisms.label_histogram(protected([0, 1]), 5.0, reservation)
    with pytest.raises(LedgerError, match="1 of 1"):
        mechanisms.label_histogram(protected([0, 1]), 5.0, reservation)


# --- the exact sums, seen through negligible noise


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=20))
def test_label_histogram_counts_labels(labels):
    value, _ = mechanisms.label_histogram(protected(labels), NO_NOISE, Recorder())  # type: ignore[arg-type]
    assert value.tolist() == np.bincount(np.array(labels, dtype=int), minlength=3).tolist()


def exact_semantic(private: Any, top_k: int, batch_size: int = 512) -> np.ndarray:
    return mechanisms.semantic_histogram(private, brightness, 6, top_k, NO_NOISE, Recorder(), batch_size)[0]  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 12), st.integers(0, 10**6), st.data())
def test_one_image_changes_top_k_cells_by_one(top_k, others, seed, data):
    labels = data.draw(st.lists(st.integers(0, 2), min_size=others + 1, max_size=others + 1))
    whole = protected(labels, seed=seed)
    less = protected(labels[:-1], images=whole._images[:-1])
    change = exact_semantic(whole, top_k) - exact_semantic(less, top_k)
    assert sorted(change.ravel())[-top_k:] == [1] * top_k and np.abs(change).sum() == top_k
    assert set(np.nonzero(change)[0]) == {labels[-1]}
    assert exact_semantic(whole, top_k).sum() == top_k * (others + 1)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_is_a_speed_knob(batch_size):
    private = protected([0, 1, 2, 1, 0, 2, 2])
    assert (exact_semantic(private, 3, batch_size) == exact_semantic(private, 3)).all()


def test_ties_never_count_a_class_twice():
    private = protected([1, 1], images=np.zeros((2, 4, 4, 1), dtype=np.uint8))
    assert exact_semantic(private, 3).tolist() == [[0] * 6, [2, 2, 2, 0, 0, 0], [0] * 6]


def test_a_unit_of_several_images_counts_once_and_each_image_has_the_same_chance():
    private = protected([0, 1, 1, 2, 0], units=[[0, 1, 2], [3], [4]])
    seen = np.zeros(3)
    rounds = 2000
    for _ in range(rounds):
        rows = mechanisms._one_row_per_unit(private, SecureStream())
        assert rows[1:].tolist() == [3, 4]
        seen[rows[0]] += 1
    assert np.abs(seen / rounds - 1 / 3).max() < 7 * math.sqrt(2 / 9 / rounds)
    value, _ = mechanisms.label_histogram(private, NO_NOISE, Recorder())  # type: ignore[arg-type]
    assert value.sum() == 3 and value[2] == 1
    assert exact_semantic(private, 2).sum() == 6
    samples = [mechanisms.count(private, 5.0, Recorder())[0] for _ in range(200)]  # type: ignore[arg-type]
    assert abs(np.mean(samples) - 3) < 0.5  # units, not images


def exact_sums(private: Any, per_label: int, clip_norm: float, center: float = 0.0) -> np.ndarray:
    labels, pixels = len(private.label_names), private._images[0].size
    sums = np.zeros((labels, per_label, pixels))
    for part in mechanisms._in_parts(private._units):
        mechanisms._add_clipped(
            sums, private, part, np.full((labels, pixels), center), clip_norm, SecureStream()
        )
    return sums


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.floats(0.1, 20), st.integers(1, 4), st.floats(-1, 1), st.integers(0, 10**6))
def test_one_unit_adds_at_most_the_clip_norm_to_the_means(per_label, clip_norm, rows, center, seed):
    labels = np.random.default_rng(seed).integers(0, 3, rows)
    sums = exact_sums(protected(labels, units=[range(rows)], seed=seed), per_label, clip_norm, center)
    assert np.linalg.norm(sums) <= clip_norm
    assert (np.abs(sums).sum(axis=(0, 2)) > 0).sum() <= 1  # one group only


def test_means_by_hand():
    images = np.random.default_rng(1).integers(0, 256, (3, 2, 2, 1), dtype=np.uint8)
    private = protected([0, 1, 1], units=[[0, 1], [2]], images=images)
    x = images.reshape(3, 4) / 127.5 - 1
    first = np.stack([x[0] / 2, x[1] / 2, 0 * x[0]])  # the average over the unit's images, label by label
    second = np.stack([0 * x[0], x[2], 0 * x[0]])
    wanted = sum(v * min(1, 0.7 / np.linalg.norm(v)) for v in (first, second))
    assert exact_sums(private, 1, 0.7)[:, 0] == pytest.approx(wanted, abs=1e-8)
    value, _ = mechanisms.mean_images(private, 1, 0.7, NO_NOISE, 30, Recorder())  # type: ignore[arg-type]
    assert value.reshape(3, 4) == pytest.approx(wanted / (30 / 3), abs=1e-6)


def test_unclipped_means_with_the_right_divisor_are_the_means():
    labels = np.repeat([0, 1, 2], 50)
    private = protected(labels, seed=3)
    counts = np.array([50, 50, 50])
    value, _ = mechanisms.mean_images(
        private,
        1,
        100.0,
        NO_NOISE,
        1,
        Recorder(),
        center=-1.0,
        label_counts=counts,  # type: ignore[arg-type]
    )
    wanted = [private._images[labels == label].mean(axis=0) / 127.5 - 1 for label in range(3)]
    assert value[:, 0] == pytest.approx(np.array(wanted), abs=1e-5)


def test_the_divisor_does_not_depend_on_the_data():
    one, many = protected([0]), protected([0] * 500, images=np.repeat(protected([0])._images, 500, axis=0))
    small, _ = mechanisms.mean_images(one, 1, 0.01, NO_NOISE, 300, Recorder())  # type: ignore[arg-type]
    large, _ = mechanisms.mean_images(many, 1, 0.01, NO_NOISE, 300, Recorder())  # type: ignore[arg-type]
    assert large == pytest.approx(small * 500, rel=1e-3, abs=1e-8)


def test_parts_do_not_change_the_sum(monkeypatch):
    private = protected(np.arange(50) % 3, units=[range(i, i + 5) for i in range(0, 50, 5)])
    whole = exact_sums(private, 1, 2.0)
    monkeypatch.setattr(mechanisms, "_ROWS_AT_ONCE", 7)
    assert exact_sums(private, 1, 2.0) == pytest.approx(whole, rel=1e-12, abs=1e-12)


def test_no_units_at_all_still_gets_noise():
    results = run_all(protected([], names=3), Recorder(), noise=30.0)
    assert results[0][0] >= 1
    assert np.any(results[1][0] != 0) and np.any(results[2][0] != 0) and np.any(results[3][0] != 0)


# --- the noise


def test_noise_of_the_histograms_has_the_stated_size():
    private, n = protected([0, 1, 2, 1], names=2000), 12_000
    noise = mechanisms.semantic_histogram(private, brightness, 6, 4, 5.0, Recorder())[0].ravel()  # type: ignore[arg-type]
    scale = 5.0 * math.sqrt(4)
    assert abs(noise.std() / scale - 1) < 7 / math.sqrt(2 * n)
    assert abs(noise.mean()) < 7 * scale / math.sqrt(n) + 0.01
    labels = mechanisms.label_histogram(private, 5.0, Recorder())[0]  # type: ignore[arg-type]
    assert abs(labels.std() / 5 - 1) < 7 / math.sqrt(2 * 2000) + 0.01


def test_noise_of_the_means_has_the_stated_size_whatever_the_group_count():
    private = protected([0, 1], names=2, size=40)
    for groups in (1, 3):
        value, _ = mechanisms.mean_images(private, groups, 0.5, 4.0, 2 * 100 * groups, Recorder())  # type: ignore[arg-type]
        assert abs(value.std() / (4.0 * 0.5 / 100) - 1) < 7 / math.sqrt(2 * value.size) + 0.01


def test_count_noise_has_the_stated_size():
    private = protected([0] * 1000)
    noise = np.array([mechanisms.count(private, 0.25, Recorder())[0] - 1000 for _ in range(4000)])  # type: ignore[arg-type]
    b = 0.25
    variance = 2 * math.exp(-b) / (1 - math.exp(-b)) ** 2
    assert abs(noise.var() / variance - 1) < 8 * math.sqrt(5 / 4000)
    assert abs(noise.mean()) < 7 * math.sqrt(variance / 4000)


@settings(max_examples=200)
@given(st.floats(1e-3, 1e3), st.integers(1, 100))
def test_scales_are_never_rounded_down(noise, top_k):
    from fractions import Fraction

    scale = mechanisms._at_least(noise, noise * math.sqrt(top_k), Fraction(1, top_k), power=2)
    assert Fraction(scale) ** 2 >= Fraction(noise) ** 2 * top_k
    assert scale <= noise * math.sqrt(top_k) * (1 + 1e-14)
    scale = mechanisms._at_least(1.0, 1 / noise, Fraction(noise))
    assert Fraction(scale) * Fraction(noise) >= 1


@pytest.mark.parametrize("noise, top_k", [(1.0, 5), (5.0, 2), (3.0, 1)])
def test_the_discrete_gaussian_costs_what_its_certificate_states(noise, top_k):
    """k cells each change by 1 under discrete noise of scale noise * sqrt(k): k-fold, sensitivity 1 each."""
    grid = 2e-5
    one = privacy_loss_distribution.from_discrete_gaussian_mechanism(
        noise * math.sqrt(top_k) * LATTICE, sensitivity=LATTICE, value_discretization_interval=grid
    )
    discrete = one.self_compose(top_k).get_epsilon_for_delta(1e-5)
    assert discrete == pytest.approx(
        epsilon_of([GaussianDpEvent(noise)], 1e-5), abs=(top_k + 1) * grid + 1e-4
    )


# --- what is refused before anything is spent


@pytest.mark.parametrize(
    "classify",
    [
        lambda images: np.zeros((len(images), 5)),
        lambda images: np.zeros((len(images) - 1, 6)),
        lambda images: np.zeros((len(images), 6, 1)),
        lambda images: np.full((len(images), 6), np.nan),
        lambda images: np.where(np.arange(6) == 3, np.nan, brightness(images)),
    ],
)
def test_scores_that_make_no_sense(classify):
    recorder = Recorder()
    with pytest.raises(InputError, match="no budget was spent"):
        mechanisms.semantic_histogram(protected([0, 1]), classify, 6, 2, 2.0, recorder)  # type: ignore[arg-type]
    assert recorder.calls == []


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_parameters_without_meaning(value):
    private, recorder = protected([0, 1]), Recorder()
    for run in (
        lambda: mechanisms.count(private, value, recorder),  # type: ignore[arg-type]
        lambda: mechanisms.label_histogram(private, value, recorder),  # type: ignore[arg-type]
        lambda: mechanisms.semantic_histogram(private, brightness, 6, 2, value, recorder),  # type: ignore[arg-type]
        lambda: mechanisms.mean_images(private, 1, 1.0, value, 10, recorder),  # type: ignore[arg-type]
        lambda: mechanisms.mean_images(private, 1, value, 1.0, 10, recorder),  # type: ignore[arg-type]
        lambda: mechanisms.mean_images(private, 1, 1.0, 1.0, value, recorder),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match="no budget was spent"):
            run()
    for top_k in (0, 7):
        with pytest.raises(InputError):
            mechanisms.semantic_histogram(private, brightness, 6, top_k, 1.0, recorder)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        mechanisms.mean_images(private, 0, 1.0, 1.0, 10, recorder)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        mechanisms.mean_images(private, 1, 1.0, 1.0, 10, recorder, label_counts=np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(InputError):
        mechanisms.mean_images(private, 1, 1.0, 1.0, 10, recorder, center=math.nan)  # type: ignore[arg-type]
    assert recorder.calls == []
