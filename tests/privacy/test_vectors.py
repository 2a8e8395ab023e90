"""Noisy means of vectors and the vote for the nearest candidate: exact sums, noise, guarantee, silence, refusals."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import DiscreteLaplaceDpEvent, GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import chi2, norm

from sfumato.errors import InputError, LedgerError
from sfumato.privacy import vectors
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.events import event_from_json, event_to_json
from sfumato.privacy.vectors import MeanPlan, check_embed, nearest_candidate, vector_mean

ALARM = 1e-7
STEPS = 1 << 20
"""Lattice steps in one clip norm."""


def protected(kinds: Any, units: Any = None) -> Any:
    """Images whose first pixel is their kind, in units of one each unless told."""
    kinds = np.asarray(kinds, dtype=np.uint8)
    images = np.zeros((len(kinds), 2, 2, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = kinds
    units = [[row] for row in range(len(kinds))] if units is None else units
    return SimpleNamespace(_images=images, _units=[np.array(unit, dtype=np.int64) for unit in units])


@dataclass
class Table:
    """An embedding that gives an image of kind k row k of a table, and remembers what it was given."""

    rows: Any
    batch_size: int = 3
    seen: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = np.atleast_2d(np.asarray(self.rows, dtype=np.float64))
        self.dimension = rows.shape[1]
        self._rows = rows[np.arange(256) % len(rows)]

    def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
        if steps is not None:  # the self-test's random images: something of their own
            return np.repeat(images.reshape(len(images), -1).mean(1, keepdims=True), self.dimension, axis=1)
        self.seen.append(images.copy())
        return self._rows[images[:, 0, 0, 0]]


class Recorder:
    """A reservation that allows everything and remembers what began."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        self.calls.append((mechanism, event))


ALLOWING: Any = Recorder()


def plan(dimension: int = 3, **changes: Any) -> MeanPlan:
    chosen: Any = {"center": np.zeros(dimension), "clip_norm": 1.0, "noise_multiplier": 2.0, "divisor": 10.0}
    return MeanPlan(**(chosen | changes))


def frame(dimension: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dimension, columns)))[0]


def mean(private: Any, embed: Any, chosen: MeanPlan) -> np.ndarray:
    return vector_mean(private, embed, chosen, ALLOWING)[0]


def before_noise(private: Any, embed: Any, chosen: MeanPlan) -> tuple[list[int], float]:
    """The exact sum in lattice steps and the scale of its noise, seen where the noise would be added."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "discrete_gaussian", lambda *given: (seen.append(given), given[0])[1])
        mean(private, embed, chosen)
    ((total, scale),) = seen
    return total.tolist(), scale


def lattice_sum(private: Any, embed: Any, chosen: MeanPlan) -> list[int]:
    return before_noise(private, embed, chosen)[0]


def on_lattice(residual: Any, chosen: MeanPlan) -> list[int]:
    with np.errstate(all="ignore"):
        return vectors._on_lattice(np.asarray(residual, dtype=np.float64), chosen).tolist()


# --- the noise, its event and what the event costs


@pytest.mark.parametrize("basis", [None, frame(5, 3)])
def test_noise_has_the_stated_size_in_every_direction_and_none_knows_another(basis):
    chosen = plan(center=np.arange(5.0), basis=basis, clip_norm=0.7, noise_multiplier=3.0, divisor=40.0)
    assert chosen.noise == pytest.approx(3.0 * 0.7 / 40) and chosen.dimension == (5 if basis is None else 3)
    n, embed = 700, Table(np.arange(5.0))
    drawn = np.array([mean(protected([]), embed, chosen) for _ in range(n)]) - chosen.center
    along = drawn if basis is None else drawn @ basis
    assert basis is None or np.allclose(along @ basis.T, drawn, atol=1e-12)  # in the span, nowhere else
    spread = along.var(axis=0, ddof=1) * (n - 1) / chosen.noise**2
    assert (chi2.ppf(ALARM, n - 1) < spread).all() and (spread < chi2.isf(ALARM, n - 1)).all()
    assert np.abs(along.mean(axis=0)).max() < 6 * chosen.noise / math.sqrt(n)
    assert np.abs(np.corrcoef(along.T) - np.eye(chosen.dimension)).max() < 6 / math.sqrt(n)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(0.5, 1e6))
def test_noise_is_scaled_exactly_to_the_sums_sensitivity(noise, clip_norm, divisor):
    chosen = plan(1, clip_norm=clip_norm, noise_multiplier=noise, divisor=divisor)
    assert Fraction(before_noise(protected([0]), Table([1.0]), chosen)[1]) == Fraction(noise) * STEPS


@pytest.mark.parametrize("noise", [0.8, 2.0, 30.0])
def test_the_event_costs_what_the_gaussian_mechanism_costs(noise):
    """Balle and Wang, arXiv 1805.06530, theorem 8: the exact delta of a Gaussian at an epsilon."""

    def delta(epsilon: float) -> float:
        at, reach = 1 / (2 * noise), epsilon * noise
        return float(norm.cdf(at - reach) - math.exp(epsilon) * norm.cdf(-at - reach))

    closed = brentq(lambda epsilon: delta(epsilon) - 1e-5, 0, 50)
    assert closed <= epsilon_of([plan(noise_multiplier=noise).event], 1e-5) <= closed + 5e-4


def test_a_sample_of_the_units_costs_what_the_sampled_gaussian_costs():
    other = privacy_loss_distribution.from_gaussian_mechanism(2.0, sampling_prob=0.1)
    sampled = epsilon_of([plan(sampling_probability=0.1).event], 1e-5)
    assert sampled == pytest.approx(other.get_epsilon_for_delta(1e-5), abs=5e-4)


def test_the_discrete_gaussian_costs_what_its_certificate_states():
    """A unit moves each of k directions by R / sqrt(k). The lattice here is coarser than the true one, of 2^20
    steps and 1024 steps of noise in each, and already agrees to within the accounting's own rounding."""
    noise, directions, lattice, grid = 2.0, 16, 1 << 12, 2e-5
    one = privacy_loss_distribution.from_discrete_gaussian_mechanism(
        noise * math.sqrt(directions) * lattice, sensitivity=lattice, value_discretization_interval=grid
    )
    discrete = one.self_compose(directions).get_epsilon_for_delta(1e-5)
    stated = epsilon_of([plan(noise_multiplier=noise).event], 1e-5)
    assert discrete == pytest.approx(stated, abs=(directions + 1) * grid + 1e-4)


def test_delta_of_the_discrete_gaussian_by_summation_in_one_direction():
    noise, steps = 1.0, 1 << 17
    x = np.arange(-9 * steps, 10 * steps)
    with_it = np.exp(-(((x - steps) / steps) ** 2) / (2 * noise**2))
    without = np.exp(-((x / steps) ** 2) / (2 * noise**2))
    for epsilon in (0.5, 2.0, 4.377):
        delta = np.maximum(with_it - math.exp(epsilon) * without, 0).sum() / without.sum()
        stated = norm.cdf(0.5 - epsilon) - math.exp(epsilon) * norm.cdf(-0.5 - epsilon)
        assert delta == pytest.approx(stated, rel=1e-7)


def test_events_say_what_is_done_and_are_what_begins():
    recorder: Any = Recorder()
    embed, sampled = Table([1.0, 0.0]), PoissonSampledDpEvent(0.25, GaussianDpEvent(2.0))
    for chosen, event in ((plan(2), GaussianDpEvent(2.0)), (plan(2, sampling_probability=0.25), sampled)):
        assert vector_mean(protected([0]), embed, chosen, recorder)[1] == event == chosen.event
        assert event_from_json(event_to_json(event)) == event
    position, event = nearest_candidate(protected([0]), embed, 2, 0.5, recorder)
    assert type(position) is int and event == DiscreteLaplaceDpEvent(0.5, 1) and epsilon_of([event], 0) == 0.5
    assert recorder.calls == [
        ("vector_mean", GaussianDpEvent(2.0)), ("vector_mean", sampled), ("nearest_candidate", event),
    ]  # fmt: skip


# --- the sum: nothing longer than the clip norm, and nobody counted for more than one


anything = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.one_of(st.floats(1e-3, 1e3), st.floats(1e-307, 1e307), st.sampled_from([5e-324, 1e-320, 1.7e308]))


@settings(max_examples=300, deadline=None)
@given(st.lists(anything, min_size=1, max_size=6), sizes, st.booleans(), st.data())
def test_no_finite_vector_is_ever_longer_than_the_clip_norm(residual, clip_norm, normalise, data):
    columns = data.draw(st.integers(0, len(residual)))
    basis = frame(len(residual), columns, seed=columns) if columns else None
    chosen = plan(len(residual), clip_norm=clip_norm, normalise=normalise, basis=basis)
    steps = on_lattice(residual, chosen)
    assert sum(step**2 for step in steps) <= STEPS**2 and len(steps) == chosen.dimension


EDGES = [1.7e308, 1e200, 1e154, 1.0, 1e-150, 1e-154, 1e-160, 1e-162, 1e-308, 5e-324, 0.0]
TURNS = [1, 0, 0], [1, -1, 1], [1, 1e-9, -1]


@pytest.mark.parametrize("normalise", [False, True])
def test_huge_tiny_and_subnormal_vectors(normalise):
    for size, turn, clip_norm in itertools.product(EDGES, TURNS, (1e-300, 1e-9, 1, 1e300)):
        steps = on_lattice(size * np.array(turn), plan(clip_norm=clip_norm, normalise=normalise))
        assert sum(step**2 for step in steps) <= STEPS**2


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.booleans(), st.integers(0, 10**6))
def test_the_lattice_holds_the_clipped_vector(dimension, size, clip_norm, normalise, seed):
    residual = size * np.random.default_rng(seed).normal(size=dimension)
    basis = frame(dimension, (dimension + 1) // 2, seed)
    along = basis.T @ residual
    factor = clip_norm / np.linalg.norm(along)
    wanted = along * (factor if normalise else min(1.0, factor)) * STEPS / clip_norm
    chosen = plan(dimension, clip_norm=clip_norm, basis=basis, normalise=normalise)
    steps = np.array(on_lattice(residual, chosen))
    assert np.abs(steps - wanted).max() < 1.01
    assert (np.abs(steps) <= np.abs(wanted) + 1e-6).all()  # towards zero
    assert math.isclose(np.linalg.norm(steps), np.linalg.norm(wanted), abs_tol=1 + math.sqrt(dimension))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_unit_more_or_less_moves_the_sum_by_at_most_the_clip_norm(data):
    dimension = data.draw(st.integers(1, 4))
    row = st.lists(anything, min_size=dimension, max_size=dimension)
    rows = data.draw(st.lists(row, min_size=1, max_size=8))
    cut = sorted(data.draw(st.sets(st.integers(1, len(rows)))) | {0, len(rows)})
    units = [list(range(start, end)) for start, end in itertools.pairwise(cut)]
    gone = data.draw(st.integers(0, len(units) - 1))
    chosen = plan(
        dimension, clip_norm=data.draw(st.floats(1e-3, 1e3)), normalise=data.draw(st.booleans()),
        center=np.array(data.draw(st.lists(st.floats(-9, 9), min_size=dimension, max_size=dimension))),
    )  # fmt: skip
    embed, kinds = Table(rows, batch_size=data.draw(st.integers(1, 5))), range(len(rows))
    whole = lattice_sum(protected(kinds, units), embed, chosen)
    less = lattice_sum(protected(kinds, units[:gone] + units[gone + 1 :]), embed, chosen)
    alone = lattice_sum(protected(kinds, [units[gone]]), embed, chosen)
    assert [a - b for a, b in zip(whole, less, strict=True)] == alone
    assert sum(step**2 for step in alone) <= STEPS**2


def test_the_images_of_a_unit_are_averaged_before_they_are_clipped():
    rows = [[4.0, 0.0], [-4.0, 0.6], [0.0, 0.0], [0.2, 0.2]]
    private = protected([0, 1, 2, 3], [[0, 1, 2], [], [3]])
    steps = np.array(lattice_sum(private, Table(rows, batch_size=2), plan(2)))
    assert np.abs(steps - np.array([0.0 + 0.2, 0.2 + 0.2]) * STEPS).max() <= 2
    same = lattice_sum(protected([0] * 30, [list(range(30))]), Table([[9.0, 0.0]]), plan(2))
    assert same == lattice_sum(protected([0]), Table([[9.0, 0.0]]), plan(2))


def test_the_mean_by_hand():
    basis, center = frame(4, 2), np.array([1.0, -2.0, 0.5, 3.0])
    rows = np.random.default_rng(1).normal(size=(3, 4))
    chosen = plan(center=center, basis=basis, clip_norm=1.2, noise_multiplier=1e-9, divisor=5.0)
    along = (rows - center) @ basis
    clipped = along * np.minimum(1, 1.2 / np.linalg.norm(along, axis=1))[:, None]
    value = mean(protected([0, 1, 2]), Table(rows), chosen)
    assert value == pytest.approx(center + basis @ clipped.sum(0) / 5, abs=1e-5) and value.dtype == np.float64
    published = replace(chosen, normalise=True, clip_norm=1.0, center=np.zeros(4), basis=None)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert mean(protected([0, 1, 2]), Table(rows), published) == pytest.approx(unit.sum(0) / 5, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 50])
def test_batches_are_padded_and_their_size_is_a_speed_knob(batch_size):
    rows = np.random.default_rng(2).normal(size=(9, 3))
    private = protected(range(1, 8), [[0, 1], [2], [3, 4, 5], [6]])
    embed = Table(rows, batch_size)
    assert lattice_sum(private, embed, plan()) == lattice_sum(private, Table(rows), plan())
    assert {images.shape for images in embed.seen} == {(batch_size, 2, 2, 1)}
    given_rows = np.concatenate(embed.seen)[:, 0, 0, 0].tolist()
    assert given_rows == [1, 2, 3, 4, 5, 6, 7] + [0] * (-7 % batch_size)
    assert vote_counts(private, embed, batch_size).sum() == 4
    assert vote_counts(protected([]), embed, batch_size).sum() == 0


def test_each_unit_takes_part_with_the_stated_chance_and_with_all_its_images():
    kinds = np.arange(120)
    private, q = protected(kinds, [[0, 1, 2], *[[row] for row in range(3, 120)]]), 0.3
    embed = Table(np.eye(120)[np.array([0, 0, 0, *range(3, 120)])], batch_size=120)
    rounds = 120
    member = np.array([lattice_sum(private, embed, plan(120, sampling_probability=q)) for _ in range(rounds)])
    assert set(np.unique(member)) == {0, STEPS - 1}  # all of a unit or nothing
    here = np.delete(member > 0, [1, 2], axis=1)
    n = here.shape[1]
    for seen, count in ((here.sum(axis=1), n), (here.sum(axis=0), rounds)):  # by round, by unit
        statistic = ((seen - count * q) ** 2 / (count * q * (1 - q))).sum()
        assert chi2.ppf(ALARM, len(seen)) < statistic < chi2.isf(ALARM, len(seen))


# --- what cannot be embedded counts as the centre, and nobody is told


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308, -1.7e308, 1e160])
def test_an_image_without_a_vector_counts_as_the_centre_and_says_nothing(bad, capfd, caplog):
    rows = [[0.5, 0.0], [bad, 0.1], [bad, bad]]
    center = np.array([-1e308, 0.0]) if bad == 1e308 else np.zeros(2)
    chosen = plan(2, center=center, basis=np.eye(2))
    alone = lattice_sum(protected([0]), Table(rows), chosen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for units in ([[0], [1]], [[0], [1], [2]], [[0], [1, 2]]):
            assert lattice_sum(protected([0, 1, 2], units), Table(rows), chosen) == alone
            assert vote_counts(protected([0, 1, 2], units), Table(rows)).sum() <= len(units)
    assert caught == [] and capfd.readouterr() == ("", "") and not caplog.records


def test_in_a_unit_only_the_image_without_a_vector_counts_as_the_centre():
    rows = [[0.5, 0.0], [math.nan, 0.0]]
    assert lattice_sum(protected([0, 1], [[0, 1]]), Table(rows), plan(2)) == [STEPS // 4, 0]


def test_without_units_there_is_noise_about_the_centre():
    center = np.array([5.0, -3.0])
    assert lattice_sum(protected([]), Table([1.0, 1.0]), plan(2, center=center)) == [0, 0]
    value = mean(protected([], [[], []]), Table([1.0, 1.0]), plan(2, center=center))
    assert (value != center).all() and np.abs(value - center).max() < 9 * 2.0 / 10


# --- the vote


def odds(counts: Any, epsilon: float) -> np.ndarray:
    """Exact distribution of permute-and-flip (McKenna and Sheldon, arXiv 2010.12603, proposition 5)."""
    accept = np.exp(epsilon * (np.asarray(counts, dtype=float) - max(counts)))
    out = np.zeros(len(accept))
    for order in itertools.permutations(range(len(accept))):
        left = 1.0
        for candidate in order:
            out[candidate] += left * accept[candidate]
            left *= 1 - accept[candidate]
    return out / math.factorial(len(accept))


def vote_counts(private: Any, scores: Any, batch_size: int = 2) -> np.ndarray:
    """The exact counts, seen where the noise would be added."""
    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_noisy_max", lambda exact, scale: (seen.append(exact.copy()), 0)[1])
        nearest_candidate(private, scores, scores.dimension, 1.0, ALLOWING, batch_size)
    return seen[0]


@pytest.mark.parametrize(("kinds", "epsilon"), [([0, 1, 1, 2], 0.3), ([1, 1, 1, 0], 1.1), ([], 0.5)])
def test_the_choice_has_exactly_the_distribution_of_permute_and_flip(kinds, epsilon):
    def statistic(expected: np.ndarray) -> float:
        wanted = expected * len(drawn)
        return float(((np.bincount(drawn, minlength=3) - wanted) ** 2 / wanted).sum())

    private, scores = protected(kinds), Table(np.eye(3))
    drawn = [nearest_candidate(private, scores, 3, epsilon, ALLOWING, 4)[0] for _ in range(1000)]
    counts = np.bincount(np.array(kinds, dtype=int), minlength=3)
    assert statistic(odds(counts, epsilon)) < chi2.isf(ALARM, 2)
    assert not kinds or statistic(odds(counts, 4 * epsilon)) > chi2.isf(ALARM, 2)


def test_each_unit_has_one_vote_by_an_image_drawn_at_random():
    private, scores = protected([0, 0, 1, 2, 1], [[0, 1, 2], [3], [], [4]]), Table(np.eye(3))
    seen = np.array([vote_counts(private, scores) for _ in range(300)])
    assert (seen.sum(axis=1) == 3).all() and (seen[:, 2] == 1).all() and set(seen[:, 0]) == {0, 1}
    assert abs(seen[:, 0].mean() - 2 / 3) < 6 * math.sqrt(2 / 9 / 300)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_one_unit_raises_at_most_one_count_by_one(rows, data):
    gone = data.draw(st.integers(0, len(rows) - 1))
    kinds = np.arange(len(rows))
    less = vote_counts(protected(np.delete(kinds, gone)), Table(rows))
    change = vote_counts(protected(kinds), Table(rows)) - less
    wanted = [0, 0, 0]
    if np.isfinite(rows[gone]).all():
        wanted[int(np.argmax(rows[gone]))] = 1  # ties go to the first
    assert change.tolist() == wanted


# --- charged before the noise, on a ledger


@pytest.mark.parametrize("q", [1.0, 0.5, None])
def test_noise_comes_after_begin_and_a_refusal_releases_nothing(monkeypatch, q):
    order: list[str] = []
    for name in ("discrete_gaussian", "_noisy_max"):
        real = getattr(vectors, name)
        monkeypatch.setattr(vectors, name, lambda *a, real=real: (order.append("noise"), real(*a))[1])

    class Ordered(Recorder):
        def begin(self, *_: Any) -> None:
            order.append("begin")

    class Refusing(Recorder):
        def begin(self, *_: Any) -> None:
            raise LedgerError("not reserved")

    def run(reservation: Any) -> Any:
        private, embed = protected([0, 1]), Table(np.eye(3))
        if q is None:
            return nearest_candidate(private, embed, 3, 1.0, reservation)
        return vector_mean(private, embed, plan(sampling_probability=q), reservation)

    run(Ordered())
    assert order == ["begin", "noise"]
    with pytest.raises(LedgerError):
        run(Refusing())
    assert order == ["begin", "noise"]


# --- what is refused before anything is spent


def refused(run: Any) -> str:
    recorder = Recorder()
    with pytest.raises(InputError, match="no budget was spent") as caught:
        run(recorder)
    assert recorder.calls == [] and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["clip_norm", "noise_multiplier", "divisor", "sampling_probability"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_parameters_without_meaning(name, value):
    refused(lambda _: plan(**{name: value}))


def test_plans_without_meaning():
    refused(lambda _: plan(sampling_probability=1.001))
    for center in (np.zeros((3, 1)), np.array(0.0), np.array([0.0, math.nan]), np.array([0.0, math.inf])):
        assert "center" in refused(lambda _, center=center: plan(center=center))
    tilted = np.array([[1.0, 0.6], [0.0, 0.8], [0.0, 0.0]])
    unfit = [np.eye(4)[:, :2], np.eye(3)[:2], np.eye(3)[0], np.eye(3)[:, :0], np.full((3, 2), math.nan)]
    for basis in (*unfit, 2 * np.eye(3), tilted):
        assert "orthonormal" in refused(lambda _, basis=basis: plan(basis=basis))


SHAPES = [lambda n: (n, 2), lambda n: (n + 1, 3), lambda n: (1, 3), lambda n: (n,), lambda n: ()]


@pytest.mark.parametrize("when", ["always", "with all steps"])
@pytest.mark.parametrize("bad", SHAPES)
def test_vectors_of_another_shape(bad, when):
    class Bad(Table):
        def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
            right = when != "always" and steps is not None
            return np.zeros((len(images), 3) if right else bad(len(images)))

    refused(lambda recorder: vector_mean(protected([0, 1]), Bad(np.eye(3)), plan(), recorder))


def test_dimensions_and_batches_that_do_not_fit():
    private, scores = protected([0, 1]), Table(np.eye(3))
    assert "4 numbers" in refused(lambda r: vector_mean(private, Table(np.eye(4)), plan(), r))
    for size in (0, -1):
        assert "batch" in refused(lambda r, n=size: vector_mean(private, Table(np.eye(3), n), plan(), r))
        assert "batch" in refused(lambda r, n=size: nearest_candidate(private, scores, 3, 1.0, r, n))


@pytest.mark.parametrize("bad", SHAPES)
def test_scores_of_another_shape(bad):
    def scores(images: np.ndarray) -> np.ndarray:
        return np.zeros(bad(len(images)))

    assert "3 numbers" in refused(lambda r: nearest_candidate(protected([0, 1]), scores, 3, 1.0, r))


@pytest.mark.parametrize(
    ("count", "epsilon"), [(1, 1.0), (0, 1.0), (3, 0.0), (3, -1.0), (3, math.nan), (3, math.inf)]
)
def test_votes_without_meaning(count, epsilon):
    refused(lambda r: nearest_candidate(protected([0, 1]), Table(np.eye(3)), count, epsilon, r))


# --- each image by itself


ROWS = np.random.default_rng(3).normal(size=(256, 4))
DICE = np.random.default_rng(4)
BUFFER = np.zeros((1, 4))


def own(images: np.ndarray) -> np.ndarray:
    return ROWS[images[:, 0, 0, 0]]


def shared_buffer(images: np.ndarray) -> np.ndarray:
    BUFFER[:] = own(images)[:1] + DICE.normal()
    return BUFFER


# name -> (what the embedding does, its batch size)
MIXING: dict[str, tuple[Any, int]] = {
    "mean of the batch": (lambda images: own(images) - own(images).mean(0), 4),
    "mean of the batch, hardly": (lambda images: own(images) + 1e-15 * own(images).mean(0), 4),
    "number of images that are not padding": (lambda images: own(images) * images.any((1, 2, 3)).sum(), 4),
    "the neighbour before": (lambda images: own(images) + np.roll(own(images), 1, 0), 4),
    "the neighbour after": (lambda images: own(images) + np.roll(own(images), -1, 0), 4),
    "the first of the batch": (lambda images: own(images) + own(images)[0], 4),
    "NaN where another fails": (lambda images: own(images) + np.where(images[1:].mean() > 1, np.nan, 0), 4),
    "noise seeded by position": (lambda images: own(images) + ROWS[: len(images)], 4),
    "the last row in another way": (lambda images: own(images) + (np.arange(len(images)) == 3)[:, None], 4),
    "dice": (lambda images: own(images) + DICE.normal(), 4),
    "dice, image by image": (lambda images: own(images) + DICE.normal(size=(len(images), 1)), 1),
    "dice in an array used again": (shared_buffer, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_an_embedding_or_scores_that_mix_images_or_throw_dice(name):
    work, batch_size = MIXING[name]

    class Mixing(Table):
        def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
            return work(images)

    embed = Mixing(ROWS, batch_size)
    assert "embedding" in refused(lambda _: check_embed(embed, (2, 2, 1)))
    refused(lambda recorder: vector_mean(protected([0, 1]), embed, plan(4), recorder))
    says = refused(lambda recorder: nearest_candidate(protected([0]), work, 4, 1.0, recorder, batch_size))
    assert "scores of one image" in says


def test_an_embedding_of_each_image_by_itself_passes_in_few_steps():
    asked: list[int | None] = []

    class Plain(Table):
        def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
            asked.append(steps)
            return own(images).astype(np.float32)

    for batch_size in (1, 2, 7):
        check_embed(Plain(ROWS, batch_size), (2, 2, 1))
        check_embed(Plain(ROWS, batch_size), (2, 2, 1), steps=5)
    assert set(asked) == {2, 5}


@pytest.mark.parametrize("silent", [np.nan, np.inf, 0.5])
def test_an_embedding_that_says_nothing_of_random_images_cannot_be_tested(silent):
    """It could mix the private ones and nobody would see."""

    class Silent(Table):
        def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
            return np.full((len(images), 4), silent) if steps is not None else own(images)

    assert "cannot be tested" in refused(
        lambda r: vector_mean(protected([0, 1]), Silent(ROWS, 3), plan(4), r)
    )
