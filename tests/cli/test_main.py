"""The command itself: verbs, one-line errors, exit statuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import types

import pytest

from sfumato.cli import main as module
from sfumato.cli.main import VERBS, main
from sfumato.errors import BudgetError, InputError, LedgerError


@pytest.fixture
def verb(monkeypatch):
    """Replace what `sfumato synthesize` does by a function, to see how its end is told."""

    def replace(does):
        fake = types.SimpleNamespace(run=does)
        monkeypatch.setattr(module, "import_module", lambda name: fake)

    return replace


def raising(error):
    def run(arguments):
        raise error

    return run


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main([]) == 2


def test_version(capsys):
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sfumato {version('sfumato')}\n"


@pytest.mark.parametrize(
    ("typed", "meant"), [("synthesise", "synthesize"), ("leger", "ledger"), ("xyz", "--help")]
)
def test_an_unknown_verb_is_told_with_the_known_ones(capsys, typed, meant):
    assert main([typed]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("sfumato: error: unknown verb") and meant in error


@pytest.mark.parametrize("kind", [InputError, BudgetError, LedgerError])
def test_errors_are_one_line_and_status_two(capsys, verb, kind):
    verb(raising(kind("scan 7:\n  broken; no budget was spent")))
    assert main(["synthesize", "x"]) == 2
    assert capsys.readouterr().err == "sfumato: error: scan 7: broken; no budget was spent\n"


def test_interrupted(capsys, verb):
    verb(raising(KeyboardInterrupt()))
    assert main(["synthesize", "x"]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err.lower()


def test_a_full_disk_and_other_faults_of_the_system(capsys, verb):
    verb(raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a")))
    assert main(["synthesize", "x"]) == 2
    assert "runs/a: the disk is full" in capsys.readouterr().err
    verb(raising(PermissionError(errno.EACCES, "Permission denied", "secret.png")))
    assert main(["synthesize", "x"]) == 2
    error = capsys.readouterr().err
    assert "secret.png: Permission denied" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "said",
    [
        OSError("4096 requested and 12 written"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    ],
)
def test_a_full_disk_in_the_words_of_libraries(capsys, verb, said):
    verb(raising(said))
    assert main(["synthesize", "x"]) == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error and "free some space" in error and error.count("\n") == 1


def test_out_of_memory(capsys, verb):
    verb(raising(MemoryError()))
    assert main(["synthesize", "x"]) == 2
    assert "out of memory" in capsys.readouterr().err


def test_a_defect_of_the_program_keeps_its_traceback(verb):
    verb(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["synthesize", "x"])


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "sfumato", "nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("sfumato: error:")
