"""A run that is killed or stopped at any moment: what began stays spent, the same command finishes the job."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from sfumato.privacy.ledger import Ledger

EPSILON = 2.0


@pytest.fixture
def command(data, tmp_path):
    out = tmp_path / "run"
    return out, (
        "synthesize", data.private, "--public", data.public, "--epsilon", EPSILON, "--public-size", 160,
        "--delta", 1e-5, "--num-images", 6, "--out", out,
    )  # fmt: skip


def ledger(out):
    found = Ledger.open(out / "internal" / "ledger.db")
    found.verify()
    assert found.spent.epsilon <= EPSILON * (1 + 1e-9)
    return found


def complete_and_right(out, tiny, capsys):
    claim = json.loads((out / "release" / "privacy.json").read_text())
    assert 0.95 * EPSILON < claim["epsilon"] <= EPSILON * (1 + 1e-9)
    counts = [e["event"].get("count", 1) for p in claim["reservations"] for e in p["events"]]
    assert counts[-1] == 6
    assert ledger(out).spent.epsilon == pytest.approx(claim["epsilon"])
    capsys.readouterr()
    assert tiny("ledger", "verify", out / "release") == 0
    assert len(list((out / "release" / "images").rglob("*.png"))) == 6
    assert not (out / "release.partial").exists()


@pytest.mark.parametrize(
    ("moment", "queries", "steps"),
    [
        ("query training", 0, 0),
        ("public training", 1, 0),
        ("step", 1, 3),
        ("generation", 1, 6),
        ("release", 1, 6),
    ],
)
def test_killed_then_resumed(command, tiny, in_own_process, capsys, moment, queries, steps):
    out, arguments = command
    done = in_own_process(moment, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (reservation,) = ledger(out).reservations()
    assert reservation.begun("semantic_histogram") == queries and reservation.begun("dp_sgd") == steps
    assert ledger(out).spent.epsilon > 0.95 * EPSILON and not (out / "release").exists()
    assert tiny(*arguments) == 0
    assert [each.id for each in ledger(out).reservations()] == [reservation.id]
    assert reservation.begun("dp_sgd") == 6 and reservation.begun("semantic_histogram") == 1
    complete_and_right(out, tiny, capsys)
    stages = (out / "release" / "report.html").read_text()
    assert all(stage in stages for stage in ("semantic query", "public training", "DP-SGD", "generation"))


def test_killed_between_the_charge_and_the_answer(command, tiny, in_own_process, capsys):
    out, arguments = command
    done = in_own_process("answer", *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (reservation,) = ledger(out).reservations()
    assert reservation.begun("semantic_histogram") == 1
    for _ in range(2):  # asking again would be a second answer at the price of one
        assert tiny(*arguments) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "cost is spent and the answer is lost" in said and "another --out" in said
    assert reservation.begun("semantic_histogram") == 1 and reservation.begun("dp_sgd") == 0
    assert tiny("ledger", "close", out / "internal" / "ledger.db", reservation.id, "--outputs-unseen") == 0
    assert 0 < ledger(out).spent.epsilon < 0.9 * EPSILON


def test_ctrl_c_in_the_middle_of_dp_sgd(command, tiny, in_own_process, capsys):
    out, arguments = command
    done = in_own_process("steps^C", *arguments)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "sfumato: interrupted. Run the same command again to resume."
    (reservation,) = ledger(out).reservations()
    assert reservation.begun("dp_sgd") == 4
    assert tiny(*arguments) == 0
    complete_and_right(out, tiny, capsys)


def test_an_interrupted_evaluation_keeps_the_release(
    command, data, tiny, in_own_process, capsys, monkeypatch
):
    out, arguments = command
    arguments = (*arguments, "--holdout", data.holdout)
    assert in_own_process("evaluation^C", *arguments).returncode == 130
    made = {p: p.stat().st_mtime_ns for p in (out / "release").rglob("*") if p.is_file()}
    assert made
    head = ledger(out).head
    monkeypatch.setattr(
        "sfumato.synthesis.privimage.PrivImage.generate",
        lambda *_, **__: pytest.fail("images were drawn again"),
    )
    assert tiny(*arguments) == 0
    assert "real data (ceiling)" in capsys.readouterr().out
    assert made == {p: p.stat().st_mtime_ns for p in (out / "release").rglob("*") if p.is_file()}
    assert ledger(out).head == head


def test_private_images_gone_at_resume_forget_nothing(command, data, tiny, in_own_process, capsys):
    out, arguments = command
    assert in_own_process("step", *arguments).returncode == -signal.SIGKILL
    moved = Path(data.private).with_suffix(".moved")
    os.rename(data.private, moved)
    try:
        assert tiny(*arguments) == 2
        assert "no budget was spent" in capsys.readouterr().err
    finally:
        os.rename(moved, data.private)
    assert tiny(*arguments) == 0
    assert len(ledger(out).reservations()) == 1
    complete_and_right(out, tiny, capsys)


@pytest.mark.parametrize("place", ["count", "steps"])
def test_a_count_that_was_bought_is_not_bought_twice(data, tiny, in_own_process, tmp_path, capsys, place):
    out = tmp_path / "run"
    arguments = (
        "synthesize",
        data.private,
        "--method",
        "dpdm",
        "--epsilon",
        EPSILON,
        "--num-images",
        6,
        "--out",
        out,
    )
    assert in_own_process(place, *arguments).returncode == -signal.SIGKILL
    if place == "count":  # charged, and the answer lost
        assert tiny(*arguments) == 2
        assert "answer is lost" in capsys.readouterr().err
        assert [each.label for each in ledger(out).reservations()] == ["count"]
        return
    assert tiny(*arguments) == 0
    assert [each.label for each in ledger(out).reservations()] == ["count", "synthesize"]
    complete_and_right(out, tiny, capsys)


@pytest.mark.parametrize("where", ["checkpoint", "images", "release"])
def test_a_full_disk_loses_nothing(command, tiny, capsys, monkeypatch, where):
    out, arguments = command
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_, **__):
        raise full

    with monkeypatch.context() as patch:
        target = {
            "checkpoint": "sfumato.privacy.dp_sgd.save_checkpoint",
            "images": "sfumato.synthesis.run.np.savez",
            "release": "sfumato.data.release.Image.Image.save",
        }[where]
        patch.setattr(target, refuse)
        assert tiny(*arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sfumato: error:") and "disk is full" in said and "free some space" in said
    spent = ledger(out).spent.epsilon
    assert spent > 0.9 * EPSILON and not (out / "release").exists()
    assert tiny(*arguments) == 0
    assert ledger(out).spent.epsilon == spent
    complete_and_right(out, tiny, capsys)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs a small file system")
def test_a_disk_that_is_really_full(command, data, tiny, tmp_path, capsys):
    """A file system of a few hundred kilobytes more each time: one line, then the same command goes on."""
    _, arguments = command
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    out = small / "run"
    arguments = (*arguments[:-1], out)
    failures, size, status = 0, 300, 2
    try:
        while status and size < 20_000:
            status = tiny(*arguments)
            said = capsys.readouterr().err.splitlines()
            if status:
                assert status == 2 and said[-1].startswith("sfumato: error:"), said[-1]
                assert "full" in said[-1] or "space" in said[-1], said[-1]
                failures, size = failures + 1, size + 200
                subprocess.run(["mount", "-o", f"remount,size={size}k", small], check=True)
        assert status == 0 and failures >= 3
        complete_and_right(out, tiny, capsys)
    finally:
        subprocess.run(["umount", "-l", small], check=True)
