from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the cache of whoever runs it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "sfumato"


@pytest.fixture
def png() -> Callable[..., bytes]:
    """`png(value)`: a grey 4×4 PNG of one value."""

    def make(value: int = 0, size: int = 4) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(np.full((size, size), value, np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    return make


@pytest.fixture
def make_folder(tmp_path: Path, png: Callable[..., bytes]) -> Callable[..., Path]:
    """`make_folder({"cat/a.png": 3, "b.txt": b"..."}, rows=[...])`: numbers become PNGs, rows metadata."""

    def make(
        files: dict[str, int | bytes], rows: Iterable[object] | None = None, name: str = "photos"
    ) -> Path:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        for relative, content in files.items():
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else png(content))
        if rows is not None:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (root / "metadata.jsonl").write_text(os.linesep.join(lines) + "\n", encoding="utf-8")
        return root

    return make
