"""`sfumato canaries`: help without weight, what it prints, one-line refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from sfumato.audit.canaries import check_training, open_sealed
from sfumato.cli.canaries import run
from sfumato.cli.main import VERBS, main


@pytest.fixture(autouse=True)
def verb(tmp_path, monkeypatch):
    monkeypatch.setitem(VERBS, "canaries", "plant")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def private(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "private.npz", images=images, labels=np.arange(50) % 2)
    return "private.npz"


@pytest.mark.parametrize("arguments", [["--help"], ["plant", "--help"]])
def test_help_is_quick_and_loads_nothing_heavy(arguments):
    probe = (
        "import time, sys\nstart = time.process_time()\nfrom sfumato.cli.canaries import run\n"
        f"try: run({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'numpy', 'sklearn', 'scipy', 'PIL') if m in sys.modules]\n"
        "print('HEAVY', heavy, time.process_time() - start < 0.5)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("HEAVY [] True"), done.stdout[-300:] + done.stderr
    assert "plant" in done.stdout
    if "plant" in arguments:
        options = ("--count", "--out", "--kind", "--delta", "--size", "--channels", "--skip-unreadable")
        assert all(option in done.stdout for option in options)


@pytest.mark.parametrize(("kind", "expected"), [("own", 30), ("pattern", 70)])
def test_it_plants_and_says_what_to_do_next(private, kind, expected, capsys):
    assert main(["canaries", "plant", private, "--count", "40", "--out", "planted", "--kind", kind]) == 0
    said = capsys.readouterr().out
    sealed = open_sealed("planted")
    check_training(sealed, "planted/train")
    assert len(sealed) == 40 and sealed.kind == kind
    assert f"seal {sealed.identity[:16]}" in said and f"ε {sealed.cap:.2f} at most" in said
    assert f"{sealed.audit_cap:.2f}" in said and "ε 1: 2" in said and "ε 8: no number" in said
    assert f"sfumato synthesize planted/train --public-size {expected} " in said
    assert "sfumato audit RUN --train planted/train --holdout HELD --canaries planted/sealed.json" in said
    assert "not for release" in said
    assert main(["canaries", "plant", private, "--count", "40", "--out", "other", "--kind", kind]) == 0
    again = capsys.readouterr().out.replace("other", "planted")
    seals = sealed.identity[:16], open_sealed("other").identity[:16]
    assert said.replace(seals[0], "") == again.replace(seals[1], "")  # it tells nothing of the coins


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plant"], "--count"),
        (["plant", "private.npz", "--count", "0", "--out", "x"], "--count 0"),
        (["plant", "private.npz", "--count", "49", "--out", "x"], "--count 49 is more than the 48 images"),
        (["plant", "private.npz", "--count", "5", "--out", "x", "--delta", "1"], "--delta 1.0"),
        (["plant", "private.npz", "--count", "5", "--out", "x", "--size", "2"], "--size 2"),
        (["plant", "private.npz", "--count", "5", "--out", "x", "--kind", "nice"], "--kind"),
        (["plant", "nowhere", "--count", "5", "--out", "x"], "nowhere"),
        (["plnt"], "Did you mean `sfumato canaries plant`?"),
        (["show"], "unknown action 'show'"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(private, arguments, says, capsys, tmp_path):
    assert main(["canaries", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sfumato: error:") and says in error
    assert not (tmp_path / "x").exists()


def test_no_release_may_hold_it(private, capsys, tmp_path):
    (tmp_path / "release" / "images").mkdir(parents=True)
    (tmp_path / "release" / "privacy.json").write_text("{}")
    assert main(["canaries", "plant", private, "--count", "5", "--out", "release/canaries"]) == 2
    assert "lies inside the release" in capsys.readouterr().err
    assert run([]) == 2 and "actions:" in capsys.readouterr().out
