"""Kernel distance (KID): unbiased squared maximum mean discrepancy of features under a cubic kernel.

Bińkowski et al. 2018, "Demystifying MMD GANs", section 4. Measured on private images it is for their owner's
eyes: it is not differentially private. Its random numbers are public and reproducible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from sfumato.errors import InputError
from sfumato.evaluation.frechet import check_dimensions, read_rows
from sfumato.progress import Progress

CONFIDENCE = 0.95


@dataclass(frozen=True)
class KernelDistance:
    """value: mean of unbiased estimates (may be negative), inside its 95 % interval [low, high].

    The mean is over `subsets` pairs of subsets of `subset_size` images each.
    """

    value: float
    low: float
    high: float
    subsets: int
    subset_size: int


def kernel_distance(
    x: np.ndarray, y: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Kernel distance between float features x [N, D] and y [M, D], which may be memory-mapped.

    The mean over pairs of random subsets, each drawn without replacement. A subset larger than half of the
    smaller set shrinks to that half: the estimate is unbiased at every size, and the interval needs subsets
    that differ.

    The interval is for the distance between the two *distributions*, not only for the choice of subsets: its
    variance is that of the delete-d jackknife (Shao and Wu 1989), s² f / (1 - f) with s² the variance between
    subsets and f = subset_size / min(N, M), plus s² / subsets for the subsets left undrawn.

    InputError for features that are not finite or differ in D, fewer than 4 rows, fewer than 2 subsets.
    """
    check_dimensions(x=x, y=y)
    fewest = min(len(x), len(y))
    if fewest < 4:
        raise InputError(f"the kernel distance needs at least 4 images in each set, not {fewest}; give more")
    if subsets < 2 or subset_size < 2:
        raise InputError(
            f"the kernel distance needs at least 2 subsets of 2 images, not {subsets} of {subset_size}"
        )
    size = min(subset_size, fewest // 2)
    draw = np.random.default_rng(seed)
    estimates = np.empty(subsets)
    with Progress("kernel distance", subsets, "subsets") as progress:
        for i in range(subsets):
            rows_x, rows_y = (np.sort(draw.choice(len(s), size, replace=False)) for s in (x, y))
            estimates[i] = squared_mmd(read_rows(x, rows_x, "x"), read_rows(y, rows_y, "y"))
            progress.advance()
    share = size / fewest
    error = estimates.std(ddof=1) * np.sqrt(share / (1 - share) + 1 / subsets)
    half = float(student.ppf(0.5 + CONFIDENCE / 2, subsets - 1) * error)
    value = float(estimates.mean())
    return KernelDistance(value, value - half, value + half, subsets, size)


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of MMD² from float64 [n, D] and [m, D] (Gretton et al. 2012, eq. 3)."""
    n, m = len(x), len(y)
    within_x, within_y = _kernel(x, x), _kernel(y, y)
    return float(
        (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
        + (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
        - 2 * _kernel(x, y).mean()
    )


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x·y / D + 1)³, [n, m]."""
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner
