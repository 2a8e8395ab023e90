"""The folder of a run: when options may still change, and what is never forgotten. (Whole runs: end_to_end.)"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from sfumato.errors import InputError
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger
from sfumato.report.facts import Stage
from sfumato.synthesis import run
from sfumato.synthesis.options import SynthesizeOptions
from sfumato.synthesis.planner import Speeds
from sfumato.synthesis.presets import PRESETS
from sfumato.synthesis.run_folder import RunFolder

OPTIONS = SynthesizeOptions("scans", 4.0, public="atlas", time_budget="5m")


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.take(OPTIONS)
    made.checkpoints.mkdir(parents=True)
    return made


def config(folder):
    return yaml.safe_load((folder.out / "config.yaml").read_text())


def refused(folder, **changes):
    with pytest.raises(InputError, match="no budget was spent now"):
        folder.take(replace(OPTIONS, **changes))
    return True


def test_the_config_holds_every_option_and_can_be_given_back(folder):
    from sfumato.synthesis.options import read_config

    read = read_config(folder.out / "config.yaml")
    assert SynthesizeOptions(**read) == OPTIONS
    folder.take(OPTIONS)
    folder.take(replace(OPTIONS, out="elsewhere", dry_run=True, config="x.yaml"))
    assert config(folder)["epsilon"] == 4


def test_before_anything_is_charged_all_options_may_change(folder):
    own = folder.out / "internal" / "ledger.db"
    Ledger.open(own, total=Budget(4, 1e-6))
    folder.take(replace(OPTIONS, epsilon=2.0))
    assert config(folder)["epsilon"] == 2 and not own.exists()


def test_a_ledger_with_a_charge_is_never_removed(folder):
    from dp_accounting import GaussianDpEvent

    own = folder.out / "internal" / "ledger.db"
    Ledger.open(own, total=Budget(4, 1e-6)).reserve(
        "x", [PlannedEvent("q", "", GaussianDpEvent(9.0))], delta=1e-7
    )
    folder.take(replace(OPTIONS, epsilon=2.0))
    folder.give_up(charged=False)
    assert len(Ledger.open(own).reservations()) == 1


def test_after_the_count_only_what_it_does_not_rest_on(folder):
    (folder.checkpoints / "run.json").write_text("{}")
    folder.take(replace(OPTIONS, time_budget="9m", method="dpdm", num_images=7))
    assert config(folder)["time_budget"] == "9m"
    for change in (
        {"epsilon": 2.0},
        {"private": "others"},
        {"unit": "group"},
        {"ledger": "x.db"},
        {"delta": 1e-9},
    ):
        assert refused(folder, **change)


def test_after_the_plan_only_the_holdout(folder):
    (folder.checkpoints / "plan.json").write_text("{}")
    for name in ("accuracy.json", "../evaluation.json"):
        (folder.checkpoints / name).write_text("{}")
    for change in ({"epsilon": 2.0}, {"num_images": 9}, {"seed": 1}, {"time_budget": "9m"}):
        assert refused(folder, **change)
    folder.take(OPTIONS)
    assert folder.evaluation() == {}
    folder.take(replace(OPTIONS, holdout="held"))
    assert folder.evaluation() is None and not (folder.checkpoints / "accuracy.json").exists()


def test_a_complete_release_is_not_taken_over(folder):
    (folder.out / "release").mkdir()
    (folder.out / "release" / "privacy.json").write_text("{}")
    assert refused(folder, epsilon=2.0)


def test_after_a_refusal_what_was_bought_is_kept(folder):
    for name in ("plan.json", "run.json", "count.npy"):
        (folder.checkpoints / name).write_text("{}")
    folder.give_up(charged=True)
    assert {p.name for p in folder.checkpoints.iterdir()} == {"run.json", "count.npy"} and config(folder)
    folder.give_up(charged=False)
    assert not (folder.checkpoints / "run.json").exists() and not (folder.out / "config.yaml").exists()


def test_metrics_hold_no_time_of_a_private_stage(folder):
    stages = [
        Stage(name, 3.14, "how")
        for name in ("semantic query", "mean images", "public training", "DP-SGD", "generation")
    ]
    folder.metrics([run._metrics_row(stage) for stage in stages])
    rows = [json.loads(line) for line in (folder.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if "seconds" in row] == ["public training", "generation"]


def test_a_plan_comes_from_declared_values_alone(monkeypatch):
    monkeypatch.setattr(run, "measure_speeds", lambda *_, **__: Speeds(700, 400, 1500))
    given = {
        "method": "privimage", "preset": replace(PRESETS["demo"], size=8), "budget": Budget(8, 1e-5), "units": 4000,
        "labels": 10, "public_classes": 100, "num_images": 50,
    }  # fmt: skip
    plan = run.plan_for(time_budget="5m", **given)
    assert plan == run.plan_for(time_budget="300s", **given)
    assert plan.units == 4000 and plan.epsilon == 8 and plan.query
    with pytest.raises(InputError, match=r"--time-budget 3s is too short: .*no budget was spent"):
        run.plan_for(time_budget="3s", **given)
