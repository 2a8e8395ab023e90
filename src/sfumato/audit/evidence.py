"""One attack's images against training images and held-out ones: what is alike, how often, and more often than chance?

Everything here is computed from private images without a guarantee: for their owner only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.audit.calibration import Threshold, calibrate, excess, reference_blocks
from sfumato.audit.extraction import CARLINI_NEIGHBOURS, carlini_ratio, gu_ratio
from sfumato.audit.matching import best_matches
from sfumato.audit.scores import ams, banded, saturation, ums
from sfumato.audit.similarity import Extractor, informative
from sfumato.evaluation.intervals import clopper_pearson

BANDS = 4  # of equal width, from the threshold up to the closest match
COPIES, FAINT = 200, 4  # training images that a threshold has to recognise, and the noise on them, of 255
Score = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(N images, references) -> similarity float32 [N] to the closest reference, higher is closer, and its row [N]."""


@dataclass(frozen=True, eq=False)
class Found:
    """What N images are closest to; similarities are float32, higher is closer.

    similarity, index [N]: the closest training image. blocks [N, B]: similarity to the closest image of each of B
    disjoint blocks of the training images. held, held_index [N]: the closest of as many held-out images as a
    block has. informative: bool [N], neither blank nor nearly so.
    """

    similarity: np.ndarray
    index: np.ndarray
    blocks: np.ndarray
    held: np.ndarray
    held_index: np.ndarray
    informative: np.ndarray


@dataclass(frozen=True, eq=False)
class Copies:
    """Further images of pictures: uint8 [K, H, W, C], and the row int64 [K] of each one's picture."""

    images: np.ndarray
    of: np.ndarray


class References:
    """Training and held-out images, uint8 [N, H, W, C] and [M, H, W, C], and how images are compared with them.

    Both hold each picture once, and no picture is in both: `duplicates.duplicate_groups` says which are. train_copies,
    holdout_copies: further images of these pictures, in whose place they match (the ratios leave them out).
    seed: for the blocks (public randomness). directory: for features, under `internal/`.
    """

    def __init__(
        self,
        train: np.ndarray,
        holdout: np.ndarray,
        extractor: Extractor,
        *,
        seed: int,
        directory: Path,
        train_copies: Copies | None = None,
        holdout_copies: Copies | None = None,
    ) -> None:
        self.train, self.holdout, self.extractor, self._directory = train, holdout, extractor, directory
        self._copies, self._held_copies = train_copies, holdout_copies
        self.blocks, self.held_rows = reference_blocks(len(train), len(holdout), seed)
        self._seed = seed
        self._every = np.arange(len(train))
        self._rest = np.setdiff1d(np.arange(len(train)), np.concatenate(self.blocks))

    def matches(self, images: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `Score` of SIDE and of random sampling: similarity to the closest reference itself."""
        found = best_matches(images, among, self.extractor, directory=self._directory)
        return found.similarity[:, 0], found.index[:, 0]

    def carlini(self, images: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `Score` of Carlini et al.: minus the ratio of distances; see `extraction.carlini_ratio`."""
        found = best_matches(images, among, self.extractor, directory=self._directory)
        met, row = np.unique(found.index[:, 0], return_inverse=True)
        k = min(CARLINI_NEIGHBOURS + 1, len(among))
        around = best_matches(among[met], among, self.extractor, k=k, directory=self._directory)
        others = self._distance(around.similarity)[:, 1:]  # without the image itself
        return carlini_ratio(self._distance(found.similarity[:, 0]), row, others), found.index[:, 0]

    def gu(self, images: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The `Score` of Gu et al.: minus the distance to the closest over that to the second closest reference."""
        found = best_matches(images, among, self.extractor, k=2, directory=self._directory)
        first, second = self._distance(found.similarity).T
        return gu_ratio(first, np.maximum(first, second)), found.index[:, 0]

    def threshold(self, score: Score, rate: float) -> Threshold:
        """From what similarity on images match; from the held-out images. Raises `TooFewHeldOut`."""
        return calibrate(self._closest(self.holdout, score, self._every)[0], rate=rate)

    def recognised(self, score: Score, tau: float) -> float:
        """Share of (at most `COPIES`) training images that match with faint noise on them: what copies come to.

        Where held-out images are nearly training images (shifted copies, frames of one film, augmented images split
        at random), only what is closer still matches, and copies pass unseen. Then this share is small.
        """
        draw = np.random.default_rng(self._seed)
        some = np.asarray(self.train[draw.permutation(len(self.train))[:COPIES]])
        copies = np.clip(np.round(some + draw.normal(0, FAINT, some.shape)), 0, 255).astype(np.uint8)
        return float((self._closest(copies, score, self._every)[0] >= tau).mean())

    def search(self, images: np.ndarray, score: Score) -> Found:
        """Score the images against all training images, each block of them, and the held-out images."""
        parts = [self._closest(images, score, rows) for rows in self.blocks]
        blocks = np.stack([similarity for similarity, _ in parts], axis=1)
        if score == self.matches:  # the best of all is the best of the parts
            if len(self._rest):
                parts.append(self._closest(images, score, self._rest))
            every = np.stack([similarity for similarity, _ in parts], axis=1)
            best, each = every.argmax(axis=1), np.arange(len(images))
            similarity, index = every[each, best], np.stack([rows for _, rows in parts], axis=1)[each, best]
        else:
            similarity, index = self._closest(images, score, self._every)
        held, where = self._closest(images, score, self.held_rows, held=True)
        return Found(similarity, index, blocks, held, where, informative(images))

    def _closest(
        self, images: np.ndarray, score: Score, rows: np.ndarray, *, held: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Similarity to the closest of these training (or held-out) pictures, and its row."""
        pictures, copies = (self.holdout, self._held_copies) if held else (self.train, self._copies)
        among = pictures[rows]
        if copies is not None and score == self.matches:
            here = np.isin(copies.of, rows)
            among, rows = (
                np.concatenate([among, copies.images[here]]),
                np.concatenate([rows, copies.of[here]]),
            )
        similarity, index = score(images, among)
        return similarity, rows[index]

    def closeness(self, images: np.ndarray) -> float:
        """Mean similarity to the closest of a block less that to the closest held-out image; about 0 if fresh."""
        found = self.search(images, self.matches)
        return float((found.blocks.mean(axis=1) - found.held).mean())

    def _distance(self, similarity: np.ndarray) -> np.ndarray:
        if self.extractor.metric == "cosine":  # of unit vectors
            return np.sqrt(np.maximum(0, 2 - 2 * similarity))
        return -similarity


def figures(found: Found, threshold: Threshold, *, level: float) -> dict[str, Any]:
    """An attack's entry in audit.json.

    Images that are not informative count as generated, and as no match: everything resembles a blank image.
    level: of the interval of the excess; with several attacks one of them is then wrong with probability
    1 - level at most, if each gets its share.
    """
    tau, total = threshold.value, len(found.similarity)
    seen = np.where(found.informative, found.similarity, -np.inf)
    hits = (found.blocks >= tau).sum(axis=1) * found.informative
    held = (found.held >= tau) & found.informative
    # Images around one reference, of either kind, stand or fall together.
    clusters = np.where(found.similarity >= found.held, found.index, -1 - found.held_index)
    interval = excess(hits, held, clusters, blocks=found.blocks.shape[1], level=level)
    matches = int((seen >= tau).sum())
    groups = np.arange(found.index.max() + 1)  # every reference is a group of its own
    top = float(np.nextafter(max(found.similarity.max(), tau), np.float32(np.inf)))
    edges = np.linspace(tau, top, BANDS + 1)
    return {
        "num_images": total,
        "matches": matches,
        "distinct": len(np.unique(found.index[seen >= tau])),
        "ams": ams(seen, tau),
        "ams_ci": list(clopper_pearson(matches, total)),
        "ums": ums(found.index, seen, groups, tau),
        "excess": interval.value,
        "ci": [interval.low, interval.high],
        "level": level,
        "bands": banded(seen, found.index, groups, list(pairwise(edges.tolist()))),
        "saturation": saturation(seen, found.index, groups, tau),
        "filtered": int((~found.informative).sum()),
        "threshold": tau,
    }
