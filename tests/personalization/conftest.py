"""Tiny stock pipelines, written once a session, and models opened from them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Kind ("sd1", "sd2", "sdxl", "sdxl-largest") -> folder of its pipeline. Copy it before changing anything."""
    made = {
        "sd1": tiny.tiny_sd1, "sd2": tiny.tiny_sd2, "sdxl": tiny.tiny_sdxl,
        "sdxl-largest": lambda folder: tiny.tiny_sdxl(folder, pooled_by_largest=True),
    }  # fmt: skip

    @cache
    def folder(kind: str) -> Path:
        return made[kind](tmp_path_factory.mktemp("pipelines") / kind)

    return folder


@pytest.fixture(scope="session")
def model_of(folder_of):
    """(kind, vectors) -> `TextToImage`, shared by all tests: it is frozen, and tests must leave it so."""
    from sfumato.personalization.text_to_image import TextToImage

    @cache
    def model(kind: str, vectors: int = 1) -> TextToImage:
        return TextToImage.open(str(folder_of(kind)), vectors=vectors)

    return model


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No measuring of the machine, and contact sheets of one sampling step."""
    from sfumato import machine
    from sfumato.personalization import make_bank, run

    settings = machine.Defaults(1, "cpu", "float32", "fast", "")
    for module in (machine, run, make_bank):
        monkeypatch.setattr(module, "best_defaults", lambda *_: settings)
    monkeypatch.setattr(run, "SHEET_STEPS", 1)
