import json
from dataclasses import replace

import pytest

from sfumato.errors import InputError
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.synthesis.planner import FEWEST_STEPS, MORE_THAN_ENOUGH, Plan, Speeds, make_plan
from sfumato.synthesis.presets import PRESETS, preset_for

SPEEDS = Speeds(public_rows=700, private_rows=400, denoised_rows=6000)
BUDGET = Budget(8.0, 1e-5)


def plan(**given):
    settings = {
        "method": "privimage", "units": 4000, "budget": BUDGET, "preset": PRESETS["demo"], "seconds": 480,
        "speeds": SPEEDS, "num_images": 3000, "num_labels": 10, "public_classes": 111, "classifiers": 4,
    }  # fmt: skip
    return make_plan(**{**settings, **given})


@pytest.mark.parametrize("method", ["privimage", "dpdm"])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_the_planned_events_cost_at_most_the_budget_and_nearly_all_of_it(method, epsilon):
    made = plan(
        method=method, budget=Budget(epsilon, 1e-5), preset=replace(PRESETS["demo"], means_per_label=2)
    )
    cost = epsilon_of([planned.total for planned in made.events()], 1e-5)
    assert 0.98 * epsilon < cost <= epsilon


def test_query_and_means_are_among_the_events():
    made = plan(preset=replace(PRESETS["demo"], means_per_label=2))
    assert [planned.mechanism for planned in made.events()] == ["semantic_histogram", "mean_images", "dp_sgd"]
    assert [p.mechanism for p in plan(method="dpdm").events()] == ["dp_sgd"]
    assert plan(method="public-only").events() == []


def test_time_buys_steps_then_noise_levels():
    short, longer, long = (plan(seconds=seconds) for seconds in (200, 480, 3000))
    assert short.steps * short.noise_levels < longer.steps * longer.noise_levels
    assert long.noise_levels > short.noise_levels
    assert long.steps <= MORE_THAN_ENOUGH * PRESETS["demo"].enough_steps + 1
    for made in (short, longer, long):
        assert (
            made.private_seconds
            <= 1.02 * made.sampling_probability * 4000 * made.steps * made.noise_levels / 400
        )


def test_many_units_in_little_time_shrink_the_batch_not_the_steps():
    made = plan(units=60_000, seconds=240)
    assert made.steps >= FEWEST_STEPS and made.sampling_probability < PRESETS["demo"].sampling_probability
    assert made.private_seconds <= 240


def test_a_preset_that_is_not_bound_by_time_runs_as_published():
    made = plan(preset=PRESETS["paper-cifar10"], seconds=60, units=50_000, public_classes=200, num_labels=10)
    assert (made.steps, made.noise_levels, made.sampling_probability) == (150, 8, 1 / 3)
    assert made.public_seconds is None


def test_the_divisor_is_the_public_number_of_units():
    made = plan(units=1234)
    assert made.dp_sgd().expected_batch == pytest.approx(made.sampling_probability * 1234)


def test_plan_survives_json():
    made = plan()
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert any("noise multiplier" in line for line in made.lines())


def test_too_little_time_or_too_few_units_or_classes_is_an_error():
    with pytest.raises(InputError, match=r"time budget is too short.*no budget was spent"):
        plan(seconds=30)
    with pytest.raises(InputError, match="unit"):
        plan(units=1)
    with pytest.raises(InputError, match="public classes"):
        plan(public_classes=7)


def test_fewer_public_classes_shrink_what_each_label_gets():
    assert plan(public_classes=20).preset.classes_per_label == 2


def test_presets_are_found_by_name_and_by_data():
    assert preset_for("cifar10", "x") is PRESETS["cifar10"]
    assert preset_for(None, "fashion-mnist") is PRESETS["fashion-mnist"]
    assert preset_for(None, "demo:digits") is PRESETS["demo"]
    assert preset_for(None, "my/folder").num_images is None
    with pytest.raises(InputError, match="--preset"):
        preset_for("nope", "x")
