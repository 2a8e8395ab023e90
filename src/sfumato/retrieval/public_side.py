"""The public half of every question: what is near a prompt among public vectors, and directions in which vectors
differ.

Everything here is public and free. A prompt's ball is given by it alone: the threshold is the similarity of the public
neighbour of some rank, the centre is the mean of the public neighbours up to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sfumato.errors import InputError
from sfumato.privacy.private_query import Ball

FORMAT = "sfumato-public-vectors/1"
MOST_DIRECTIONS = 64
_FEWEST = 50  # public vectors, below which neither thresholds nor directions mean anything


@dataclass(frozen=True)
class PublicSide:
    """vectors: float32 [P, D], unit vectors of public images. prompts: float32 [Q, D], those of texts like the ones
    that will be asked, for planning. encoder: identity of the encoder that made both. directions: float32 [D, K], the
    first principal directions of the vectors, most variance first."""

    vectors: np.ndarray
    prompts: np.ndarray
    encoder: str
    directions: np.ndarray

    def __post_init__(self) -> None:
        if len(self.vectors) < _FEWEST or len(self.prompts) < 2:
            raise InputError(
                f"{len(self.vectors)} public images and {len(self.prompts)} texts are too few to plan with; no "
                "budget was "
                f"spent. Give --public at least {_FEWEST} images, and more than one prompt"
            )

    @classmethod
    def of(cls, vectors: np.ndarray, prompts: np.ndarray, encoder: str) -> PublicSide:
        """With the principal directions of these vectors (64 at most)."""
        centred = vectors.astype(np.float64) - vectors.mean(0)
        _, found = np.linalg.eigh(centred.T @ centred)
        directions = np.ascontiguousarray(found[:, ::-1][:, :MOST_DIRECTIONS], np.float32)
        return cls(_unit(vectors), _unit(prompts), encoder, directions)

    @property
    def dimension(self) -> int:
        """D."""
        return self.vectors.shape[1]

    def neighbours(self, direction: np.ndarray, count: int) -> np.ndarray:
        """Rows of the `count` public vectors nearest to a direction, nearest first."""
        scores = self.vectors @ np.asarray(direction, np.float32)
        best = np.argpartition(-scores, min(count, len(scores)) - 1)[:count]
        return best[np.argsort(-scores[best], kind="stable")]

    def center(self, direction: np.ndarray, count: int) -> np.ndarray:
        """Mean of the `count` nearest public vectors, float64 [D]."""
        return self.vectors[self.neighbours(direction, count)].astype(np.float64).mean(0)

    def count(self, share: float) -> int:
        """Vectors in a neighbourhood that holds this share of them; 8 at least."""
        return max(8, round(share * len(self.vectors)))

    def mean(self) -> np.ndarray:
        """Mean of all public vectors, float64 [D]."""
        return self.vectors.astype(np.float64).mean(0)

    def ball(self, direction: np.ndarray, count: int) -> Ball:
        """The ball that holds the `count` nearest public vectors, measured from their mean."""
        near = self.neighbours(direction, count)
        direction = np.asarray(direction, np.float64)
        threshold = float(self.vectors[near[-1]].astype(np.float64) @ direction)
        return Ball(direction, threshold, self.vectors[near].astype(np.float64).mean(0))

    def moved(self, mean: np.ndarray, covariance: np.ndarray) -> PublicSide:
        """The same public vectors, moved so that their mean and covariance are others, then to length 1 again.

        mean: float64 [D]. covariance: float64 [k, k], along the first k directions, which must be positive; the other
        directions are taken to be as much narrower, or wider. Moved by the affine map that moves a Gaussian the least
        (Olkin and Pukelsheim 1982), so what is near to what stays as much as it can. Post-processing of both: free.
        """
        basis, own = (
            self.directions[:, : len(covariance)].astype(np.float64),
            self.covariance(len(covariance)),
        )
        root, back = _power(own, 0.5), _power(own, -0.5)
        change = back @ _power(root @ covariance @ root, 0.5) @ back
        centred = self.vectors.astype(np.float64) - self.mean()
        along = centred @ basis
        across = (centred - along @ basis.T) * math.sqrt(np.trace(covariance) / np.trace(own))
        return PublicSide.of(
            (mean + along @ change @ basis.T + across).astype(np.float32), self.prompts, self.encoder
        )

    def covariance(self, count: int) -> np.ndarray:
        """Of the public vectors along the first directions, float64 [k, k]; positive."""
        along = (self.vectors.astype(np.float64) - self.mean()) @ self.directions[:, :count].astype(
            np.float64
        )
        own = along.T @ along / len(along)
        return own + 1e-6 * np.trace(own) / count * np.eye(count)

    def basis(self, count: int) -> np.ndarray | None:
        """The first principal directions, float64 [D, k]; None where all are meant."""
        return None if count >= self.dimension else self.directions[:, :count].astype(np.float64)

    def directions_for(self, share: float) -> int:
        """How many principal directions hold this share of the vectors' variance; K at most."""
        centred = self.vectors.astype(np.float64) - self.vectors.mean(0)
        held = np.cumsum(np.square(centred @ self.directions).sum(0)) / np.square(centred).sum()
        return min(int(np.searchsorted(held, share)) + 1, self.directions.shape[1])

    def centers(self, count: int, seed: int = 0) -> np.ndarray:
        """k-means centres of the public vectors, float64 [C, D]."""
        from sklearn.cluster import KMeans

        means = KMeans(min(count, len(self.vectors) // 2), n_init=2, random_state=seed)  # type: ignore[arg-type]
        return means.fit(self.vectors).cluster_centers_.astype(np.float64)

    def save(self, path: Path) -> None:
        """Write it as safetensors, vectors in half precision."""
        arrays = {
            "vectors": self.vectors.astype(np.float16), "prompts": self.prompts.astype(np.float16),
            "directions": self.directions,
        }  # fmt: skip
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, path,
            metadata={"format": FORMAT, "encoder": self.encoder},
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> PublicSide:
        """What `save` wrote. InputError for anything else."""
        try:
            with safe_open(path, framework="numpy") as held:
                header = held.metadata() or {}
                vectors, prompts = (_unit(held.get_tensor(name)) for name in ("vectors", "prompts"))
                directions = held.get_tensor("directions")
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls(vectors, prompts, header["encoder"], directions)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is damaged or holds no public vectors; no budget was spent. Put back the file of this index"
            ) from None


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric, positive matrix."""
    values, axes = np.linalg.eigh(matrix)
    return (axes * values**exponent) @ axes.T


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def embedded_public() -> Path:
    """The public vectors of the embedded encoder: portraits of its training styles, and prompts about them."""
    return Path(__file__).parent / "portraits" / "public.safetensors"
