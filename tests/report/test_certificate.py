"""Certificates: made from reservations, recomputed by dp-accounting, and no edit passes."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dp_accounting.dp_event import (
    DiscreteLaplaceDpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant

from sfumato.errors import LedgerError
from sfumato.privacy.budget import REPLACE_ONE, Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger
from sfumato.report.certificate import certificate, statement, verify_certificate

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "verify_privacy_json.py"
STEP = PoissonSampledDpEvent(0.3, GaussianDpEvent(6.0))
SYNTHESIZE = [
    PlannedEvent("semantic_histogram", "top-5 public classes of each image", GaussianDpEvent(50.0)),
    PlannedEvent("dp_sgd", "60 steps, clip norm 1e-3", STEP, 60),
]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    ledger = Ledger.open(tmp_path_factory.mktemp("ledger") / "x.db", total=Budget(8, 1e-5))
    ledger.reserve(
        "count", [PlannedEvent("count", "number of images", DiscreteLaplaceDpEvent(0.1, 1))], delta=0
    )
    reservation = ledger.reserve("synthesize", SYNTHESIZE, delta=5e-6)
    reservation.begin("semantic_histogram", GaussianDpEvent(50.0))
    reservation.begin("dp_sgd", STEP, 60)
    reservation.settle()
    unused = ledger.reserve("unused", SYNTHESIZE[:1], delta=1e-6)
    unused.settle()
    return ledger


def make(ledger: Ledger, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "unit": "image", "public_size": 4000, "budget": Budget(8, 1e-5), "software": {"sfumato": "0.1.0"},
        "ledger_head": ledger.head,
    }  # fmt: skip
    return certificate(ledger.reservations(), **{**options, **changes})


@pytest.fixture(scope="module")
def good(ledger: Ledger) -> dict[str, Any]:
    return make(ledger)


def test_it_holds_and_survives_being_written(good):
    verification = verify_certificate(json.loads(json.dumps(good)))
    assert verification.ok and str(verification).startswith("holds")
    assert verification.epsilon == pytest.approx(good["epsilon"], rel=1e-6)
    assert verification.epsilon_rdp == pytest.approx(good["epsilon_rdp"], rel=1e-6)


def test_its_figures(good, ledger):
    assert good["format"] == "sfumato-privacy/1"
    assert good["relation"] == "add_or_remove_one" and good["accountant"] == "pld"
    assert [part["label"] for part in good["reservations"]] == ["count", "synthesize"]
    assert good["epsilon"] == pytest.approx(sum(part["epsilon"] for part in good["reservations"]))
    assert good["delta"] == pytest.approx(5e-6)
    accountant = PLDAccountant().compose(GaussianDpEvent(50.0)).compose(SelfComposedDpEvent(STEP, 60))
    assert good["epsilon"] - 0.1 == pytest.approx(accountant.get_epsilon(5e-6), rel=1e-6)
    assert good["epsilon"] < good["epsilon_rdp"] < good["epsilon_replace_one"]
    assert good["ledger"]["head"] == ledger.head
    assert "public" in good["label_set"]


def test_it_says_the_guarantee_in_one_sentence(good):
    assert good["statement"] == statement(good)
    for word in ("adding or removing one", "image", "δ = 5e-06", "labels"):
        assert word in good["statement"]
    assert good["statement"].count(".") <= 4 and "\n" not in good["statement"]
    said = float(good["statement"].split("ε = ")[1].split(",")[0])
    assert good["epsilon"] <= said <= good["epsilon"] + 0.01


def test_a_release_without_private_data(ledger):
    empty = certificate([], unit="image", public_size=None, budget=None, software={}, ledger_head="")
    assert (empty["epsilon"], empty["delta"], empty["reservations"]) == (0, 0, [])
    assert "reveals nothing" in empty["statement"]
    assert verify_certificate(empty).ok


def test_other_relations_are_not_certified(ledger):
    with pytest.raises(LedgerError):
        make(ledger, relation=REPLACE_ONE)


def test_a_reservation_named_twice_counts_once(ledger, good):
    """Preparing and fitting both name the count's reservation."""
    twice = [*ledger.reservations(), *ledger.reservations()]
    again = certificate(
        twice, unit="image", public_size=4000, budget=Budget(8, 1e-5), software={"sfumato": "0.1.0"},
        ledger_head=ledger.head,
    )  # fmt: skip
    assert again == good


def test_answers_that_another_account_paid_for_are_not_certified(tmp_path):
    """A run resumed on a new ledger finds all its answers, begins nothing, and settles for nothing."""
    ledger = Ledger.open(tmp_path / "new.db", total=Budget(8, 1e-5))
    ledger.reserve("synthesize", SYNTHESIZE, delta=5e-6).settle()
    with pytest.raises(LedgerError, match="no work under"):
        make(ledger)


def test_open_and_stopped_work(tmp_path):
    ledger = Ledger.open(tmp_path / "x.db", total=Budget(8, 1e-5))
    reservation = ledger.reserve("s", SYNTHESIZE, delta=5e-6)
    reservation.begin("dp_sgd", STEP, 20)
    in_full = make(ledger)
    assert in_full["reservations"][0]["events"][1]["event"]["count"] == 60
    reservation.settle(outputs_unseen=True)
    stopped = make(ledger)
    (part,) = stopped["reservations"]
    assert [entry["mechanism"] for entry in part["events"]] == ["dp_sgd"]
    assert part["events"][0]["event"]["count"] == 20
    assert stopped["epsilon"] < in_full["epsilon"]
    assert verify_certificate(in_full).ok and verify_certificate(stopped).ok


def test_large_epsilons_verify_too(tmp_path):
    ledger = Ledger.open(tmp_path / "x.db", total=Budget(1000, 1e-4))
    ledger.reserve("loud", [PlannedEvent("m", "", GaussianDpEvent(0.12))], delta=1e-5)
    large = make(ledger, budget=Budget(1000, 1e-4))
    assert large["epsilon"] > 60 and verify_certificate(large).ok


def test_count_and_gaussian_in_one_reservation(tmp_path):
    ledger = Ledger.open(tmp_path / "x.db", total=Budget(8, 1e-4))
    both = [PlannedEvent("count", "", DiscreteLaplaceDpEvent(0.1, 1)), SYNTHESIZE[0]]
    ledger.reserve("both", both, delta=1e-6)
    ledger.reserve("both again", both, delta=1e-6)
    made = make(ledger, budget=None)
    assert made["epsilon_replace_one"] > made["epsilon"] and verify_certificate(made).ok


def reservation(c: dict[str, Any]) -> dict[str, Any]:
    return c["reservations"][1]


def event(c: dict[str, Any], index: int) -> dict[str, Any]:
    return reservation(c)["events"][index]["event"]


TAMPERINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "total epsilon": lambda c: c.update(epsilon=c["epsilon"] * 0.99),
    "total epsilon, larger": lambda c: c.update(epsilon=c["epsilon"] * 1.01),
    "total delta": lambda c: c.update(delta=1e-6),
    "epsilon of a reservation": lambda c: reservation(c).update(epsilon=0.5),
    "both epsilons": lambda c: (
        c.update(epsilon=c["epsilon"] - 0.01),
        reservation(c).update(epsilon=reservation(c)["epsilon"] - 0.01),
    ),
    "delta of a reservation": lambda c: reservation(c).update(delta=4e-6),
    "query noise": lambda c: event(c, 0).update(noise_multiplier=484.0),
    "number of steps": lambda c: event(c, 1).update(count=59),
    "sampling": lambda c: event(c, 1)["event"].update(sampling_probability=0.29),
    "step noise": lambda c: event(c, 1)["event"]["event"].update(noise_multiplier=6.01),
    "no noise": lambda c: event(c, 0).update(noise_multiplier=0.0),
    "the query left out": lambda c: reservation(c)["events"].pop(0),
    "a reservation left out": lambda c: c["reservations"].pop(0),
    "the same reservation twice": lambda c: c["reservations"].append(copy.deepcopy(reservation(c))),
    "an unknown event": lambda c: event(c, 0).update(type="FreeDpEvent"),
    "another field": lambda c: event(c, 0).update(seed=1),
    "rdp": lambda c: c.update(epsilon_rdp=c["epsilon_rdp"] * 0.9),
    "rdp missing": lambda c: c.update(epsilon_rdp=None),
    "replace one": lambda c: c.update(epsilon_replace_one=c["epsilon_replace_one"] * 0.98),
    "budget": lambda c: c["budget"].update(epsilon=1.0),
    "budget's delta": lambda c: c["budget"].update(delta=1e-7),
    "relation": lambda c: c.update(relation="replace_one"),
    "statement": lambda c: c.update(statement="This release is perfectly private."),
    "not a number": lambda c: c.update(epsilon="small"),
    "negative": lambda c: reservation(c).update(epsilon=-1.0),
    "nan": lambda c: reservation(c).update(epsilon=float("nan")),
    "format": lambda c: c.update(format="sfumato-privacy/9"),
    "no reservations": lambda c: c.pop("reservations"),
    "reservations of another type": lambda c: c.update(reservations=7),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERINGS)
def test_no_edit_passes(good, what):
    edited = copy.deepcopy(good)
    TAMPERINGS[what](edited)
    verification = verify_certificate(edited)
    assert not verification.ok and "DOES NOT HOLD" in str(verification)


@pytest.mark.parametrize("thing", [None, [], "x", 3, {}])
def test_what_is_no_certificate(thing):
    assert not verify_certificate(thing).ok


def test_verification_does_not_use_the_accounting_it_checks(good, monkeypatch):
    from sfumato.privacy import accounting

    def broken(*_: Any, **__: Any) -> float:
        raise AssertionError("used the code under check")

    for name in ("epsilon_of", "_pld", "_rdp", "_add_or_remove_one"):
        monkeypatch.setattr(accounting, name, broken)
    assert verify_certificate(good).ok


def test_it_holds_no_seed_count_or_path(good):
    text = json.dumps(good)
    assert "seed" not in text and "/" not in text.replace("sfumato-privacy/1", "")


def run_script(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, timeout=120
    )


def test_the_script_agrees_with_dp_accounting_alone(good, tmp_path):
    (tmp_path / "privacy.json").write_text(json.dumps(good))
    result = run_script(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "PLD" in result.stdout and f"{good['epsilon_rdp']:.6f}" in result.stdout
    assert "sfumato." not in SCRIPT.read_text() and "import sfumato" not in SCRIPT.read_text()


@pytest.mark.parametrize("what", ["total epsilon", "both epsilons", "step noise", "a reservation left out"])
def test_the_script_finds_a_mismatch(good, tmp_path, what, capsys):
    edited = copy.deepcopy(good)
    TAMPERINGS[what](edited)
    (tmp_path / "privacy.json").write_text(json.dumps(edited))
    spec = importlib.util.spec_from_file_location("verify_privacy_json", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.check(tmp_path / "privacy.json") is False
    assert "MISMATCH" in capsys.readouterr().out
