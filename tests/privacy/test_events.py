"""Events survive a round trip through JSON, and nothing without meaning passes."""

from __future__ import annotations

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.dp_event import (
    ComposedDpEvent,
    DiscreteLaplaceDpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import LedgerError
from sfumato.privacy.events import PlannedEvent, canonical, event_from_json, event_to_json, same_event

positive = st.floats(1e-6, 1e6)
leaves = st.one_of(
    st.builds(GaussianDpEvent, positive),
    st.builds(DiscreteLaplaceDpEvent, positive, st.integers(1, 9)),
    st.builds(PoissonSampledDpEvent, st.floats(0, 1), st.builds(GaussianDpEvent, positive)),
    st.just(NoOpDpEvent()),
)
events = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(SelfComposedDpEvent, inner, st.integers(0, 10**6)),
        st.builds(ComposedDpEvent, st.lists(inner, max_size=3)),
    ),
    max_leaves=4,
)


@given(events)
def test_round_trip_through_text(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


def test_names_are_dp_accountings_own():
    event = SelfComposedDpEvent(PoissonSampledDpEvent(0.33, GaussianDpEvent(2.3)), 150)
    assert event_to_json(event) == {
        "type": "SelfComposedDpEvent",
        "count": 150,
        "event": {
            "type": "PoissonSampledDpEvent",
            "sampling_probability": 0.33,
            "event": {"type": "GaussianDpEvent", "noise_multiplier": 2.3},
        },
    }
    assert all(hasattr(dp_accounting.dp_event, type(event).__name__) for event in [event, event.event])


def test_numpy_numbers_are_written_as_numbers():
    assert event_to_json(GaussianDpEvent(np.float64(2.5)))["noise_multiplier"] == 2.5  # type: ignore[arg-type]
    event = SelfComposedDpEvent(GaussianDpEvent(1.0), np.int64(3))  # type: ignore[arg-type]
    assert json.dumps(event_to_json(event)["count"]) == "3"


@pytest.mark.parametrize(
    "event",
    [
        GaussianDpEvent(math.nan),
        GaussianDpEvent(math.inf),
        GaussianDpEvent(-1.0),
        GaussianDpEvent("2"),  # type: ignore[arg-type]
        DiscreteLaplaceDpEvent(0.0, 1),
        DiscreteLaplaceDpEvent(1.0, 0),
        DiscreteLaplaceDpEvent(1.0, True),
        PoissonSampledDpEvent(1.01, GaussianDpEvent(1.0)),
        PoissonSampledDpEvent(-0.1, GaussianDpEvent(1.0)),
        SelfComposedDpEvent(GaussianDpEvent(1.0), -1),
        SelfComposedDpEvent(GaussianDpEvent(1.0), 1.5),  # type: ignore[arg-type]
        NonPrivateDpEvent(),
    ],
)
def test_events_without_meaning_are_refused(event):
    with pytest.raises(LedgerError):
        event_to_json(event)


@pytest.mark.parametrize(
    "obj",
    [
        None,
        "GaussianDpEvent",
        {"type": "SubprocessDpEvent"},
        {"type": ["GaussianDpEvent"]},
        {"type": "GaussianDpEvent"},
        {"type": "GaussianDpEvent", "noise_multiplier": 1.0, "note": "x"},
        {"type": "GaussianDpEvent", "noise_multiplier": None},
        {"type": "ComposedDpEvent", "events": {}},
        {"type": "PoissonSampledDpEvent", "sampling_probability": 0.5, "event": {"type": "Nothing"}},
    ],
)
def test_json_that_is_no_event_is_refused(obj):
    with pytest.raises(LedgerError):
        event_from_json(obj)


@given(events, events)
def test_same_event_is_equality(first, second):
    assert same_event(first, first)
    assert same_event(first, second) == (first == second)


def test_canonical_text_does_not_depend_on_the_order_of_keys():
    assert (
        canonical({"b": 1, "a": [1.5, None]})
        == canonical({"a": [1.5, None], "b": 1})
        == '{"a":[1.5,null],"b":1}'
    )
    with pytest.raises(ValueError):
        canonical(math.nan)


def test_planned_work_counts_units():
    planned = PlannedEvent("dp_sgd", "steps", GaussianDpEvent(2.0), 5)
    assert planned.total == SelfComposedDpEvent(GaussianDpEvent(2.0), 5)
    assert planned.begun(0) == NoOpDpEvent()
    assert planned.begun(1) == GaussianDpEvent(2.0)
    assert PlannedEvent("one", "", GaussianDpEvent(2.0)).total == GaussianDpEvent(2.0)
    with pytest.raises(LedgerError):
        planned.begun(6)
    for count in (0, -1, 2.5, True):
        with pytest.raises(LedgerError):
            PlannedEvent("dp_sgd", "steps", GaussianDpEvent(2.0), count)  # type: ignore[arg-type]
