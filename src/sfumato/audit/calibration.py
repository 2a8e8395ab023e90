"""From what similarity on is it a match, and how many matches are more than chance? Both are read off the data.

A fixed threshold fails on other data: fresh images of the same kind come close to training images too. Held-out
images say how close. The threshold is a quantile of their similarity to the training set, and the score of
an attack is its *excess*: matches in the training set minus matches in a held-out set of the same size.

No guarantee: thresholds and excesses are computed from private images, for their owner's eyes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sfumato.errors import InputError
from sfumato.evaluation.intervals import check_level, clopper_pearson


class TooFewHeldOut(InputError):
    """The held-out set is too small for the false match rate that was asked for."""


@dataclass(frozen=True)
class Interval:
    """A value and its two-sided confidence interval; level: 0.95 means that 2.5 % lie beyond either end."""

    value: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Threshold:
    """value: similarity from which on (>=) two images match. rate: false match rate that was asked for.

    achieved: share of the held-out images at or above `value`, never more than `rate`; low, high: its 95 %
    Clopper-Pearson interval; holdout: number of held-out images.
    """

    value: float
    rate: float
    achieved: float
    low: float
    high: float
    holdout: int


def calibrate(holdout_to_train: np.ndarray, *, rate: float = 0.01) -> Threshold:
    """The similarity that fresh images reach with probability at most `rate`.

    holdout_to_train [M]: similarity of each held-out image to its best match in the training set; higher is
    closer. With j = floor(rate (M + 1)) the threshold is the j-th largest: one more image, exchangeable with
    the held-out ones, is among the j largest of M + 1 with probability j / (M + 1) <= rate. Ties that would
    lift the share of held-out images above j / M put the threshold just above the tied value. `value` is a float32,
    as similarities are.

    TooFewHeldOut when M < 1 / rate; InputError for a rate outside (0, 1) or similarities that are not finite.
    """
    if not 0 < rate < 1:
        raise InputError(f"a false match rate of {rate:g} is not between 0 and 1; nothing was audited")
    values = np.asarray(holdout_to_train, np.float32).ravel()
    size = len(values)
    if size * rate < 1 - 1e-9:
        raise TooFewHeldOut(
            f"{size} held-out images cannot calibrate a false match rate of {rate:g}; nothing was audited: give "
            f"at least {math.ceil(1 / rate - 1e-9)}, or a higher false_match_rate in the policy"
        )
    if not np.isfinite(values).all():
        raise InputError("a held-out image has no finite similarity to the training set; nothing was audited")
    ordered = np.sort(values)[::-1]
    allowed = math.floor(rate * (size + 1) + 1e-9)
    value = ordered[allowed - 1]
    if int((values >= value).sum()) > allowed:
        value = np.nextafter(value, np.float32(np.inf))
    at_least = int((values >= value).sum())
    low, high = clopper_pearson(at_least, size)
    return Threshold(float(value), rate, at_least / size, low, high, size)


def reference_blocks(num_train: int, num_holdout: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Cut the training set into disjoint blocks no larger than the held-out set: positions, int64 [s] each.

    Returns B = ceil(num_train / num_holdout) blocks of s = num_train // B training positions and s held-out
    positions, all drawn at random (public randomness). Under "nothing was memorised" each block is
    exchangeable with the held-out set, so it is matched equally often; all B together use the whole training
    set but for fewer than B images. Positions may be those of duplicate groups instead of images: a group
    must lie in one block, or a single copy counts several times. Pictures that are in both sets must have left
    both of them: taken from the held-out set alone, common pictures are in training only and look memorised.
    """
    if num_train < 1 or num_holdout < 1:
        raise InputError(
            f"{num_train} training and {num_holdout} held-out images: there is nothing to compare; nothing was audited"
        )
    count = -(-num_train // num_holdout)
    size = num_train // count
    draw = np.random.default_rng(seed)
    train = draw.permutation(num_train)
    blocks = [np.sort(train[start * size : (start + 1) * size]) for start in range(count)]
    return blocks, np.sort(draw.permutation(num_holdout)[:size])


def excess(
    train_hits: np.ndarray,
    holdout_hits: np.ndarray,
    clusters: np.ndarray,
    *,
    blocks: int,
    level: float = 0.95,
) -> Interval:
    """Share of generated images that match training images beyond chance, and its interval.

    train_hits: int [N], in how many of the B = `blocks` training blocks the image has a match;
    holdout_hits: [N], 1 or 0: whether it has one in the held-out block of the same size;
    clusters: int [N], images with the same best reference (training or held-out, by duplicate group) share a
    number. The estimate is the mean of v_i = train_hits_i - B holdout_hits_i. If training and held-out images
    are exchangeable its expectation is 0; if a share e of the images are copies it is e.

    **Interval.** Under exchangeability chance decides of each *reference* whether it lies in the training or
    the held-out set, and takes all images near it along: S_c, the sum of v over a cluster, is +m or -B m at
    odds B : 1. The clusters, not the images, are the independent observations. The sums above 0 and those
    below are two weighted counts of clusters. Each gets a Clopper-Pearson interval at its effective number of
    clusters (sum w)^2 / sum w^2, whose upper end allows for one more cluster as large as the largest one seen
    (Fay and Feuer 1997, doi:10.1002/(SICI)1097-0258(19970415)16:7<791::AID-SIM500>3.0.CO;2-#; with nothing
    seen it is the rule of three). The two are joined into one of the difference by the method of variance
    estimates recovery (Zou and Donner 2008, doi:10.1002/sim.3095): low = e - sqrt((y+ - l+)^2 + (u- - y-)^2).

    It is no bootstrap: where only training references happen to be hit, which for few clusters or large B is
    likely without any memorisation, every resample is positive and a percentile bootstrap excludes 0 up to
    nine times in ten. This interval keeps its level there (simulated in the tests), as the exact sign
    test does: with clusters of one size it excludes 0 when (B / (B + 1))^K < (1 - level) / 2, or nearly so.

    What it cannot tell: one training image that very many generated images repeat is one cluster, as likely a
    generic picture that happened to be drawn for training. The interval then reaches below 0 and far above.
    That is no all-clear: the policy says "undecided" and asks to look at that image. A larger held-out set
    (smaller B) needs fewer distinct copies.

    InputError for N = 0, arrays of different lengths, hits out of range, or a level outside (0, 1).
    """
    check_level(level)
    train_hits, holdout_hits, clusters = (np.asarray(each) for each in (train_hits, holdout_hits, clusters))
    num_images = len(train_hits)
    if num_images == 0:
        raise InputError("there is no generated image; nothing was audited. Generate at least one")
    if not len(holdout_hits) == len(clusters) == num_images:
        raise InputError(
            f"{num_images} counts in the training blocks, {len(holdout_hits)} in the held-out one and "
            f"{len(clusters)} clusters belong to different images; nothing was audited"
        )
    if blocks < 1 or train_hits.min() < 0 or train_hits.max() > blocks:
        raise InputError(f"hits in the training blocks must lie between 0 and blocks = {blocks}, 1 or more")
    if not np.isin(holdout_hits, (0, 1)).all():
        raise InputError("hits in the held-out block are 0 or 1 an image, not yet multiplied by the blocks")
    value = train_hits - blocks * holdout_hits.astype(np.float64)
    _, cluster = np.unique(clusters, return_inverse=True)
    sums = np.bincount(cluster, weights=value)
    hit = (train_hits > 0) | (holdout_hits > 0)
    largest = max(1.0, np.bincount(cluster, weights=hit).max()) / num_images
    most = max(1, int(train_hits.max()))  # so that a share of images stays a share
    above, above_low, above_high = _weighted_count(np.maximum(sums, 0) / (num_images * most), largest, level)
    below, below_low, below_high = _weighted_count(
        np.maximum(-sums, 0) / (num_images * blocks), largest, level
    )
    mean = float(value.mean())
    return Interval(
        mean,
        mean - math.hypot(most * (above - above_low), blocks * (below_high - below)),
        mean + math.hypot(most * (above_high - above), blocks * (below - below_low)),
        level,
    )


def _weighted_count(weights: np.ndarray, largest: float, level: float) -> tuple[float, float, float]:
    """Sum of the weights of the clusters that occurred, as a probability, with the ends of its interval.

    With K equal weights 1/N these are K/N and its Clopper-Pearson interval.
    """
    from scipy.stats import beta

    tail = (1 - level) / 2
    total, squares = float(weights.sum()), float((weights**2).sum())
    low = 0.0
    if total > 0:
        seen = total**2 / squares
        low = float(beta.ppf(tail, seen, max(seen / total - seen, 0.0) + 1))
    more = (total + largest) ** 2 / (squares + largest**2)
    unseen = more / (total + largest) - more + 1
    high = 1.0 if unseen <= 1e-9 else float(beta.ppf(1 - tail, more, unseen))
    return total, min(low, total), max(high, total)
