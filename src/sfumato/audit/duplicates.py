"""Near-duplicate groups over training and held-out images: one picture counts once, however often it was stored.

No privacy guarantee: who resembles whom is for the owner's eyes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sfumato.audit.matching import check_image_sets, pair_similarity, pairs_within
from sfumato.audit.similarity import Extractor, Variant, open_extractor
from sfumato.data.duplicates import SAME_PIXELS, SAME_THUMBNAIL, thumbnails
from sfumato.progress import Progress

SAME_TILE = 2 * SAME_PIXELS  # root mean square difference of the worst tile, of 255
SAME_BITS = 6  # of the 64 of a perceptual hash
SHARE = 0.2  # of the distance of two random images: duplicates are nearer than this, whatever the metric
_RANDOM_PAIRS, _AT_ONCE = 2000, 1024
_FLIP = Variant(flip=True)


@dataclass(frozen=True, eq=False)
class Groups:
    """train: int64 [N], holdout: int64 [M]: the group of each image, numbered over both from 0 in order of first
    appearance. overlapping: bool [M], held-out images that share a group with a training image: to be removed.

    counts: train_images, train_groups, holdout_images, holdout_groups, overlapping (held-out images), exact (images of
    both sets that equal an earlier one, pixel for pixel or flipped), largest (images of the largest group).
    """

    train: np.ndarray
    holdout: np.ndarray
    overlapping: np.ndarray
    counts: dict[str, int]


def duplicate_groups(
    train: np.ndarray, holdout: np.ndarray, extractors: Sequence[Extractor] | None = None
) -> Groups:
    """Groups of images uint8 [N, H, W, C] and [M, H, W, C] that are the same picture.

    Equal images, also after a horizontal flip, are in one group (by hash). So are two images that every extractor
    calls the same, as they are or one of them flipped, and whatever such pairs connect. The default, pixels, finds
    re-encodings, small noise and small changes of brightness, not crops, turns or shifts; give an encoder for those.
    (phash beside pixels loses noisy copies of smooth pictures, whose weak frequencies are noise; phash alone takes
    distinct digits for one.)

    The same is: a root mean square difference of at most 8 of 255 (16 in the worst tile), 6 of 64 bits, and for
    distances (cosine too, as the distance of unit vectors) at most a fifth of the median distance of random pairs:
    what varies little is not one picture for that, and a threshold that is too loose would chain everything together.
    Pairs are looked for among all by the first extractor; by pixels or tiles among those whose 8 by 8 block means
    agree within 4 of 255 (see `data.duplicates`).

    InputError for sets without images or of different height, width or channels.
    """
    check_image_sets(train=train, holdout=holdout)
    extractors = extractors or (open_extractor("pixels"),)
    both = _Both(train, holdout)
    groups = _equal(both)
    firsts = np.unique(groups, return_index=True)[1]
    exact = len(groups) - len(firsts)
    if len(firsts) > 1:
        groups = _joined(both, firsts, extractors)[groups]
    order, groups = np.unique(groups, return_index=True, return_inverse=True)[1:]
    groups = np.argsort(np.argsort(order))[groups]  # numbered by first appearance
    mine, held = groups[: len(train)], groups[len(train) :]
    overlapping = np.isin(held, mine)
    counts = {
        "train_images": len(mine), "train_groups": len(np.unique(mine)),
        "holdout_images": len(held), "holdout_groups": len(np.unique(held)),
        "overlapping": int(overlapping.sum()), "exact": exact, "largest": int(np.bincount(groups).max()),
    }  # fmt: skip
    return Groups(mine, held, overlapping, counts)


class _Both:
    """The images of two sets by their row in both."""

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self._first.shape[1:]), np.uint8)
        mine = rows < len(self._first)
        images[mine] = self._first[rows[mine]]
        images[~mine] = self._second[rows[~mine] - len(self._first)]
        return images

    def blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        return (self[rows[start : start + _AT_ONCE]] for start in range(0, len(rows), _AT_ONCE))


def _equal(both: _Both) -> np.ndarray:
    """A number for each image, the same for images that equal each other or each other's reflection."""
    digests = [
        min(hashlib.sha256(each.tobytes()).digest() for each in (image, image[:, ::-1]))
        for images in both.blocks(np.arange(len(both)))
        for image in images
    ]
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(digest, len(numbers)) for digest in digests])


def _joined(both: _Both, firsts: np.ndarray, extractors: Sequence[Extractor]) -> np.ndarray:
    """Component of each image both[firsts] in the graph of pairs that all extractors call the same."""
    limits = [_limit(both, firsts, extractor) for extractor in extractors]
    labels = np.arange(len(firsts))
    with Progress("near-duplicates", 2, "passes") as progress:
        for change in (Variant(), _FLIP):
            for left, right in _candidates(both, firsts, extractors[0], limits[0], change):
                apart = labels[left] != labels[right]
                left, right = left[apart], right[apart]
                for start in range(0, len(left), _AT_ONCE):
                    x, y = (firsts[each[start : start + _AT_ONCE]] for each in (left, right))
                    mine, others = both[x], change(both[y])
                    same = np.ones(len(x), bool)
                    for extractor, limit in zip(extractors, limits, strict=True):
                        same &= pair_similarity(extractor(mine), extractor(others), extractor.metric) >= limit
                    edges = (left[start : start + _AT_ONCE][same], right[start : start + _AT_ONCE][same])
                    if same.any():
                        labels = _merged(labels, *edges)
            progress.advance()
    return labels


def _merged(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Labels after uniting the components of left[i] and right[i]."""
    ends = labels[left], labels[right]
    graph = coo_array((np.ones(len(left), np.int8), ends), shape=(len(labels), len(labels)))
    return connected_components(graph, directed=False)[1][labels]


def _candidates(
    both: _Both, firsts: np.ndarray, extractor: Extractor, limit: float, change: Variant
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions in `firsts` that may be the same when the second one is changed."""
    if extractor.metric in ("euclidean", "tiles"):
        plain = np.concatenate([thumbnails(images) for images in both.blocks(firsts)])
        changed = np.concatenate([thumbnails(change(images)) for images in both.blocks(firsts)])
        return pairs_within(plain, changed, SAME_THUMBNAIL * np.sqrt(plain.shape[1]))
    plain = np.concatenate([np.asarray(extractor(images)) for images in both.blocks(firsts)])
    changed = np.concatenate([np.asarray(extractor(change(images))) for images in both.blocks(firsts)])
    largest = np.sqrt(-limit * plain.shape[1]) if extractor.metric == "hamming" else np.sqrt(2 - 2 * limit)
    return pairs_within(plain, changed, float(largest) * (1 + 1e-4))


def _limit(both: _Both, firsts: np.ndarray, extractor: Extractor) -> float:
    """The least similarity of two images that are the same picture."""
    if extractor.metric == "hamming":
        return -SAME_BITS / 64
    rng = np.random.default_rng(0)
    left = rng.integers(len(firsts), size=_RANDOM_PAIRS if len(firsts) > 2 else 1)
    right = (left + rng.integers(1, len(firsts), size=len(left))) % len(firsts)
    similarities = [
        pair_similarity(
            extractor(both[firsts[left[some]]]), extractor(both[firsts[right[some]]]), extractor.metric
        )
        for some in (slice(start, start + _AT_ONCE) for start in range(0, len(left), _AT_ONCE))
    ]
    typical = float(np.median(np.concatenate(similarities)))
    if extractor.metric == "cosine":
        return 1 - SHARE**2 * (1 - typical)
    largest = SAME_TILE if extractor.metric == "tiles" else SAME_PIXELS
    return max(SHARE * typical, -largest / 255)
