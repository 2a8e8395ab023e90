"""Older extraction attacks: Carlini's ratio and cliques, Gu's ratio; from distances between images alone.

A distance to the nearest training image says little by itself: plain pictures are close to everything. The
ratios compare it with how close training images are to each other. They are returned negated, so that
higher is closer as for every similarity here, and `calibration.calibrate` finds their thresholds from held-out
images scored in the same way; the thresholds that the papers print (-1, -1/3) do not carry over to other data.

For the excess over held-out images, score both reference sets alike: nearest image *and* its neighbours within one
training block, and within the held-out block.

No guarantee: scores are computed from private images, for their owner's eyes only.
"""

from __future__ import annotations

import numpy as np

from sfumato.audit.similarity import TILES
from sfumato.errors import InputError
from sfumato.evaluation.neighbours import squared_distances

CARLINI_NEIGHBOURS = 50
GU_RATIO = 1 / 3
LARGEST_SEARCH = 200_000  # nodes of the clique search; graphs of near-duplicates take a few hundred


def carlini_ratio(
    distances: np.ndarray, index: np.ndarray, neighbours: np.ndarray, *, alpha: float = 0.5
) -> np.ndarray:
    """-R(x) = -d(x, t) / (alpha x mean distance of t to its 50 nearest training images); float32 [N].

    Carlini et al. 2023 (arXiv 2301.13188, section 5.1). t is the training image nearest to the generated x:
    distances [N]: d(x, t) >= 0; index int [N]: the row of t; neighbours [training images, k]: distances of every
    training image to its k nearest *other* training images (the paper: k = 50), in any order.

    Neighbours at distance 0 are further copies of t and say nothing about how alike different images are:
    they are left out of the mean. Where nothing is left (t has at least k copies) R has no denominator. Such a
    picture fills the training set: x counts as a match, R = 0, and the held-out images near it, scored alike,
    show whether that means anything. InputError for distances that are negative or not finite, or shapes that do
    not fit.
    """
    distances, neighbours = _distances(distances, 1), _distances(neighbours, 2)
    if not alpha > 0:
        raise InputError(f"alpha = {alpha:g} must be positive; the paper's is 0.5")
    if len(index) != len(distances):
        raise InputError(
            f"{len(distances)} distances and {len(index)} matches belong to different images; nothing was audited"
        )
    if neighbours.shape[1] == 0:
        raise InputError("a training set of one image has no neighbours to compare with; nothing was audited")
    if len(index) and not (np.min(index) >= 0 and np.max(index) < len(neighbours)):
        raise InputError(f"a match points outside the {len(neighbours)} training images; nothing was audited")
    others = np.count_nonzero(neighbours, axis=1)
    spread = alpha * neighbours.sum(axis=1, dtype=np.float64) / np.maximum(others, 1)
    return _negated_ratio(distances, spread[index])


def gu_ratio(nearest: np.ndarray, second: np.ndarray) -> np.ndarray:
    """-d1/d2: distance to the nearest training image over that to the second nearest; float32 [N] in [-1, 0].

    Gu et al. 2023 (arXiv 2310.02664): a generated image counts as memorised when d1/d2 < 1/3. nearest,
    second: [N], 0 <= nearest <= second. Where both are 0 the image equals two training images: a match, 0.
    A training image with near-copies beside it keeps the ratio near 1 however well it was memorised: take the
    second nearest from another duplicate group. InputError for distances that are negative, not finite, or in
    the wrong order.
    """
    nearest, second = _distances(nearest, 1), _distances(second, 1)
    if nearest.shape != second.shape or (nearest > second).any():
        raise InputError("the second nearest image is nearer than the nearest; nothing was audited")
    return _negated_ratio(nearest, second.astype(np.float64))


def tile_distances(features: np.ndarray) -> np.ndarray:
    """Distances [n, n] of the extractor "tiles" (similarity.py) between all its features float32 [n, D]."""
    parts = features.reshape(len(features), TILES, -1).astype(np.float64)
    worst = np.max([squared_distances(parts[:, tile], parts[:, tile]) for tile in range(TILES)], axis=0)
    np.fill_diagonal(worst, 0)
    return np.sqrt(np.maximum(worst, worst.T))


def cliques(distances: np.ndarray, threshold: float, *, least: int = 10) -> list[np.ndarray]:
    """Groups of at least `least` images of one condition that all lie within `threshold` of each other.

    Carlini et al. 2023, section 4.2: a generator that answers one condition (a label, a prompt, a surrogate
    cluster) again and again with the same picture has probably memorised it; the paper takes 500 images a
    condition and the tile distance. distances [n, n]: symmetric, between the images of one condition.

    Disjoint cliques, each as int64 positions in ascending order; none of the images that are left over form
    another of that size. The search is exact: images with fewer than `least` - 1 neighbours are peeled off, the
    rest is searched by branch and bound. A threshold so loose that the search would not end raises InputError, as
    do distances that are not square, symmetric, non-negative and finite, or least < 2.
    """
    distances = _distances(distances, 2)
    if distances.shape[0] != distances.shape[1] or not np.array_equal(distances, distances.T):
        raise InputError("cliques need the square, symmetric table of distances; nothing was audited")
    if least < 2:
        raise InputError(f"a clique of {least} is no repetition; give at least 2 (the paper: 10)")
    linked = distances <= threshold
    np.fill_diagonal(linked, False)
    neighbours = [
        sum(1 << int(other) for other in np.flatnonzero(linked[image])) for image in range(len(linked))
    ]
    found: list[np.ndarray] = []
    left = (1 << len(neighbours)) - 1
    steps = [0]
    while clique := _clique(neighbours, left, least, threshold, steps):
        for image in _members(left):
            if neighbours[image] & clique == clique:  # a larger one, if it can be had for nothing
                clique |= 1 << image
        found.append(np.array(_members(clique), np.int64))
        left &= ~clique
    return found


def _clique(neighbours: list[int], candidates: int, least: int, threshold: float, steps: list[int]) -> int:
    """A clique of `least` images among the candidates, all sets as bits of an int; 0 when there is none."""
    steps[0] += 1
    if steps[0] > LARGEST_SEARCH:
        raise InputError(
            f"a threshold of {threshold:g} links so many different images that their cliques cannot be listed; "
            "nothing was audited: choose a smaller threshold"
        )
    if least <= 0:
        return 0
    while True:  # peel off what has too few neighbours
        members = _members(candidates)
        degrees = {image: (neighbours[image] & candidates).bit_count() for image in members}
        kept = sum(1 << image for image in members if degrees[image] >= least - 1)
        if kept == candidates:
            break
        candidates = kept
    if len(members) < least:
        return 0
    if least == 1:
        return 1 << members[0]
    while candidates.bit_count() >= least:
        image = max(_members(candidates), key=degrees.__getitem__)
        if rest := _clique(neighbours, neighbours[image] & candidates, least - 1, threshold, steps):
            return rest | 1 << image
        candidates &= ~(1 << image)
    return 0


def _members(bits: int) -> list[int]:
    members = []
    while bits:
        last = bits & -bits
        members.append(last.bit_length() - 1)
        bits ^= last
    return members


def _negated_ratio(distances: np.ndarray, scale: np.ndarray) -> np.ndarray:
    ratio = np.zeros(len(distances))
    np.divide(distances, scale, out=ratio, where=scale > 0)
    return (0 - ratio).astype(np.float32)


def _distances(values: np.ndarray, dimensions: int) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != dimensions:
        raise InputError(f"distances have {values.ndim} axes instead of {dimensions}; nothing was audited")
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError(
            "distances must be finite and not negative (similarities are negated distances); nothing was audited"
        )
    return values
