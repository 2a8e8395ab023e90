"""Nearest-neighbour votes: which public candidates the private images resemble (Private Evolution's query).

Algorithm 2 of Lin et al., "Differentially Private Synthetic Data via Foundation Model APIs 1: Images" (arXiv
2305.15560), up to its threshold, which is post-processing.

A unit's vote must depend on nothing but the unit and the candidates: a last bit that moves with the place of
an image in its batch could flip a near tie of every other unit, and one unit more would then change many cells.
So images are embedded in batches of one fixed shape, or one by one where the network's rounding depends on the
place; and distances are compared in exact arithmetic, on a fine grid that is laid over the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from sfumato.errors import InputError
from sfumato.privacy.mechanisms import _gaussian, _one_row_per_unit, _padded_batches
from sfumato.privacy.randomness import SecureStream, discrete_gaussian
from sfumato.progress import Progress

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from sfumato.data.images import ProtectedImages
    from sfumato.privacy.ledger import Reservation

MECHANISM = "nearest_neighbour_histogram"
Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, C] -> float [B, D]; each image by itself."""

_EXACT = 53  # whole numbers below 2^53 are exact in float64, in any order of summation
_HEADROOM = 2  # bits: private features count up to four times as far from the candidates' centre as these
_CELLS_AT_ONCE = 1 << 22
_MIXES = 1e-3


def nearest_neighbour_histogram_event(noise_multiplier: float) -> DpEvent:
    """The event of one `nearest_neighbour_histogram`, and of one `VoteCounter.votes`."""
    return _gaussian(noise_multiplier)


def nearest_neighbour_histogram(
    private: ProtectedImages,
    candidate_features: np.ndarray,
    candidate_labels: np.ndarray,
    embed: Embed,
    noise_multiplier: float,
    reservation: Reservation,
    batch_size: int = 32,
) -> tuple[np.ndarray, DpEvent]:
    """One `VoteCounter.votes`, for a single set of candidates; see there for arguments and guarantee."""
    counter = VoteCounter(private, embed, noise_multiplier, batch_size)
    return counter.votes(candidate_features, candidate_labels, reservation)


class VoteCounter:
    """Lets the units of `private` vote for candidates, as often as was reserved; embeds them only once.

    It gives nothing away by itself: the embedded images stay inside, unnoised, like the images they are of.
    A unit of several images votes with one of them, drawn uniformly from secret randomness when the counter
    is made.

    embed: public; must treat each image by itself (no batch normalisation in training mode) and must not
    have learnt anything from private images. The sum is exact whatever `batch_size`, a speed knob.

    Raises InputError when `embed` mixes images, gives NaN or infinities, or the wrong shape; no budget was
    spent. Memory: 4 D bytes a unit.
    """

    def __init__(
        self, private: ProtectedImages, embed: Embed, noise_multiplier: float, batch_size: int = 32
    ) -> None:
        self._event = nearest_neighbour_histogram_event(noise_multiplier)
        self._noise_multiplier = float(noise_multiplier)
        self._num_labels = len(private.label_names)
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}; no budget was spent")
        rows = _one_row_per_unit(private, SecureStream())
        rows = rows[np.argsort(private._labels[rows], kind="stable")]
        # These names are the ones that no module outside sfumato.privacy may touch; a test enforces it.
        self._labels = private._labels[rows]
        self._units = _embedded(private, rows, embed, batch_size)

    def __repr__(self) -> str:
        return f"VoteCounter(noise_multiplier={self._noise_multiplier:g})"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a VoteCounter gives no access to what it holds: call votes()")

    __iter__ = __len__ = __getitem__ = __contains__ = _refuse
    __array__ = __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return True

    def votes(
        self, candidate_features: np.ndarray, candidate_labels: np.ndarray, reservation: Reservation
    ) -> tuple[np.ndarray, DpEvent]:
        """How many units have each candidate as their nearest, plus discrete Gaussian noise.

        A unit with label y votes for the candidate of label y at the least Euclidean distance of its features,
        the first of equally near ones. Where no candidate has label y its vote is dropped.

        Guarantee: Gaussian event of `noise_multiplier` for adding or removing one unit: its one vote changes
        one cell by 1 (L2 sensitivity 1). T calls are T units of work of one reservation; their candidates may
        depend on earlier votes. Each call begins its own, durably, before the noise is drawn.

        Args:
            candidate_features: Public, float [M, D], from the same `embed`.
            candidate_labels: int [M], from 0 to L - 1.

        Returns:
            int64 [M], may be negative, and the event of this call.

        Raises:
            InputError: No or unusable candidates; nothing was spent on these votes.
            LedgerError: Not reserved, or all that was reserved has begun; nothing was released.
        """
        features, labels = self._candidates(candidate_features, candidate_labels)
        exact = np.zeros(len(features), dtype=np.int64)
        grid = _Grid(features)
        for label in np.unique(labels):
            mine = np.flatnonzero(labels == label)
            first, last = np.searchsorted(self._labels, [label, label + 1])
            chosen = grid.nearest(self._units[first:last], features[mine])
            exact[mine] += np.bincount(chosen, minlength=len(mine))
        reservation.begin(MECHANISM, self._event)
        return discrete_gaussian(exact, self._noise_multiplier), self._event

    def _candidates(self, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
        dimension = self._units.shape[1]
        if features.ndim != 2 or features.shape[1] != dimension or not len(features):
            raise InputError(
                f"candidates must have features [M, {dimension}] of the encoder that the private images have, not "
                f"{list(features.shape)}; no budget was spent on these votes. Embed them with the same encoder"
            )
        if not np.isfinite(features).all():
            raise InputError(
                "the encoder gives NaN or infinite features for a candidate; no budget was spent on these votes. "
                "Choose another encoder"
            )
        good = labels.shape == (len(features),) and np.issubdtype(labels.dtype, np.integer)
        if not good or labels.min() < 0 or labels.max() >= self._num_labels:
            raise InputError(
                f"each of the {len(features)} candidates needs a label from 0 to {self._num_labels - 1}; no budget "
                "was spent on these votes"
            )
        return features, labels


class _Grid:
    """Whole numbers for features, fine enough for float32 and small enough that distances are exact."""

    def __init__(self, candidates: np.ndarray) -> None:
        self._center = candidates.mean(axis=0)
        bits = (_EXACT - math.ceil(math.log2(candidates.shape[1]))) // 2
        self._most = 2.0**bits
        reach = float(np.abs(candidates - self._center).max())
        # All cells of a degenerate set of candidates are one; then the first is the nearest to everything.
        self._fineness = min(2.0 ** (bits - _HEADROOM) / reach, 1e280) if reach > 0 else 0.0

    def cells(self, features: np.ndarray) -> np.ndarray:
        """Each feature's grid line, a whole number in float64; what lies far outside is moved to the edge."""
        places = np.rint((features.astype(np.float64) - self._center) * self._fineness)
        return np.clip(places, -self._most, self._most)

    def nearest(self, voters: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Index of the nearest candidate of each voter, int64 [V]; the first of equally near ones."""
        public = self.cells(candidates)
        norms = (public**2).sum(axis=1)
        block = max(1, _CELLS_AT_ONCE // max(public.shape))
        chosen = np.zeros(len(voters), dtype=np.int64)
        for start in range(0, len(voters), block):
            products = self.cells(voters[start : start + block]) @ public.T
            chosen[start : start + block] = np.argmin(norms - 2 * products, axis=1)
        return chosen


def _embedded(private: ProtectedImages, rows: np.ndarray, embed: Embed, batch_size: int) -> np.ndarray:
    """Features of these images: float32 [rows, D]. The bar shows a share, since their number is private."""
    shape = tuple(private._images.shape[1:])
    batch_size, dimension = _checked(embed, shape, batch_size)
    out = np.empty((len(rows), dimension), dtype=np.float32)
    with Progress("embed private images", 100, "%") as progress:
        done = 0
        for batch, images in _padded_batches(private, rows, batch_size):
            out[done : done + len(batch)] = _features(embed, images, dimension)[: len(batch)]
            done += len(batch)
            progress.advance(100 * done // len(rows) - progress.done)
    return out


def _checked(embed: Embed, shape: tuple[int, ...], batch_size: int) -> tuple[int, int]:
    """The batch size to use and D, from random public images: the same ones together, turned round, and apart.

    A batch of 1 is used when an image's features depend on its place or company by a rounding error; by more
    than that, `embed` is refused.
    """
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), dtype=np.uint8)
    together = _features(embed, images, None)
    apart = np.zeros_like(images)
    apart[-1] = images[0]
    turned = _features(embed, np.roll(images, 1, axis=0), together.shape[1])
    alone = _features(embed, apart, together.shape[1])[-1]
    wrong = max(
        np.abs(np.roll(turned, -1, axis=0) - together).max(initial=0.0),
        np.abs(alone - together[0]).max(initial=0.0),
    )
    if not wrong <= _MIXES * max(np.abs(together).max(initial=0.0), 1e-30):
        raise InputError(
            "the encoder gives an image other features in other company, so one image would change the votes of "
            "others; no budget was spent. Use an encoder without batch statistics or randomness"
        )
    return (batch_size if wrong == 0 else 1), together.shape[1]


def _features(embed: Embed, images: np.ndarray, dimension: int | None) -> np.ndarray:
    features = np.asarray(embed(images))
    good = features.ndim == 2 and len(features) == len(images) and features.shape[1] > 0
    if not good or (dimension is not None and features.shape[1] != dimension):
        raise InputError(
            f"the encoder gives features of shape {list(features.shape)} for {len(images)} images, not one vector "
            "of a fixed length for each; no budget was spent. Choose another encoder"
        )
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise InputError(
            "the encoder gives NaN or infinite features for an image; no budget was spent. Choose another encoder"
        )
    return features
