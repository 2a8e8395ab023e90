"""Surrogate conditions: what an unconditional generator's own images can be told apart by (SIDE, arXiv 2410.02467).

Images that a generator drew are clustered in the features of some encoder; which cluster an image belongs to is
the label that SIDE asks for later. Only generated images may come in here, never training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.errors import InputError

FEWEST_PER_CLUSTER = 5  # images on average: with fewer, clusters are single images and teach nothing
MINI_BATCHES_ABOVE = 20_000  # images
_DECIMALS = 5  # features that agree to so many decimals are of the same image


class NoUsableSurrogate(InputError):
    """The generated images do not fall into two groups: a result about the generator, not a fault."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """K' clusters of N generated images.

    centroids: float32 [K', D], unit vectors. labels: int64 [N], the nearest kept centroid of every image, in
    0 .. K'-1. cohesion: float64 [K'], mean cosine of the images that k-means gave the cluster to its centroid.
    sizes: int64 [K'], images per cluster after relabelling, at least 2. asked: the K of k-means.
    dropped: clusters that were too loose, or left with fewer than two images.
    """

    centroids: np.ndarray
    labels: np.ndarray
    cohesion: np.ndarray
    sizes: np.ndarray
    asked: int
    dropped: int

    def __len__(self) -> int:
        return len(self.centroids)


def find_clusters(
    features: np.ndarray, *, clusters: int = 100, cohesion: float = 0.5, seed: int = 0
) -> Surrogate:
    """Pseudo-labels from float features [N, D] of generated images, the same for the same seed.

    k-means on the L2-normalised features, K = `clusters`; clusters whose mean cosine to their centroid is below
    `cohesion` are dropped, and every image takes the label of its nearest kept centroid (section "Surrogate
    condition" of the paper, K = 100 and 0.5). K is at most N / 5 and the number of different images. Above 20,000
    images k-means works in mini-batches.

    Raises:
        NoUsableSurrogate: fewer than two clusters are left, as with a generator that always draws the same.
        InputError: features that are not finite, or fewer than ten.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or len(features) < 2 * FEWEST_PER_CLUSTER or not np.isfinite(features).all():
        raise InputError(
            f"pseudo-labels need finite features of {2 * FEWEST_PER_CLUSTER} generated images or more, not an array of "
            f"shape {list(features.shape)}; nothing was audited; generate more images"
        )
    if clusters < 2:
        raise InputError(f"{clusters} clusters tell nothing apart; nothing was audited; ask for 2 or more")
    units = unit_rows(features)
    different = len({row.tobytes() for row in units.round(_DECIMALS) + 0.0})  # + 0.0: -0 is 0
    count = min(clusters, len(units) // FEWEST_PER_CLUSTER, different)
    if count < 2:
        raise NoUsableSurrogate("the generated images are all alike")
    members, centroids = _k_means(units, count, seed)
    centroids = unit_rows(centroids)
    found = np.bincount(members, minlength=count)
    cosines = np.einsum("nd,nd->n", units, centroids[members], dtype=np.float64)
    mean = np.bincount(members, cosines, minlength=count) / np.maximum(found, 1)
    kept = np.flatnonzero((found >= 2) & (mean >= cohesion))
    labels = np.zeros(len(units), np.int64)
    while len(kept) >= 2:
        labels = (units @ centroids[kept].T).argmax(1).astype(np.int64)
        sizes = np.bincount(labels, minlength=len(kept))
        if sizes.min() >= 2:
            return Surrogate(centroids[kept], labels, mean[kept], sizes, count, count - len(kept))
        kept = kept[sizes >= 2]
    raise NoUsableSurrogate(
        f"only {len(kept)} of {count} clusters of generated images are coherent, with a mean cosine to their centroid "
        f"of {cohesion} or more"
    )


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Each row [N, D] divided by its L2 norm, float32; rows of zeros stay zeros."""
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def labels_of_conditions(
    conditions: np.ndarray, pseudo_labels: np.ndarray, labels: np.ndarray, seed: int
) -> np.ndarray:
    """For each condition (int64 [R]) the label of an image drawn at random from that cluster, int64 [R].

    pseudo_labels, labels: int64 [N], cluster and label of the generated images. So guided images of a
    class-conditional model have, cluster by cluster, the labels that the clusters' own images have.
    """
    draw = np.random.default_rng(seed).random(len(conditions))
    order = np.argsort(pseudo_labels, kind="stable")
    sizes = np.bincount(pseudo_labels, minlength=int(np.max(conditions)) + 1)
    if sizes[conditions].min() == 0:
        raise ValueError("a condition without images has no label")
    first = np.cumsum(sizes) - sizes
    return np.asarray(labels, np.int64)[
        order[first[conditions] + (draw * sizes[conditions]).astype(np.int64)]
    ]


def _k_means(units: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(cluster of each row, centroids); one thread, so that sums of floats do not depend on their order."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    settings: dict[str, Any] = {"n_clusters": count, "n_init": 3, "random_state": seed}
    model: Any = KMeans(**settings)
    if len(units) > MINI_BATCHES_ABOVE:
        # A batch holds several images of every cluster, or rare clusters would starve.
        model = MiniBatchKMeans(batch_size=max(4096, 20 * count), **settings)
    with threadpool_limits(1, user_api="openmp"):
        model.fit(units)
    return model.labels_.astype(np.int64), model.cluster_centers_
