"""`sfumato checks` on this machine, and with a broken engine."""

from __future__ import annotations

import json

import pytest

from sfumato.cli import checks
from sfumato.cli.main import main


def test_the_engines_are_right_here(capsys):
    assert main(["checks"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "threads" in out
    assert out.count("right: largest relative error") == len(checks.ENGINES)


def test_as_json(capsys, monkeypatch):
    monkeypatch.setattr(checks, "ENGINES", ("fast",))
    assert main(["checks", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True and report["self_test"][0]["engine"] == "fast"


def test_a_planted_wrong_gradient_is_caught(monkeypatch, capsys):
    from sfumato.privacy import selfcheck

    right = selfcheck.per_unit_gradients

    def wrong(net, row_loss, rows, engine):
        gradients = right(net, row_loss, rows, engine)
        if engine == "fast":
            name = next(iter(gradients))
            gradients[name] = gradients[name] * 1.05
        return gradients

    monkeypatch.setattr(selfcheck, "per_unit_gradients", wrong)
    assert main(["checks"]) == 1
    out = capsys.readouterr().out
    assert "fast     WRONG" in out and "must not be run" in out


@pytest.mark.parametrize("engine", checks.ENGINES)
def test_the_self_test_alone(engine):
    assert checks.self_test(engine)["ok"]
