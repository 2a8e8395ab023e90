"""Private model selection: exact counts, the distribution of the answer, its guarantee, refusals."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import DiscreteLaplaceDpEvent, GaussianDpEvent
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from sfumato.errors import InputError, LedgerError
from sfumato.privacy import selection
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import REPLACE_ONE, Budget
from sfumato.privacy.events import PlannedEvent, event_from_json, event_to_json, same_event
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.mechanisms import _at_least
from sfumato.privacy.selection import MODEL_SELECTION, best_candidate, model_selection_event
from sfumato.report.certificate import certificate, verify_certificate

ALARM = 1e-7


def protected(labels: Any, units: Any = None, *, kinds: Any = None, has_labels: bool = True) -> Any:
    """Images whose first pixel is their kind (by default their position), in units of one each."""
    labels = np.asarray(labels, dtype=np.int64)
    images = np.zeros((len(labels), 2, 2, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels)) if kinds is None else kinds
    units = [np.array([row]) for row in range(len(labels))] if units is None else [np.array(u) for u in units]
    return SimpleNamespace(
        _images=images, _labels=labels, _units=units, label_names=("a", "b", "c"), has_labels=has_labels
    )


def answering(table: Any) -> Any:
    """A candidate that gives an image of kind k the label table[k]."""
    table = np.resize(np.asarray(table, dtype=np.int64), 256)
    return lambda images: table[images[:, 0, 0, 0]]


class Recorder:
    """A reservation that allows everything and remembers what began."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        self.calls.append((mechanism, event))


def choose(private: Any, candidates: Any, epsilon: float = 1.0, **more: Any) -> int:
    return best_candidate(private, candidates, epsilon, Recorder(), **{"batch_size": 4, **more})[0]  # type: ignore[arg-type]


def counts(monkeypatch: Any, private: Any, candidates: Any, **more: Any) -> np.ndarray:
    """The exact counts, seen where the noise would be added."""
    seen: list[np.ndarray] = []
    with monkeypatch.context() as patch:
        patch.setattr(selection, "_noisy_max", lambda exact, scale: (seen.append(exact.copy()), 0)[1])
        choose(private, candidates, **more)
    return seen[0]


def odds(counts: Any, epsilon: float) -> np.ndarray:
    """Exact distribution of permute-and-flip (McKenna and Sheldon 2020, proposition 5): in a random order, each
    candidate is accepted with probability exp(epsilon (count - largest count)) until one is."""
    accept = np.exp(epsilon * (np.asarray(counts, dtype=float) - max(counts)))
    out = np.zeros(len(accept))
    for order in itertools.permutations(range(len(accept))):
        left = 1.0
        for candidate in order:
            out[candidate] += left * accept[candidate]
            left *= 1 - accept[candidate]
    return out / math.factorial(len(accept))


def as_stated(drawn: Any, expected: np.ndarray) -> bool:
    """Whether positions drawn follow the expected distribution, by a chi-squared test."""
    seen = np.bincount(drawn, minlength=len(expected))
    wanted = expected * len(drawn)
    return float(((seen - wanted) ** 2 / wanted).sum()) < chi2.isf(ALARM, len(expected) - 1)


# --- the counts


TRUTH = [0, 1, 2, 1, 0, 2, 2]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_counts_are_of_units_judged_rightly(monkeypatch, batch_size):
    candidates = [
        answering(TRUTH), answering([0]), answering([2]), answering([-1]), answering([3]), answering([0, 1]),
    ]  # fmt: skip
    exact = counts(monkeypatch, protected(TRUTH), candidates, batch_size=batch_size)
    assert exact.tolist() == [7, 2, 3, 0, 0, 4] and exact.dtype == np.int64


def test_a_unit_of_several_images_counts_once_by_an_image_drawn_at_random(monkeypatch):
    private = protected([0, 0, 1, 0, 2], units=[[0, 1, 2], [3], [], [4]])
    candidates = [answering([0, 0, 0, 0, 0]), answering([0, 0, 1, 0, 2]), answering([1, 1, 1, 1, 1])]
    seen = np.array([counts(monkeypatch, private, candidates) for _ in range(300)])
    assert (seen[:, 1] == 3).all() and set(seen[:, 0]) == {1, 2}
    assert (seen[:, 0] + seen[:, 2] == 2).all()  # the same image for all candidates
    assert abs(np.mean(seen[:, 0] == 2) - 2 / 3) < 6 * math.sqrt(2 / 9 / 300)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_unit_moves_all_counts_one_way_by_at_most_one(data):
    units = data.draw(st.integers(1, 9))
    labels = data.draw(st.lists(st.integers(0, 2), min_size=units, max_size=units))
    tables = data.draw(
        st.lists(st.lists(st.integers(-1, 3), min_size=units, max_size=units), min_size=2, max_size=4)
    )
    gone = data.draw(st.integers(0, units - 1))
    rest = [row for row in range(units) if row != gone]
    with pytest.MonkeyPatch.context() as patch:
        more = counts(patch, protected(labels), [answering(t) for t in tables])
        less = counts(patch, protected(np.array(labels)[rest], kinds=rest), [answering(t) for t in tables])
    assert (more - less).tolist() == [int(table[gone] == labels[gone]) for table in tables]


# --- the noise: what comes out is distributed as stated, and that distribution is epsilon-DP


@pytest.mark.parametrize(("totals", "epsilon"), [((0, 1, 2), 1.0), ((3, 3, 0, 1), 0.4), ((5, 4), 1.7)])
def test_the_answer_has_exactly_the_distribution_of_permute_and_flip(totals, epsilon):
    scale = _at_least(1.0, 1 / epsilon, Fraction(epsilon))
    measurement = selection._measurement(scale)
    expected = odds(totals, epsilon)
    assert expected.sum() == pytest.approx(1)
    assert as_stated([measurement(list(totals)) for _ in range(1500)], expected)
    assert not as_stated([measurement(list(totals)) for _ in range(1500)], odds(totals, 2 * epsilon))


def test_the_whole_mechanism_has_that_distribution():
    private, candidates = protected([0, 0, 1]), [answering([0]), answering([1]), answering([2])]
    drawn = [choose(private, candidates, 0.8) for _ in range(800)]
    assert as_stated(drawn, odds([2, 1, 0], 0.8))


def cost(first: np.ndarray, second: np.ndarray, epsilon: float) -> float:
    """Hockey-stick divergence: the delta of two distributions at epsilon."""
    return float(np.maximum(first - math.exp(epsilon) * second, 0).sum())


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
def test_no_neighbours_cost_more_than_the_event_and_some_cost_as_much(epsilon):
    worst, largest = 0.0, 0.0
    for base in itertools.product(range(4), repeat=3):
        before = odds(base, epsilon)
        for rise in itertools.product((0, 1), repeat=3):
            after = odds(np.add(base, rise), epsilon)
            largest = max(largest, float(np.abs(np.log(after / before)).max()))
            for at in np.linspace(0, epsilon, 5):
                allowed = (math.exp(epsilon) - math.exp(at)) / (1 + math.exp(epsilon))
                assert max(cost(after, before, at), cost(before, after, at)) <= allowed + 1e-12
        for change in itertools.product((-1, 0, 1), repeat=3):  # replacing one unit: twice as much
            after = odds(np.add(base, change), epsilon)
            worst = max(worst, float(np.abs(np.log(after / before)).max()))
    assert 0.999 * epsilon <= largest <= epsilon + 1e-12
    assert epsilon + 0.1 < worst <= 2 * epsilon + 1e-12


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-4, 1e3))
def test_opendp_derives_the_same_epsilon(epsilon):
    seen: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_noisy_max", lambda _, scale: seen.append(scale) or 0)
        choose(protected([0]), [answering([0]), answering([1])], epsilon)
    (scale,) = seen
    assert Fraction(scale) * Fraction(epsilon) >= 1 and scale <= (1 + 1e-15) / epsilon * (1 + 1e-15)
    derived = selection._measurement(scale).map(1)
    assert derived == pytest.approx(epsilon, rel=1e-12) and derived <= math.nextafter(epsilon, math.inf)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_the_event_is_that_of_randomised_response(epsilon):
    """The dominating pair of all (epsilon, 0)-DP mechanisms: Kairouz, Oh and Viswanath 2015."""
    event, flip = model_selection_event(epsilon), 2 / (1 + math.exp(epsilon))
    response = privacy_loss_distribution.from_randomized_response(flip, 2)
    for delta in (1e-6, 0.01, 0.05):
        closed = math.log(max(math.exp(epsilon) - delta * (1 + math.exp(epsilon)), 1.0))
        assert closed - 1e-9 <= epsilon_of([event], delta) <= closed + 2e-4
        assert response.get_epsilon_for_delta(delta) == pytest.approx(closed, abs=2e-4)
    assert epsilon_of([event], 0) == epsilon
    assert epsilon_of([event], 0, relation=REPLACE_ONE) == 2 * epsilon
    two = epsilon_of([event, event], 1e-5)
    assert two == pytest.approx(response.self_compose(2).get_epsilon_for_delta(1e-5), abs=1e-3)


# --- answers at the edges


def test_more_right_answers_than_noise_can_hide_win():
    private = protected([0] * 40)
    candidates = [answering([1]), answering([0]), answering([0] * 5 + [1] * 251)]
    assert {choose(private, candidates, 5.0) for _ in range(30)} == {1}


def test_ties_are_broken_evenly():
    candidates = [answering([0]), answering([0]), answering([0])]
    assert as_stated([choose(protected([0, 0]), candidates) for _ in range(400)], np.full(3, 1 / 3))


def test_without_units_every_candidate_is_as_likely():
    candidates = [answering([0]), answering([1]), answering([2])]
    assert as_stated([choose(protected([]), candidates) for _ in range(400)], np.full(3, 1 / 3))


def test_only_a_position_and_the_event_leave():
    recorder = Recorder()
    answer = best_candidate(protected([0, 1]), [answering([0]), answering([1])], 0.5, recorder)  # type: ignore[arg-type]
    assert type(answer[0]) is int and answer[0] in (0, 1) and len(answer) == 2
    assert (
        recorder.calls == [(MODEL_SELECTION, answer[1])] == [("model_selection", model_selection_event(0.5))]
    )


def test_noise_comes_after_begin_and_a_refusal_releases_nothing(monkeypatch):
    order: list[str] = []
    real = selection._noisy_max
    monkeypatch.setattr(selection, "_noisy_max", lambda *a: (order.append("noise"), real(*a))[1])

    class Ordered(Recorder):
        def begin(self, *_: Any) -> None:
            order.append("begin")

    class Refusing(Recorder):
        def begin(self, *_: Any) -> None:
            raise LedgerError("not reserved")

    candidates = [answering([0]), answering([1])]
    best_candidate(protected([0]), candidates, 1.0, Ordered())  # type: ignore[arg-type]
    assert order == ["begin", "noise"]
    with pytest.raises(LedgerError):
        best_candidate(protected([0]), candidates, 1.0, Refusing())  # type: ignore[arg-type]
    assert order == ["begin", "noise"]


# --- on a ledger, in a certificate


def test_it_is_charged_and_certified_with_the_rest_of_a_run(tmp_path):
    ledger = Ledger.open(tmp_path / "x.db", total=Budget(8, 1e-5))
    plan = [
        PlannedEvent("label_histogram", "labels", GaussianDpEvent(5.0)),
        PlannedEvent(
            MODEL_SELECTION, "the best of 3 models, by report-noisy-max", model_selection_event(0.5)
        ),
    ]
    reservation = ledger.reserve("run", plan, delta=1e-6)
    reservation.begin("label_histogram", GaussianDpEvent(5.0))
    candidates = [answering([0]), answering([1]), answering([2])]
    with pytest.raises(LedgerError, match="not what was reserved"):
        best_candidate(protected([0, 1]), candidates, 0.6, reservation)
    assert reservation.begun(MODEL_SELECTION) == 0
    _, event = best_candidate(protected([0, 1]), candidates, 0.5, reservation)
    assert reservation.begun(MODEL_SELECTION) == 1 and same_event(event, plan[1].event)
    assert event_from_json(event_to_json(event)) == event == DiscreteLaplaceDpEvent(0.5, 1)
    with pytest.raises(LedgerError, match="1 of 1"):
        best_candidate(protected([0, 1]), candidates, 0.5, reservation)
    reservation.settle()
    made = certificate(
        ledger.reservations(), unit="image", public_size=None, budget=Budget(8, 1e-5), software={},
        ledger_head=ledger.head,
    )  # fmt: skip
    assert verify_certificate(made).ok
    alone = epsilon_of([GaussianDpEvent(5.0)], 1e-6)
    assert alone < made["epsilon"] <= alone + 0.5
    assert made["epsilon"] < made["epsilon_replace_one"] < 2.5 * made["epsilon"]


# --- what is refused before anything is spent


def refused(private: Any, candidates: Any, epsilon: float = 1.0, **more: Any) -> str:
    recorder = Recorder()
    with pytest.raises(InputError, match="no budget was spent") as caught:
        best_candidate(private, candidates, epsilon, recorder, **more)  # type: ignore[arg-type]
    assert recorder.calls == [] and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        lambda images: np.full(len(images), np.nan),
        lambda images: np.zeros(len(images), np.float32),
        lambda images: np.zeros((len(images), 3), np.int64),
        lambda images: np.zeros(len(images) - 1, np.int64),
        lambda images: np.int64(0),
        lambda images: np.array(["a"] * len(images)),
        lambda images: np.ones(len(images), bool),
        lambda images: None,
    ],
)
def test_answers_that_are_no_labels(bad):
    assert "candidate 1" in refused(protected([0, 1]), [answering([0]), bad])


@pytest.mark.parametrize("candidates", [[], [answering([0])]])
def test_nothing_to_choose_between(candidates):
    assert "nothing to choose" in refused(protected([0]), candidates)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_epsilon_without_meaning(epsilon):
    refused(protected([0]), [answering([0])] * 2, epsilon)


def test_unlabelled_images_and_empty_batches():
    assert "no labels" in refused(protected([0], has_labels=False), [answering([0])] * 2)
    assert "batch size" in refused(protected([0]), [answering([0])] * 2, batch_size=0)


def test_candidates_that_look_at_the_whole_batch_or_throw_dice():
    import torch

    from sfumato.encoders.classifier import query_network, to_float

    torch.manual_seed(0)
    network = query_network(1, 3).train()  # batch normalisation and dropout at work

    def classify(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(to_float(images)).argmax(1).numpy()

    rng = np.random.default_rng(0)
    candidates = {
        "train mode": classify,
        "mean of the batch": lambda images: (images[:, 0, 0, 0] > images.mean()).astype(np.int64),
        "dice": lambda images: rng.integers(0, 3, len(images)),
    }
    for candidate in candidates.values():
        assert "by itself" in refused(protected([0] * 3), [answering([0]), candidate])
    network.eval()
    assert choose(protected([0] * 3), [classify, classify]) in (0, 1)
