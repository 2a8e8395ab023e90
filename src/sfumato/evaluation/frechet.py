"""Fréchet distance between two sets of features, each summed up by its mean and covariance.

A distance is a property of the feature space it is measured in: figures from different encoders are never
compared. Measured on private images it is for their owner's eyes: it is not differentially private.
"""

from __future__ import annotations

import numpy as np

from sfumato.errors import InputError
from sfumato.progress import Progress

BLOCK = 4096  # rows in memory at a time


def read_rows(features: np.ndarray, rows: slice | np.ndarray, name: str = "features") -> np.ndarray:
    """A copy of `features[rows]` in float64, [rows, D]; NaN or infinity among them is an InputError."""
    block = np.array(features[rows], np.float64)
    if not np.isfinite(block).all():
        bad = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
        position = int(np.arange(len(features))[rows][bad])
        raise InputError(f"{name}: row {position} holds NaN or infinity; compute the features again")
    return block


def check_dimensions(**features: np.ndarray) -> None:
    """InputError unless all are float arrays [N, D] of one D; the keywords name them in the message."""
    for name, array in features.items():
        if array.ndim != 2 or array.shape[1] == 0 or not np.issubdtype(array.dtype, np.floating):
            raise InputError(
                f"{name}: features must be floats [N, D], not {array.dtype} {list(array.shape)}; use an encoder"
            )
    dimensions = {name: array.shape[1] for name, array in features.items()}
    if len(set(dimensions.values())) > 1:
        said = ", ".join(f"{name} {dimension}" for name, dimension in dimensions.items())
        raise InputError(f"features of different dimensions ({said}); compute all with the same encoder")


class Moments:
    """Mean and covariance of features that arrive in batches of any size, in float64.

    Every block is centred on its own mean and merged by the pairwise update of Chan, Golub and LeVeque (1979),
    so that a large common offset costs no accuracy. Memory: two D × D matrices and one block.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None  # sum of outer products of deviations from the mean

    @classmethod
    def of(cls, features: np.ndarray, batch: int = BLOCK) -> Moments:
        """Moments of float features [N, D], read `batch` rows at a time (they may be memory-mapped)."""
        moments = cls()
        with Progress("moments", len(features), "images") as progress:
            for start in range(0, len(features), batch):
                moments.add(features[start : start + batch])
                progress.advance(min(batch, len(features) - start))
        return moments

    @property
    def dimension(self) -> int:
        """D; 0 as long as nothing was added."""
        return 0 if self._mean is None else len(self._mean)

    def add(self, features: np.ndarray) -> None:
        """Count the rows of float features [B, D] in; InputError for NaN, infinity or another D."""
        check_dimensions(features=features)
        if self._mean is not None and features.shape[1] != self.dimension:
            raise InputError(
                f"features of dimension {features.shape[1]} after features of dimension {self.dimension}; "
                "compute all with the same encoder"
            )
        for start in range(0, len(features), BLOCK):
            self._merge(read_rows(features, slice(start, start + BLOCK)))

    def _merge(self, block: np.ndarray) -> None:
        mean = block.mean(axis=0)
        deviations = block - mean
        scatter = deviations.T @ deviations
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = len(block), mean, scatter
            return
        total = self.count + len(block)
        shift = mean - self._mean
        scatter += np.outer(shift, shift) * (self.count * len(block) / total)
        self._scatter = self._scatter + scatter
        self._mean = self._mean + shift * (len(block) / total)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """float64 [D]; InputError before the first row."""
        if self._mean is None:
            raise InputError("no features were added: there is no mean of an empty set")
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """float64 [D, D], symmetric, divided by count - 1; InputError below two rows."""
        if self._scatter is None or self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, not {self.count}; give more")
        return (self._scatter + self._scatter.T) / (2 * (self.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with these moments (Heusel et al. 2017, eq. 6):

        |m_a - m_b|² + Tr(S_a) + Tr(S_b) - 2 Tr((S_a^½ S_b S_a^½)^½)

    The last trace is the sum of the singular values of S_a^½ S_b^½, with roots from symmetric
    eigen-decompositions whose rounding-sized and negative eigenvalues are set to 0: no root is taken of a
    rounding error, so rank-deficient sets stay exact and identical sets are at 0 up to rounding.
    InputError for different dimensions or fewer than two rows on either side.
    """
    if a.dimension != b.dimension and a.count and b.count:
        raise InputError(
            f"features of different dimensions ({a.dimension} and {b.dimension}); compute all with the same encoder"
        )
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    shared = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum() if root_a.size and root_b.size else 0.0
    squared = np.sum((a.mean - b.mean) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * shared
    return max(0.0, float(squared))


def _root(covariance: np.ndarray) -> np.ndarray:
    """F [D, rank] with F Fᵀ = covariance up to rounding."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def rank_warning(count: int, dimension: int) -> str | None:
    """One line if `count` images cannot fill a covariance of `dimension` rows, else None."""
    if count > dimension:
        return None
    return (
        f"{count} images for {dimension} feature dimensions: the covariance is rank-deficient and the "
        "Fréchet distance is biased upwards; compare it only with sets of the same size"
    )
