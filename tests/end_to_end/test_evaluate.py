"""A tiny run from `sfumato synthesize` to `sfumato evaluate`, killed in the middle too."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from sfumato.evaluation import run as module

BANNER = "NOT DIFFERENTIALLY PRIVATE. NOT FOR RELEASE."


@pytest.fixture
def quick(monkeypatch):
    """Logistic regression alone: what networks are trained for is tested where they are."""
    only = partial(module.downstream_accuracies, classifiers=("logistic-regression",))
    monkeypatch.setattr(module, "downstream_accuracies", only)


@pytest.fixture
def release(data, tiny, tmp_path):
    """A complete run of public-only: nothing of DP-SGD is needed here."""
    out = tmp_path / "run"
    assert tiny("synthesize", data.private, "--public", data.public, "--method", "public-only", "--epsilon", 2,
                "--public-size", 160, "--num-images", 24, "--out", out) == 0  # fmt: skip
    return out


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_is_measured_for_its_owner(data, tiny, quick, release, capsys):
    before = tree(release / "release")
    command = (
        "evaluate",
        release,
        "--against",
        data.private,
        "--holdout",
        data.holdout,
        "--features",
        "pixels",
    )
    capsys.readouterr()
    assert tiny(*command) == 0
    said = capsys.readouterr()
    assert "NOT differentially private" in said.out and "pixels" in said.out and "report.html" in said.out
    folder = release / "internal" / "evaluation"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["not_for_release"] is True
    assert {"frechet", "kid", "precision", "recall", "density", "coverage"} <= set(
        summary["features"]["pixels"]
    )
    assert 0 <= summary["accuracy"]["logistic-regression"]["mean"] <= 1
    assert summary["synthetic"]["images"] == 24 and summary["label_names"] == ["0", "1"]
    page = (folder / "report.html").read_text()
    assert page.startswith("<!-- not for release -->") and BANNER in page
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert tree(release / "release") == before  # nothing private went there

    again = tree(folder)
    assert tiny(*command) == 0
    assert "everything was known" in capsys.readouterr().err
    assert tree(folder) == again


def test_figures_on_public_images_may_be_handed_on(data, tiny, quick, release, capsys):
    command = [
        "evaluate",
        release,
        "--holdout",
        data.holdout,
        "--features",
        "pixels",
        "--reference-is-public",
    ]
    assert tiny(*command, "--against", data.private) == 2
    assert "are the same, or one holds the other" in capsys.readouterr().err
    assert not (release / "release" / "evaluation").exists()
    np.savez(data.folder / "outside.npz", **np.load(data.public))
    assert tiny("evaluate", release, "--against", data.folder / "outside.npz", "--features", "pixels",
                "--reference-is-public") == 0  # fmt: skip
    assert "declared to be public" in capsys.readouterr().out
    folder = release / "release" / "evaluation"
    assert {path.name for path in folder.iterdir()} == {"summary.json", "report.html"}
    page = (folder / "report.html").read_text()
    assert BANNER not in page and "declared to be public by the owner" in page
    for secret in ("secretname", "sensitive-place", "not_for_release"):
        assert secret not in page and secret not in (folder / "summary.json").read_text()
    assert tiny("ledger", "verify", release) == 0  # the release is as valid as before


KILLED = """
import os, signal, sys
from sfumato.evaluation import accuracy
from sfumato.progress import Progress
accuracy.FEWEST_STEPS = accuracy.MOST_STEPS = 6
advance = Progress.advance
def advanced(self, n=1, note=""):
    advance(self, n, note)
    if self.description.startswith(sys.argv[1]) and self.done >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
Progress.advance = advanced
from sfumato.cli.main import main
raise SystemExit(main(sys.argv[2:]))
"""


def test_killed_while_classifiers_train(data, tmp_path):
    images = tmp_path / "made.npz"
    with np.load(data.public) as kept:
        np.savez(images, images=kept["images"][:80], labels=kept["labels"][:80])
    command = ("evaluate", images, "--against", data.private, "--holdout", data.holdout, "--features", "pixels",
               "--out", tmp_path / "out")  # fmt: skip

    def call(moment):
        return subprocess.run(
            [sys.executable, "-c", KILLED, moment, *map(str, command)], capture_output=True, text=True, timeout=400,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    killed = call("synthetic: mlp")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "out" / "internal" / "evaluation"
    assert not (folder / "summary.json").exists()
    figures = (folder / "measured.json").read_bytes()
    assert b"frechet" in figures and list(json.loads((folder / "accuracies.json").read_text()))
    features = {path: path.stat().st_mtime_ns for path in folder.rglob("features.f32")}
    done = call("never")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"logistic-regression", "mlp", "cnn", "resnet", "mean"}
    assert (folder / "measured.json").read_bytes() == figures
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("features.f32")} == features
    assert "synthetic: mlp" in done.stderr and "synthetic: logistic-regression" not in done.stderr
