"""`sfumato plan`: the figures of the planner, told without touching data."""

from __future__ import annotations

import re

import pytest

from sfumato.cli.main import main
from sfumato.synthesis import planner
from sfumato.synthesis.options import default_delta


@pytest.fixture
def fixed_speeds(monkeypatch):
    """A machine of known speed: what a budget buys must not depend on what else runs here."""
    speeds = planner.Speeds(public_rows=2000.0, private_rows=900.0, denoised_rows=5000.0)
    monkeypatch.setattr(planner, "measure_speeds", lambda *_, **__: speeds)


def noise(capsys, *more):
    assert main(["plan", "--units", "4000", "--size", "8", "--num-images", "10", *more]) == 0
    out = capsys.readouterr().out
    found = re.search(r"DP-SGD: .* noise multiplier ([0-9.]+)", out)
    return out, float(found.group(1)) if found else 0.0


def test_a_smaller_budget_needs_more_noise(capsys, fixed_speeds):
    paper = ["--preset", "paper-fashion-mnist", "--channels", "1"]
    out, little = noise(capsys, "--epsilon", "10", *paper)
    _, much = noise(capsys, "--epsilon", "1", *paper)
    assert much > little > 0
    assert "2100 steps" in out and "semantic query" in out
    assert out.endswith("No private data was read and no budget was spent.\n")


def test_delta_is_shown_and_warned_of(capsys, fixed_speeds):
    paper = ["--preset", "paper-fashion-mnist", "--epsilon", "8"]
    out, _ = noise(capsys, *paper)
    assert f"delta {default_delta(4000):.3g}" in out and "note:" not in out
    out, _ = noise(capsys, *paper, "--delta", "1e-3")
    assert "note: delta 0.001 is large" in out


def test_more_time_buys_more(capsys, fixed_speeds):
    steps = []
    for time in ("3m", "30m"):
        out, _ = noise(capsys, "--epsilon", "8", "--time-budget", time)
        found = re.search(r"DP-SGD: (\d+) steps.* (\d+) noise levels", out)
        assert found
        steps.append(int(found.group(1)) * int(found.group(2)))
    assert steps[1] > steps[0]


def test_public_only_costs_nothing(capsys):
    out, none = noise(capsys, "--epsilon", "1", "--method", "public-only")
    assert none == 0 and "cost: none" in out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--units", "1", "--epsilon", "1"], "--units 1"),
        (["--units", "50", "--epsilon", "0"], "--epsilon 0"),
        (["--units", "50", "--epsilon", "1", "--delta", "1"], "--delta 1"),
        (["--units", "50", "--epsilon", "1", "--public-classes", "0"], "--public-classes 0"),
        (["--units", "50", "--epsilon", "1", "--time-budget", "x"], "--time-budget"),
    ],
)
def test_what_cannot_be_planned(capsys, arguments, names):
    assert main(["plan", *arguments]) == 2
    assert names in capsys.readouterr().err


@pytest.mark.parametrize("units", [1, 2, 10, 4000, 60_000, 10**9])
def test_the_default_delta_is_well_below_one_over_n(units):
    delta = default_delta(units)
    assert 0 < delta <= max(3, units) ** -1.1 + 1e-10
    if 10 <= units <= 10**6:
        assert delta <= 0.5 / units


def test_styles_have_a_plan_too(capsys):
    assert main(["plan", "--units", "8", "--epsilon", "0.5", "--method", "dpagg-ti"]) == 0
    said = capsys.readouterr().out
    assert "NOT ENOUGH" in said and "units at this ε" in said and "no budget was spent" in said
    assert main(["plan", "--units", "47", "--epsilon", "2", "--method", "selection"]) == 0
    assert "public styles" in capsys.readouterr().out
