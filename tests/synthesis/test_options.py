"""Which δ a run uses, and how many units are public knowledge. (The command line itself: tests/cli.)"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.synthesis.options import SynthesizeOptions, default_delta


def options(private="scans", **more):
    return SynthesizeOptions(private, 8.0, **{"public": "p", **more})


def test_the_delta_of_a_run():
    assert options(delta=3e-7, public_size=50).delta_used == 3e-7
    assert options().delta_used == 1e-6
    assert options("demo:digits").delta_used == options("demo:digits", public_size=9).delta_used == 1e-5
    assert options(public_size=5000).delta_used == default_delta(5000) < 5000**-1.1
    assert options("fashion-mnist").delta_used == default_delta(60_000)


def test_the_number_of_units_is_private_unless_declared_or_known():
    assert options().units is None
    assert options(public_size=7).units == options("demo:digits", public_size=7).units == 7
    assert (options("demo:digits").units, options("fashion-mnist").units) == (4000, 60_000)


@given(st.integers(2, 10**7), st.floats(0.01, 100))
def test_a_delta_of_one_over_n_or_more_is_refused(units, factor):
    chosen = options(delta=min(factor / units, 0.999), public_size=units)
    if chosen.delta is not None and chosen.delta >= 1 / units:
        with pytest.raises(InputError, match=r"too large for .*no budget was spent"):
            chosen.check()
    else:
        chosen.check()


@given(st.integers(2, 10**7))
def test_the_default_is_never_refused(units):
    options(public_size=units).check()
    options(public_size=units, delta=default_delta(units)).check()


@pytest.mark.parametrize("method", ["pe", "public-only"])
def test_a_warm_up_needs_training_to_warm_up_for(method):
    with pytest.raises(InputError, match="--warm-up starts DP-SGD"):
        options(method=method, public="atlas", warm_up=1).check()
