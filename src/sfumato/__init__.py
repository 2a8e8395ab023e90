"""Differentially private image generation on one persistent privacy ledger.

>>> from sfumato import Budget, Ledger, PrivImage, ProtectedImages, PublicImages

The names below are the public interface. Each is imported when first used, so `import sfumato` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.data.images import OwnerImages, ProtectedImages, PublicImages
    from sfumato.diffusion.generator import Generator
    from sfumato.privacy.budget import Budget
    from sfumato.privacy.ledger import Ledger
    from sfumato.synthesis.privimage import PrivImage

    __version__: str

_HOME = {
    "Budget": "sfumato.privacy.budget",
    "Generator": "sfumato.diffusion.generator",
    "Ledger": "sfumato.privacy.ledger",
    "OwnerImages": "sfumato.data.images",
    "PrivImage": "sfumato.synthesis.privimage",
    "ProtectedImages": "sfumato.data.images",
    "PublicImages": "sfumato.data.images",
}

__all__ = [
    "Budget",
    "Generator",
    "Ledger",
    "OwnerImages",
    "PrivImage",
    "ProtectedImages",
    "PublicImages",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sfumato")
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
