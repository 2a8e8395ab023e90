"""An index over a fake joint space, made by the real commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.retrieval import build, codebook, collection, draw
from sfumato.retrieval.options import IndexOptions
from tests.retrieval.frame import SIDE, FakeEncoder, FakeGenerator, public_side


@pytest.fixture
def encoder(monkeypatch, tmp_path) -> FakeEncoder:
    """Stands for the embedded encoder, generator and public vectors everywhere."""
    fake, public = FakeEncoder(), tmp_path / "public.safetensors"
    public_side().save(public)

    def opened(spec: str = "portraits") -> FakeEncoder:
        return fake if spec == "portraits" else FakeEncoder("b" * 64)

    for module in (build, collection, codebook):
        monkeypatch.setattr(module, "open_text_image_encoder", opened)
    monkeypatch.setattr(build, "embedded_public", lambda: public)
    monkeypatch.setattr(draw, "open_generator", lambda spec, encoder: FakeGenerator())
    return fake


def pictures(folder: Path, count: int, seed: int = 0, first: int = 0) -> Path:
    """Random small images named 0000.png and on, around a few shades."""
    rng = np.random.default_rng(seed)
    shades = rng.integers(0, 256, (6, 1, 1, 3))
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        noise = rng.normal(scale=40, size=(SIDE, SIDE, 3))
        Image.fromarray(np.clip(shades[number % 6] + noise, 0, 255).astype(np.uint8)).save(
            folder / f"{number:04d}.png"
        )
    return folder


@pytest.fixture
def made(encoder, tmp_path) -> Callable[..., Path]:
    """Make an index of 60 images with these options; returns its folder."""

    def make(name: str = "index", **options: Any) -> Path:
        private = pictures(tmp_path / "private", 60)
        given: dict[str, Any] = {
            "epsilon": 5.0,
            "queries": 3,
            "public_size": 60,
            "size": SIDE,
            "share": 0.1,
            **options,
        }
        if given.get("mechanism") == "topk":
            given.pop("share")
        build.build_index(IndexOptions(str(private), out=str(tmp_path / name), **given))
        return tmp_path / name

    return make
