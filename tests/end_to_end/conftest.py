"""Runs of the whole command on tiny data, in this process (fast) or in one of their own (to be killed)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent


def _tiny():
    spec = importlib.util.spec_from_file_location("sfumato_tiny_runs", HERE / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = _tiny()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Private (2 labels), public (4 classes) and held-out images, each 8x8 grey in an npz."""
    folder = tmp_path_factory.mktemp("sensitive-place")
    return SimpleNamespace(
        folder=folder,
        private=str(TINY.write_images(folder / "secretname.npz", [0, 1], per_label=80, seed=1)),
        unlabelled=str(TINY.write_images(folder / "plain.npz", [0, 1], per_label=80, seed=1, labelled=False)),
        public=str(TINY.write_images(folder / "atlas.npz", [0, 1, 2, 3], per_label=40, seed=2)),
        holdout=str(TINY.write_images(folder / "held.npz", [0, 1], per_label=20, seed=3)),
    )


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Call `sfumato ARGUMENTS` in this process, with tiny settings; returns its exit status."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ExitStack() as stack:
        for patch in TINY.settings():
            stack.enter_context(patch)
        from sfumato.cli.main import main

        yield lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture
def in_own_process(tmp_path):
    """Call `sfumato ARGUMENTS` in a process that stops itself at `moment` ("-": never)."""

    def call(moment, *arguments):
        return subprocess.run(
            [sys.executable, HERE / "tiny.py", moment, *map(str, arguments)], capture_output=True, text=True,
            timeout=400, cwd=tmp_path,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return call
