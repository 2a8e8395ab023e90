"""Settings are measured, remembered per machine, and never needed."""

from __future__ import annotations

import json

import pytest

import sfumato.machine as machine


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS_PER_SETTING", 0.0)
    monkeypatch.setattr(machine, "_busy", lambda: False)


def test_measures_once_and_remembers(tmp_path, quick, monkeypatch):
    import torch

    threads = torch.get_num_threads()
    cache = tmp_path / "deep" / "machine.json"
    found = machine.best_defaults(cache)
    assert torch.get_num_threads() == threads
    assert 1 <= found.threads <= machine.cores()
    assert found.public_dtype in ("float32", "bfloat16") and found.engine in ("fast", "exact")
    monkeypatch.setattr(machine, "_measure", lambda: pytest.fail("measured again"))
    assert machine.best_defaults(cache) == found


@pytest.mark.parametrize("content", ["", "{}", '{"key": "of another machine", "defaults": {}}'])
def test_useless_caches_are_replaced(tmp_path, quick, monkeypatch, content):
    cache = tmp_path / "machine.json"
    cache.write_text(content)
    new = machine.Defaults(1, "cpu", "float32", "fast", "now")
    monkeypatch.setattr(machine, "_measure", lambda: new)
    assert machine.best_defaults(cache) == new
    assert json.loads(cache.read_text())["defaults"]["engine"] == "fast"


def test_a_cache_that_cannot_be_written_and_a_busy_machine_do_no_harm(tmp_path, monkeypatch):
    new = machine.Defaults(1, "cpu", "float32", "fast", "now")
    monkeypatch.setattr(machine, "_measure", lambda: new)
    monkeypatch.setattr(machine, "_busy", lambda: False)
    (tmp_path / "file").write_text("")
    assert machine.best_defaults(tmp_path / "file" / "machine.json") == new
    monkeypatch.setattr(machine, "_busy", lambda: True)
    assert machine.best_defaults(tmp_path / "machine.json") == new
    assert not (tmp_path / "machine.json").exists()


def test_another_setting_must_be_clearly_faster():
    assert machine._faster({"fast": 1.0, "exact": 0.95}, "fast") == "fast"
    assert machine._faster({"fast": 1.0, "exact": 0.5}, "fast") == "exact"


def test_report_is_plain_facts():
    report = machine.machine_report()
    json.dumps(report)
    assert report["cores"] >= 1 and report["packages"]["torch"] != "missing"
