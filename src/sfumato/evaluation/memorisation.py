"""Do generated images repeat training images? Authenticity, and the feature likelihood divergence (FLD).

Alaa et al. 2022, "How Faithful is your Synthetic Data?" (arXiv 2102.08921); Jiralerspong et al. 2023,
"Feature Likelihood Divergence" (arXiv 2302.04440). Both look at the training set: measured on private images
they are for their owner's eyes and not differentially private. Finding nothing proves nothing; only a
mechanism's guarantee does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfumato.errors import InputError
from sfumato.evaluation.frechet import check_dimensions, read_rows
from sfumato.evaluation.neighbours import blocks, numerical_centre, random_rows, squared_distances
from sfumato.progress import Progress

TRAINING_ROWS = 4096  # training features in memory at a time
STANDARD_ERRORS = 3.0  # what counts as a sign of memorisation
LEAST_VARIANCE = 1e-6  # of a fitted Gaussian, where features have variance 1
LARGEST_ITERATIONS = 200
SMALL_GAIN = 1e-5  # nats per dimension; the fit stops at a smaller gain


@dataclass(frozen=True)
class Authenticity:
    """value: share of generated samples that are authentic; of_holdout: the same of fresh real images, if given.

    Fresh samples do not reach 1: of many independent draws of one smooth density the share is 1/3 in one
    dimension and rises towards 1/2 with more; hubs in sparse high-dimensional sets raise it further. So
    `of_holdout` is the yardstick: samples below it crowd around training images.
    error: standard error of value - of_holdout if both were equal; samples that meet the same training point
    count as one cluster, so repeated samples do not pass for many.
    """

    value: float
    generated_used: int
    of_holdout: float | None = None
    holdout_used: int = 0
    error: float | None = None

    @property
    def memorised(self) -> bool | None:
        """Whether `value` is below `of_holdout` by more than 3 standard errors; None without held-out images."""
        if self.of_holdout is None or self.error is None:
            return None
        return self.value < self.of_holdout - STANDARD_ERRORS * self.error


def authenticity(
    train: np.ndarray,
    generated: np.ndarray,
    *,
    holdout: np.ndarray | None = None,
    most: int = 5_000,
    seed: int = 0,
) -> Authenticity:
    """Share of generated samples further from their nearest training point than that point is from its own
    nearest training neighbour (Alaa et al., section 4.3).

    Float features [N, D], which may be memory-mapped. At most `most` generated (and held-out) rows are used, drawn at
    random, but always the whole training set: a copy of a point left out would pass as authentic. Memory: the
    rows used, 4,096 training rows, 32 MB of distances. InputError for features that are not finite or differ
    in D, fewer than 2 training rows, or an empty set.
    """
    check_dimensions(train=train, generated=generated, **({} if holdout is None else {"holdout": holdout}))
    _at_least(train, 2, "training")
    _at_least(generated, 1, "generated")
    authentic, nearest = _authentic(train, random_rows(generated, most, seed, "generated"), "generated")
    if holdout is None:
        return Authenticity(float(authentic.mean()), len(authentic))
    _at_least(holdout, 1, "held-out")
    fresh, nearest_to_fresh = _authentic(train, random_rows(holdout, most, seed, "holdout"), "held-out")
    pooled = np.concatenate([authentic, fresh]).mean()
    error = np.hypot(
        _clustered_error(authentic - pooled, nearest), _clustered_error(fresh - pooled, nearest_to_fresh)
    )
    return Authenticity(
        float(authentic.mean()), len(authentic), float(fresh.mean()), len(fresh), float(error)
    )


def _authentic(train: np.ndarray, points: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Whether each point is authentic (bool), and the row of its nearest training point; both [n]."""
    centre = numerical_centre(read_rows(train, slice(0, TRAINING_ROWS), "train"))
    with Progress(f"authenticity, {name}", 2 * len(train), "training images") as progress:
        to_train, nearest = _nearest_in(train, points - centre, centre, progress)
        met, back = np.unique(nearest, return_inverse=True)
        met_points = read_rows(train, met, "train") - centre
        within_train, _ = _nearest_in(train, met_points, centre, progress, themselves=met)
    return to_train > within_train[back], nearest


def _clustered_error(residuals: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of the mean of `residuals` [n] that are independent between `clusters` [n] only."""
    return float(np.sqrt(np.sum(np.bincount(clusters, weights=residuals) ** 2)) / len(residuals))


def _nearest_in(
    train: np.ndarray,
    points: np.ndarray,
    centre: np.ndarray,
    progress: Progress,
    themselves: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance to and row of the nearest training point of each centred point, both [n].

    `themselves` [n]: rows of `train` that the points are, not to be found as their own neighbours.
    """
    least, nearest = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    for start in range(0, len(train), TRAINING_ROWS):
        block = read_rows(train, slice(start, start + TRAINING_ROWS), "train") - centre
        for rows in blocks(len(points), len(block)):
            distances = squared_distances(points[rows], block)
            if themselves is not None:
                own = themselves[rows] - start
                here = np.flatnonzero((own >= 0) & (own < len(block)))
                distances[here, own[here]] = np.inf
            column = distances.argmin(axis=1)
            found = distances[np.arange(len(distances)), column]
            better = found < least[rows]
            least[rows] = np.where(better, found, least[rows])
            nearest[rows] = np.where(better, start + column, nearest[rows])
        progress.advance(len(block))
    return least, nearest


@dataclass(frozen=True)
class FeatureLikelihood:
    """value: FLD on held-out images, lower is better, about 0 for fresh real images; on_train: FLD on the
    training images the fit used; both in hundredths of a nat per dimension.

    baseline: what is subtracted in both, the held-out negative log-likelihood (nats per dimension) under real
    images. baseline_gap: what `gap` is for those real images, which were memorised by nobody.
    gap_error: standard error of gap - baseline_gap.
    """

    value: float
    on_train: float
    baseline: float
    baseline_gap: float
    gap_error: float

    @property
    def gap(self) -> float:
        """FLD on held-out minus FLD on training images; large when generated samples sit on training images.

        The paper's generalisation gap has the opposite sign.
        """
        return self.value - self.on_train

    @property
    def memorised(self) -> bool:
        """Whether `gap` exceeds `baseline_gap` by more than 3 standard errors."""
        return self.gap - self.baseline_gap > STANDARD_ERRORS * self.gap_error


def feature_likelihood(
    train: np.ndarray,
    holdout: np.ndarray,
    generated: np.ndarray,
    *,
    most: int = 10_000,
    seed: int = 0,
) -> FeatureLikelihood:
    """Feature likelihood divergence of float features [N, D], which may be memory-mapped (Jiralerspong et al., §3).

    1. Every feature is scaled to the training set's mean 0 and variance 1.
    2. The density is an even mixture of isotropic Gaussians N(y_j, v_j I), one at every generated sample y_j.
       The variances v_j maximise the likelihood of the *training* set, to each point of which the likelihood
       under one Gaussian of the whole training set is added, so that no sample must explain outliers.
       A copy of a training point gets a variance near 0 and explains nothing else.
    3. FLD = 100/D x (negative log-likelihood of the *held-out* set) - C, where C is the same quantity for half
       of the training images in the place of the generated ones, fitted to the other half.

    The fit is by expectation-maximisation, monotone and without a step size (the authors use Adam), from
    Gaussians as wide as their distance to the nearest training point. At most `most` rows of each set are used,
    drawn at random. Memory: 4 bytes x used training x used generated rows, 400 MB at most by default.

    InputError for features that are not finite or differ in D, fewer than 4 training or 2 held-out or 1
    generated rows, or training features that are all the same.
    """
    check_dimensions(train=train, holdout=holdout, generated=generated)
    _at_least(train, 4, "training")
    _at_least(holdout, 2, "held-out")
    _at_least(generated, 1, "generated")
    points = random_rows(train, most, seed, "train")
    held = random_rows(holdout, most, seed + 1, "holdout")
    half = len(points) // 2
    samples = random_rows(generated, half, seed + 2, "generated")
    _standardise(points, held, samples)
    order = np.random.default_rng(seed).permutation(len(points))
    centres, fitted = points[order[:half]][: len(samples)], points[order[half:]]
    baseline_fitted, baseline_held = _fitted_and_held_out(fitted, held, centres, "real images")
    on_train, on_held = _fitted_and_held_out(points, held, samples, "generated images")
    baseline = float(baseline_held.mean())
    errors = [
        _standard_error(on_train),
        _standard_error(baseline_fitted),
        _standard_error(on_held - baseline_held),
    ]
    return FeatureLikelihood(
        value=100 * (float(on_held.mean()) - baseline),
        on_train=100 * (float(on_train.mean()) - baseline),
        baseline=baseline,
        baseline_gap=100 * float(baseline_held.mean() - baseline_fitted.mean()),
        gap_error=100 * float(np.sqrt(np.sum(np.square(errors)))),
    )


def _standardise(train: np.ndarray, *others: np.ndarray) -> None:
    """Scale all in place to the training set's mean 0 and variance 1 per dimension.

    A dimension without spread in the training set is scaled as the typical one.
    """
    mean, spread = train.mean(axis=0), train.std(axis=0)
    typical = np.sqrt(np.mean(spread**2))
    if typical <= 1e-12 * np.abs(mean).max():
        raise InputError("all training features are the same: likelihoods need images that differ")
    spread[spread <= 1e-6 * typical] = typical
    for points in (train, *others):
        points -= mean
        points /= spread


def _fitted_and_held_out(
    fitted: np.ndarray, held: np.ndarray, centres: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihoods per dimension of both sets under Gaussians at `centres` fitted to `fitted`."""
    distances = np.empty((len(fitted), len(centres)), np.float32)
    for rows in blocks(len(fitted), len(centres)):
        distances[rows] = squared_distances(fitted[rows], centres)
    variances = _variances(distances, fitted, name)
    on_fitted = np.empty(len(fitted))
    for rows in blocks(len(fitted), len(centres)):
        on_fitted[rows] = _log_likelihood(distances[rows], variances, fitted.shape[1])
    del distances
    on_held = np.empty(len(held))
    for rows in blocks(len(held), len(centres)):
        on_held[rows] = _log_likelihood(squared_distances(held[rows], centres), variances, held.shape[1])
    return -on_fitted / fitted.shape[1], -on_held / held.shape[1]


def _variances(distances: np.ndarray, points: np.ndarray, name: str) -> np.ndarray:
    """Variances [G] of the Gaussians that (locally) maximise the likelihood of `points` [N, D]; `distances`
    [N, G] squared. An empty Gaussian keeps its variance."""
    dimension = points.shape[1]
    radii = np.sum((points - points.mean(axis=0)) ** 2, axis=1)
    base = _gaussian(radii, radii.mean() / dimension, dimension)
    variances = np.maximum(distances.min(axis=0).astype(np.float64) / dimension, LEAST_VARIANCE)
    before = -np.inf
    with Progress(f"feature likelihood, {name}", LARGEST_ITERATIONS, "iterations at most") as progress:
        for _ in range(LARGEST_ITERATIONS):
            likelihood, weights, moments = 0.0, np.zeros(len(variances)), np.zeros(len(variances))
            for rows in blocks(len(points), len(variances)):
                squared = distances[rows].astype(np.float64)
                densities = _gaussian(squared, variances, dimension) - np.log(len(variances))
                peak = np.maximum(densities.max(axis=1), base[rows])
                densities = np.exp(densities - peak[:, None])
                total = densities.sum(axis=1) + np.exp(base[rows] - peak)
                likelihood += float((peak + np.log(total)).sum()) / (len(points) * dimension)
                weights += (1 / total) @ densities
                densities *= squared
                moments += (1 / total) @ densities
            full = weights > np.finfo(np.float64).tiny * len(points)
            fresh = moments[full] / (dimension * weights[full])
            variances[full] = np.maximum(fresh, LEAST_VARIANCE)
            progress.advance()
            if likelihood - before < SMALL_GAIN:
                break
            before = likelihood
    return variances


def _gaussian(squared: np.ndarray, variance: np.ndarray | float, dimension: int) -> np.ndarray:
    """Log-density of isotropic Gaussians in `dimension` dimensions at squared distances from their centres."""
    return -0.5 * (squared / variance + dimension * np.log(2 * np.pi * variance))


def _log_likelihood(squared: np.ndarray, variances: np.ndarray, dimension: int) -> np.ndarray:
    """Log-likelihood [n] of points at squared distances [n, G] under the even mixture of the Gaussians."""
    densities = _gaussian(squared.astype(np.float64), variances, dimension)
    peak = densities.max(axis=1)
    return peak + np.log(np.exp(densities - peak[:, None]).mean(axis=1))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _at_least(features: np.ndarray, least: int, name: str) -> None:
    if len(features) < least:
        raise InputError(
            f"{len(features)} {name} images are too few to look for copies; give at least {least}"
        )
