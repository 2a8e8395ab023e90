"""`sfumato ledger` on real ledgers."""

from __future__ import annotations

import json
import sqlite3

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from sfumato.cli.main import main
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger
from sfumato.report.certificate import certificate

STEP = PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0))
PLAN = [
    PlannedEvent("semantic_histogram", "top-2 classes", GaussianDpEvent(20.0)),
    PlannedEvent("dp_sgd", "10 steps", STEP, 10),
]


@pytest.fixture
def ledger(tmp_path):
    where = str(tmp_path / "scans.ledger.db")
    assert main(["ledger", "create", where, "--epsilon", "8", "--delta", "1e-5", "--name", "scans"]) == 0
    return where


def reserve(where):
    return Ledger.open(where).reserve("synthesize", PLAN, delta=1e-6, key="run")


def test_create_then_show(ledger, capsys):
    assert main(["ledger", "show", ledger]) == 0
    out = capsys.readouterr().out
    assert "ledger of scans" in out and "total  ε 8" in out and "left   ε 8" in out and "spent  ε 0" in out


def test_create_does_not_touch_what_is_there(ledger, capsys):
    for epsilon in ("8", "9"):
        assert main(["ledger", "create", ledger, "--epsilon", epsilon, "--delta", "1e-5"]) == 2
        assert "is a ledger already" in capsys.readouterr().err
    assert Ledger.open(ledger).total.epsilon == 8


@pytest.mark.parametrize("wrong", [["--epsilon", "0", "--delta", "1e-5"], ["--epsilon", "1", "--delta", "2"]])
def test_create_refuses_what_is_no_budget(tmp_path, capsys, wrong):
    assert main(["ledger", "create", str(tmp_path / "x.db"), *wrong]) == 2
    assert capsys.readouterr().err.startswith("sfumato: error:")
    assert not (tmp_path / "x.db").exists()


def test_show_lists_charges_and_refusals(ledger, capsys):
    from sfumato.errors import BudgetError

    reservation = reserve(ledger)
    reservation.begin("dp_sgd", STEP, 3)
    with pytest.raises(BudgetError):
        Ledger.open(ledger).reserve("too much", [PlannedEvent("sum", "", GaussianDpEvent(0.1))], delta=1e-6)
    assert main(["ledger", "show", ledger]) == 0
    out = capsys.readouterr().out
    assert reservation.id in out and "dp_sgd: 3 of 10 begun; 10 steps" in out and "too much" in out


def test_show_of_nothing_creates_nothing(tmp_path, capsys):
    assert main(["ledger", "show", str(tmp_path / "none.db")]) == 2
    assert "none.db" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()


def test_verify_finds_tampering(ledger, capsys):
    reserve(ledger)
    head = Ledger.open(ledger).head
    assert main(["ledger", "verify", ledger, "--head", head]) == 0
    assert "intact: 2 rows" in capsys.readouterr().out
    assert main(["ledger", "verify", ledger, "--head", "f" * 64]) == 1
    with sqlite3.connect(ledger) as db:
        text = db.execute("select body from sfumato_entries where seq = 1").fetchone()[0]
        body = json.loads(text) | {"epsilon": 0.001}
        db.execute("update sfumato_entries set body = ? where seq = 1", (json.dumps(body),))
    assert main(["ledger", "verify", ledger]) == 1
    assert "NOT intact" in capsys.readouterr().out


def test_close_keeps_what_began_and_gives_back_only_on_the_owners_word(tmp_path, capsys):
    spent = {}
    for name, more in (("a", []), ("b", ["--outputs-unseen"])):
        where = str(tmp_path / name)
        main(["ledger", "create", where, "--epsilon", "8", "--delta", "1e-5"])
        reservation = reserve(where)
        full = reservation.epsilon
        reservation.begin("dp_sgd", STEP, 2)
        assert main(["ledger", "close", where, reservation.id[:6], *more]) == 0
        spent[name] = Ledger.open(where).spent.epsilon
    assert spent["a"] == pytest.approx(full) and 0 < spent["b"] < full
    assert main(["ledger", "close", where, reservation.id]) == 0
    assert "settled already" in capsys.readouterr().out


def test_close_names_an_unknown_charge(ledger, capsys):
    assert main(["ledger", "close", ledger, "nope"]) == 2
    assert "no charge has this id; nothing was changed" in capsys.readouterr().err


def test_unknown_action_and_help(capsys):
    assert main(["ledger", "verfy"]) == 2
    assert "Did you mean `sfumato ledger verify`?" in capsys.readouterr().err
    assert main(["ledger", "--help"]) == 0
    assert "close LEDGER RESERVATION" in capsys.readouterr().out
    assert main(["ledger"]) == 2


@pytest.fixture
def release(ledger, tmp_path):
    reservation = reserve(ledger)
    for planned in PLAN:
        reservation.begin(planned.mechanism, planned.event, planned.count)
    reservation.settle()
    certified = certificate(
        [reservation],
        unit="image",
        public_size=1000,
        budget=Budget(8, 1e-5),
        software={"sfumato": "0"},
        ledger_head=Ledger.open(ledger).head,
    )
    folder = tmp_path / "run" / "release"
    folder.mkdir(parents=True)
    (folder / "privacy.json").write_text(json.dumps(certified))
    return folder


def test_verify_recomputes_a_release(release, capsys):
    for target in (release, release.parent, release / "privacy.json"):
        assert main(["ledger", "verify", str(target)]) == 0
        assert capsys.readouterr().out.startswith("holds: claimed ε")


def test_verify_catches_a_release_that_claims_too_little(release, capsys):
    certified = json.loads((release / "privacy.json").read_text())
    certified["reservations"][0]["events"][1]["event"]["event"]["event"]["noise_multiplier"] /= 2
    (release / "privacy.json").write_text(json.dumps(certified))
    assert main(["ledger", "verify", str(release)]) == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_verify_of_what_is_no_certificate(tmp_path, capsys):
    (tmp_path / "privacy.json").write_text("{]")
    assert main(["ledger", "verify", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["ledger", "verify", str(tmp_path / "empty")]) == 2
    assert "there is no privacy.json" in capsys.readouterr().err
    (tmp_path / "privacy.json").write_text("{}")
    assert main(["ledger", "verify", str(tmp_path)]) == 1
