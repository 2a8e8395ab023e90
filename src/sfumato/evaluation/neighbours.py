"""Precision, recall, density and coverage: how well two sets of features lie in each other's neighbourhoods.

Kynkäänniemi et al. 2019 (improved precision and recall) and Naeem et al. 2020 (density and coverage).
Measured on private images they are for their owner's eyes: they are not differentially private.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sfumato.errors import InputError
from sfumato.evaluation.frechet import check_dimensions, read_rows
from sfumato.progress import Progress

DISTANCES_AT_A_TIME = 4_000_000  # 32 MB
ON_THE_EDGE = 1 + 1e-9  # a ball holds its surface, up to rounding


@dataclass(frozen=True)
class NeighbourMetrics:
    """Shares in [0, 1], but density, which is about 1 for equal distributions and has no upper bound.

    real_used, generated_used: how many images of each set were compared.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    real_used: int
    generated_used: int


def neighbour_metrics(
    real: np.ndarray, generated: np.ndarray, *, k: int = 5, most: int = 10_000, seed: int = 0
) -> NeighbourMetrics:
    """The four metrics of float features real [N, D] and generated [M, D], which may be memory-mapped.

    A ball around a point reaches to its k-th nearest neighbour of the same set, surface included; the ball
    around a point with k duplicates is the point itself.
    precision: share of generated points inside any real ball; recall: share of real points inside any
    generated ball (Kynkäänniemi et al., eq. 1-3). density: real balls a generated point is in, divided by k,
    on average; coverage: share of real balls with a generated point inside (Naeem et al., eq. 3-4).

    At most `most` rows of each set are used, drawn at random. InputError for features that are not finite or
    differ in D, or k out of range. Memory: the rows used in float64 and 32 MB of distances at a time.
    """
    check_dimensions(real=real, generated=generated)
    real_points = random_rows(real, most, seed, "real")
    generated_points = random_rows(generated, most, seed + 1, "generated")
    for name, points in (("real", real_points), ("generated", generated_points)):
        if not 1 <= k < len(points):
            raise InputError(
                f"{k} nearest neighbours of {len(points)} {name} images; k must be 1 to {len(points) - 1}: "
                "choose a smaller k or give more images"
            )
    shift = numerical_centre(real_points)
    real_points -= shift
    generated_points -= shift
    with Progress("neighbours", 2 * len(generated_points) + len(real_points), "images") as progress:
        real_radii = _radii(real_points, k, progress)
        generated_radii = _radii(generated_points, k, progress)
        precise, memberships = 0, 0
        recalled = np.zeros(len(real_points), bool)
        nearest = np.full(len(real_points), np.inf)
        for rows in blocks(len(generated_points), len(real_points)):
            distances = squared_distances(generated_points[rows], real_points)
            inside = distances <= real_radii
            precise += int(inside.any(axis=1).sum())
            memberships += int(inside.sum())
            recalled |= (distances <= generated_radii[rows, None]).any(axis=0)
            np.minimum(nearest, distances.min(axis=0), out=nearest)
            progress.advance(len(distances))
    return NeighbourMetrics(
        precision=precise / len(generated_points),
        recall=float(recalled.mean()),
        density=memberships / (k * len(generated_points)),
        coverage=float((nearest <= real_radii).mean()),
        real_used=len(real_points),
        generated_used=len(generated_points),
    )


def _radii(points: np.ndarray, k: int, progress: Progress) -> np.ndarray:
    """Squared distance from every point to its k-th nearest other point, [N]."""
    radii = np.empty(len(points))
    for rows in blocks(len(points), len(points)):
        distances = squared_distances(points[rows], points)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
        progress.advance(len(distances))
    return radii * ON_THE_EDGE


def random_rows(features: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    """All rows, or `most` of them drawn at random without replacement, in their order; float64 [n, D]."""
    if most < 1:
        raise InputError(f"at most {most} {name} images leaves none; choose a larger number")
    if len(features) <= most:
        return read_rows(features, slice(None), name)
    drawn = np.random.default_rng(seed).choice(len(features), most, replace=False)
    return read_rows(features, np.sort(drawn), name)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of `rows` such that a block of distances to `columns` points stays within 32 MB."""
    step = max(1, DISTANCES_AT_A_TIME // max(1, columns))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def numerical_centre(points: np.ndarray) -> np.ndarray:
    """Mean [D] rounded to float32, so that subtracting it from float32 features in float64 is exact."""
    return points.mean(axis=0).astype(np.float32).astype(np.float64)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of float64 x [n, D] and y [m, D], [n, m], as |x|² + |y|² - 2 x·y.

    What rounding cannot tell from 0 is exactly 0, so equal rows are at distance 0. Centre both on a point
    amid the data first: the rounding error is relative to |x|² + |y|².
    """
    sizes = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("md,md->m", y, y)
    distances = x @ y.T
    distances *= -2
    distances += sizes
    sizes *= 4 * (x.shape[1] + 2) * np.finfo(np.float64).eps
    distances[distances <= sizes] = 0
    return distances
