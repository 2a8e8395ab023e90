"""Facts for everybody and facts for the owner stay apart."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.report.facts import OwnerFacts, ReleaseFacts, releasable_options
from sfumato.report.words import claim, costs, delta_claim, event_text, guessing_limit


class _Marked:
    for_owner_only = True


@pytest.mark.parametrize("where", ["options", "warnings", "certificate", "stages"])
def test_owner_facts_are_refused_wherever_they_hide(facts, owner, where):
    hidden = {
        "options": {"a": [owner]},
        "warnings": [_Marked()],
        "certificate": {"x": {"y": owner}},
        "stages": [owner],
    }
    with pytest.raises(InputError, match=r"owner|guarantee"):
        replace(facts, **{where: hidden[where]})


def test_owner_facts_always_say_whose_they_are():
    assert OwnerFacts("nothing").for_owner_only is True
    with pytest.raises(TypeError):
        OwnerFacts("nothing", for_owner_only=False)  # type: ignore[call-arg]


def test_private_pixels_are_refused(facts):
    from sfumato.data.images import OwnerArray

    real = np.zeros((9, 8, 8, 1), np.uint8).view(OwnerArray)
    with pytest.raises(InputError):
        replace(facts, sample_images=real)
    with pytest.raises(InputError):
        replace(facts, sample_images=np.asarray(real[:3]))


def test_options_that_name_files_accounts_or_seeds_are_not_releasable(facts):
    assert releasable_options(facts.options) == {"epsilon": 8.0, "method": "privimage"}


def test_options_of_the_command_line_are_sorted_out_too():
    from dataclasses import asdict

    from sfumato.synthesis.options import SynthesizeOptions

    options = SynthesizeOptions(
        "secret/scans", 3.0, ledger="x.db", out="o", holdout="h", config="c.yaml", seed=5
    )
    shown = releasable_options(asdict(options))
    assert shown == {"epsilon": 3.0, "method": "privimage", "unit": "image", "time_budget": "10m"}


@pytest.mark.parametrize("epsilon", [1e-4, 0.0123, 0.5, 1.0, 7.981, 8.0, 123.456])
def test_a_claim_is_never_below_what_was_spent(epsilon):
    assert float(claim(epsilon)) >= epsilon * (1 - 1e-9)
    assert float(claim(epsilon)) <= epsilon * 1.1 + 0.01


@pytest.mark.parametrize("delta", [5.546e-6, 1.0000001e-5, 9.96e-6, 1e-5, 1e-10, 0.0, 0.05, 1.24e-6])
def test_a_claimed_delta_is_never_below_what_was_spent(delta):
    assert delta * (1 - 1e-8) <= float(delta_claim(delta)) <= delta * 1.1
    assert [delta_claim(even) for even in (1e-5, 5.5e-6, 0)] == ["1e-05", "5.5e-06", "0"]


def test_a_claim_of_an_even_figure_is_that_figure():
    assert [claim(0), claim(8.0), claim(7.981)] == ["0", "8", "7.99"]


def test_events_in_words():
    gaussian = {"type": "GaussianDpEvent", "noise_multiplier": 50.0}
    poisson = {"type": "PoissonSampledDpEvent", "sampling_probability": 0.25, "event": gaussian}
    assert event_text(gaussian) == "Gaussian noise, multiplier 50"
    assert event_text({"type": "SelfComposedDpEvent", "count": 1500, "event": poisson}) == (
        "1,500 × (Poisson sample with probability 0.25, Gaussian noise, multiplier 50)"
    )
    laplace = {"type": "DiscreteLaplaceDpEvent", "noise_parameter": 0.1, "sensitivity": 1}
    assert event_text(laplace) == "discrete Laplace noise of scale 10, ε 0.1 with δ 0"
    assert event_text({"type": "NonPrivateDpEvent"}) == "NOT PRIVATE"
    assert "Strange" in event_text({"type": "Strange", "value": 3})


def test_the_guessing_limit_is_the_known_one():
    assert guessing_limit(0, 0) == 0.5
    assert math.isclose(guessing_limit(1, 0), math.e / (1 + math.e))
    assert guessing_limit(0, 1e-5) == pytest.approx(0.5 + 1e-5 / 2)
    assert guessing_limit(1e9, 0) == 1.0


def test_what_each_mechanism_costs_alone(facts: ReleaseFacts):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    query, training = costs(facts.certificate)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(50.0))
    assert query.epsilon_alone == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert (query.mechanism, training.mechanism) == ("semantic_histogram", "dp_sgd")
    assert training.epsilon_alone > query.epsilon_alone
