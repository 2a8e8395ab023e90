"""`sfumato evaluate`: help without weight, one-line refusals, and the table it prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sfumato.cli.evaluate import table
from sfumato.cli.main import VERBS, main

FIGURES = {
    "frechet": 12.345678, "kid": 0.000123, "kid_interval": [-0.1, 0.1], "precision": 0.9, "recall": 0.8, "density": 1.1,
    "coverage": 0.7, "authenticity": 0.45, "fld": 3.21, "warnings": ["rank-deficient"],
}  # fmt: skip


@pytest.fixture
def summary():
    accuracy = {"mean": 0.861, "std": None, "seeds": [0.861]}
    return {
        "features": {"pixels": FIGURES | {"attainable": FIGURES | {"frechet": 0.5}}},
        "accuracy": {"cnn": accuracy, "mean": accuracy | {"std": 0.004}},
        "ceiling": {"accuracy": {"cnn": accuracy | {"mean": 0.95}}},
        "notes": ["3 copies"],
    }


def test_the_verb_is_known():
    assert "evaluate" in VERBS


def test_help_names_every_option_and_loads_nothing_heavy():
    probe = (
        "from sfumato.cli.main import main\ntry: main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
        "import sys\nprint('HEAVY', [m for m in ('torch', 'numpy', 'sklearn', 'scipy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("HEAVY []"), done.stderr
    for option in ("--against", "--holdout", "--features", "--out", "--seeds", "--reference-is-public"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--against"),
        (["images"], "--against"),
        (["images", "--against", "real", "--seeds", "0"], "--seeds 0"),
        (["images", "--against", "real", "--channels", "2"], "--channels"),
        (["nowhere", "--against", "real"], "nowhere"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sfumato: error:") and says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_table_has_every_figure_and_what_is_attainable_below(summary):
    lines = table(summary)
    assert lines[0].split() == ["FD", "KID", "precision", "recall", "density", "coverage", "authentic", "FLD"]
    assert lines[1].split() == [
        "pixels",
        "12.35",
        "0.000123",
        "0.9000",
        "0.8000",
        "1.1000",
        "0.7000",
        "0.4500",
        "3.2100",
    ]
    assert lines[2].strip().startswith("held-out real") and lines[2].split()[2] == "0.5000"
    text = "\n".join(lines)
    assert "CNN" in text and "86.1 %" in text and "95.0 %" in text and "86.1 ± 0.4 %" in text
    assert "note: 3 copies" in lines and "note: pixels: rank-deficient" in lines


def test_the_table_without_holdout_or_accuracy(summary):
    figures = {key: value for key, value in FIGURES.items() if key != "fld"}
    text = "\n".join(table(summary | {"features": {"pixels": figures}, "accuracy": {}, "ceiling": {}}))
    assert "held-out" not in text and text.splitlines()[1].endswith("-")
