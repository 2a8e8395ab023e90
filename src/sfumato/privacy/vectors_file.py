"""Private vectors that were made elsewhere: an .npz with `vectors` [N, D], `ids` [N] and, for owners, `group_id`
[N]."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.data.records import bad_source
from sfumato.privacy.answers import Answers
from sfumato.privacy.protected_vectors import ProtectedVectors

if TYPE_CHECKING:
    from sfumato.privacy.ledger import Ledger

_REMEDY = "give an .npz with vectors [N, D] of length 1, ids [N], and group_id [N] for --unit group"


def is_vectors_file(spec: str) -> bool:
    """Whether this is an .npz that holds `vectors`."""
    path = Path(spec)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as held:
            return "vectors.npy" in held.namelist()
    except (zipfile.BadZipFile, OSError):
        return False


def add_file(private: ProtectedVectors, spec: str, unit: str) -> None:
    """Add what the file holds. InputError, and nothing added, for anything that does not fit."""
    vectors, names, units = _read(spec, unit)
    private.add(vectors, names, units)


def count_file(spec: str, unit: str, ledger: Ledger, answers: Answers, epsilon: float) -> tuple[int, float]:
    """The noisy number of units in the file and what it cost: (ε, 0)-DP for adding or removing one unit."""
    _, _, units = _read(spec, unit)
    held: Any = SimpleNamespace(_units=sorted(set(units)), ledger=ledger)
    return answers.count(held, epsilon)


def _read(spec: str, unit: str) -> tuple[np.ndarray, list[str], list[str]]:
    try:
        with np.load(spec, allow_pickle=False) as held:
            vectors = held["vectors"]
            ids = [str(name) for name in held["ids"].tolist()]
            groups = [str(name) for name in held["group_id"].tolist()] if "group_id" in held else None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise bad_source(
            spec, f"holds no vectors that can be read ({type(error).__name__})", _REMEDY
        ) from None
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating) or not len(vectors):
        raise bad_source(spec, f"has vectors of {vectors.dtype} {list(vectors.shape)}", _REMEDY)
    if len(ids) != len(vectors) or (groups is not None and len(groups) != len(vectors)):
        raise bad_source(spec, "does not give each vector one id (and one group_id)", _REMEDY)
    if unit == "group" and groups is None:
        raise bad_source(spec, "has no group_id", "add it, or use --unit image")
    if unit == "group" and groups is not None:
        return vectors, ids, [f"group {name}" for name in groups]
    return vectors, ids, [f"image {name}" for name in ids]
