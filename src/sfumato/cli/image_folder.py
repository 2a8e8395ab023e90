"""A folder of made images that a verb writes: new, and there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import InputError


def new_folder(out: str) -> Path:
    """The folder to write; InputError when it holds something."""
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--out {path} already holds something; choose another folder.")
    return path


def write_images(out: Path, images: Any, labels: Any, label_names: Sequence[str]) -> None:
    """Write uint8 [N, H, W, C] as `ReleaseWriter.images` does, in one step."""
    from sfumato.data.release import ReleaseWriter

    working = out.with_name(out.name + ".partial")
    writer = ReleaseWriter(working)
    writer.images(images, labels, label_names)
    complete = writer.complete()
    if out.exists():
        out.rmdir()
    os.replace(complete / "images", out)
    shutil.rmtree(working, ignore_errors=True)
