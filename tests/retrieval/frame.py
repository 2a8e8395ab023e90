"""A small joint space for tests: texts and images become unit vectors of 16 numbers by fixed random projections."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from sfumato.retrieval.public_side import PublicSide

DIMENSION, SIDE = 16, 8


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class FakeEncoder:
    """Follows `TextImageEncoder`: an image's vector is a projection of its pixels, a text's one drawn from its hash."""

    name, dimension, size = "fake", DIMENSION, (SIDE, SIDE)

    def __init__(self, identity: str = "a" * 64) -> None:
        self.identity = identity
        self._weights = np.random.default_rng(5).normal(size=(SIDE * SIDE * 3, DIMENSION))

    def images(self, images: np.ndarray) -> np.ndarray:
        flat = np.asarray(images, np.float64).reshape(len(images), -1) - 127.5
        return unit(np.stack([row @ self._weights for row in flat]))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
        return unit(np.stack([np.random.default_rng(seed).normal(size=DIMENSION) for seed in seeds]))


class FakeGenerator:
    """Follows `RetrievalGenerator`: pictures whose colour is the condition's first numbers."""

    def generate(
        self, vector: np.ndarray, noise: float, n: int, *, seed: int, steps: int = 25, guidance: float = 2.0
    ) -> np.ndarray:
        colour = np.clip(128 + 100 * np.asarray(vector[:3]), 0, 255).astype(np.uint8)
        return np.broadcast_to(colour, (n, SIDE, SIDE, 3)).copy()


def clustered(count: int, seed: int) -> np.ndarray:
    """Unit vectors around eight common centres, float32 [N, 16]."""
    centers = np.random.default_rng(1).normal(size=(8, DIMENSION))
    rng = np.random.default_rng(seed)
    return unit(centers[rng.integers(8, size=count)] + 0.5 * rng.normal(size=(count, DIMENSION)))


def public_side(count: int = 400, identity: str = "a" * 64) -> PublicSide:
    return PublicSide.of(clustered(count, 2), clustered(60, 3), identity)
