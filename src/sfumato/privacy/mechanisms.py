"""One-shot mechanisms: a count, two histograms, mean images. Each returns a value and the event it cost.

Guarantees are for one unit of the protected images, by add-or-remove-one. All share one order of work: look
at everything that can fail; compute the exact sum; `reservation.begin`, durable; draw the noise; return. A
process killed before `begin` has spent nothing, one killed after it has spent the event, and nothing but the
noisy value leaves. `begin` refuses an event that is not the reserved one.

A unit of several images contributes one image, drawn uniformly, to a histogram (so that its sensitivity is
that of an image), and the average over its images to mean images.

Histograms and the count use exact discrete noise. The discrete Gaussian is stated as the continuous event of
the same multiplier; it costs no more than that beyond the accounting's own rounding (a test compares them).
Mean images use
float64 noise; see `randomness` for the floating-point stance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from sfumato.errors import InputError
from sfumato.privacy.randomness import SecureStream, discrete_gaussian, discrete_laplace

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from sfumato.data.images import ProtectedImages
    from sfumato.privacy.ledger import Reservation

COUNT, LABEL_HISTOGRAM = "count", "label_histogram"
SEMANTIC_HISTOGRAM, MEAN_IMAGES = "semantic_histogram", "mean_images"
_ROWS_AT_ONCE = 2048


def count_event(epsilon: float) -> DpEvent:
    """The event of `count`."""
    from dp_accounting.dp_event import DiscreteLaplaceDpEvent

    return DiscreteLaplaceDpEvent(_positive(epsilon, "epsilon"), 1)


def label_histogram_event(noise_multiplier: float) -> DpEvent:
    """The event of `label_histogram`."""
    return _gaussian(noise_multiplier)


def semantic_histogram_event(noise_multiplier: float) -> DpEvent:
    """The event of `semantic_histogram`."""
    return _gaussian(noise_multiplier)


def mean_images_event(noise_multiplier: float) -> DpEvent:
    """The event of `mean_images`."""
    return _gaussian(noise_multiplier)


def count(private: ProtectedImages, epsilon: float, reservation: Reservation) -> tuple[int, DpEvent]:
    """The number of units plus discrete Laplace noise of scale 1 / epsilon, at least 1.

    Guarantee: (epsilon, 0)-DP; one unit changes the number by 1. Raising it to 1 is post-processing.
    """
    event = count_event(epsilon)
    exact = len(private._units)
    reservation.begin(COUNT, event)
    return max(discrete_laplace(exact, _at_least(1.0, 1 / epsilon, Fraction(epsilon))), 1), event


def label_histogram(
    private: ProtectedImages, noise_multiplier: float, reservation: Reservation
) -> tuple[np.ndarray, DpEvent]:
    """How many units have each label, plus discrete Gaussian noise: int64 [L], may be negative.

    Guarantee: Gaussian event of `noise_multiplier`; one unit changes one entry by 1 (L2 sensitivity 1).
    """
    event = label_histogram_event(noise_multiplier)
    rows = _one_row_per_unit(private, SecureStream())
    exact = np.bincount(private._labels[rows], minlength=len(private.label_names))
    reservation.begin(LABEL_HISTOGRAM, event)
    return discrete_gaussian(exact, float(noise_multiplier)), event


def semantic_histogram(
    private: ProtectedImages,
    classify: Callable[[np.ndarray], np.ndarray],
    num_classes: int,
    top_k: int,
    noise_multiplier: float,
    reservation: Reservation,
    batch_size: int = 512,
) -> tuple[np.ndarray, DpEvent]:
    """Which public classes the private images resemble (PrivImage, arXiv 2311.12850).

    A unit with label y adds 1 to its `top_k` highest-scoring classes in row y, each class once; every cell
    then gets discrete Gaussian noise of scale noise_multiplier * sqrt(top_k).

    Guarantee: Gaussian event of `noise_multiplier`; one unit changes top_k cells by 1, L2 sensitivity
    sqrt(top_k). It requires that `classify` treats each image by itself: no batch normalisation in training
    mode, nothing learnt from private images, no randomness. Batches are padded with zeros to `batch_size`, so
    that the other images never meet a batch of another shape.

    Args:
        classify: uint8 [B, H, W, C] -> scores [B, num_classes], higher is more alike.
        num_classes: M.

    Returns:
        int64 [L, M], may be negative, and the event.

    Raises:
        InputError: Wrong shape or NaN scores, or top_k outside 1 .. M; no budget was spent.
    """
    event = semantic_histogram_event(noise_multiplier)
    if not 1 <= top_k <= num_classes:
        raise InputError(f"top-k is {top_k}, but there are {num_classes} public classes; no budget was spent")
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}; no budget was spent")
    rows = _one_row_per_unit(private, SecureStream())
    exact = np.zeros((len(private.label_names), num_classes), dtype=np.int64)
    for batch, images in _padded_batches(private, rows, batch_size):
        scores = np.asarray(classify(images))
        if scores.shape != (batch_size, num_classes) or np.isnan(scores).any():
            raise InputError(
                f"the query classifier must give {num_classes} numbers for each image, none of them NaN; no "
                "budget was spent. Train it again on the public images"
            )
        best = np.argsort(-scores[: len(batch)], axis=1, kind="stable")[:, :top_k]  # distinct, never -1
        np.add.at(exact, (private._labels[batch][:, None], best), 1)
    scale = _at_least(
        float(noise_multiplier), noise_multiplier * math.sqrt(top_k), Fraction(1, top_k), power=2
    )
    reservation.begin(SEMANTIC_HISTOGRAM, event)
    return discrete_gaussian(exact, scale), event


def mean_images(
    private: ProtectedImages,
    per_label: int,
    clip_norm: float,
    noise_multiplier: float,
    public_size: float,
    reservation: Reservation,
    *,
    center: float | np.ndarray = 0.0,
    label_counts: np.ndarray | None = None,
) -> tuple[np.ndarray, DpEvent]:
    """Noisy mean images of each label (DP-FETA's warm-up, arXiv 2504.01395, with a public divisor).

    Each unit goes to one of `per_label` groups at random. Its vector is the average over its images of
    one_hot(label) x (image / 127.5 - 1 - center), over all labels jointly, clipped to L2 norm `clip_norm` and
    added to its group. The sums get Gaussian noise of standard deviation noise_multiplier * clip_norm once
    and are divided by a public number of units per label and group; `center` is added back and the result cut
    to [-1, 1], which is post-processing.

    Guarantee: Gaussian event of `noise_multiplier`; one unit changes the sums by at most clip_norm in L2.

    Args:
        per_label: Mean images per label, m.
        public_size: Public number of units (declared, or a DP count), never the true one. Divisor:
            public_size / (L m), as if labels were equally frequent.
        center: Public value, or array [H, W, C] or [L, 1, H, W, C], in [-1, 1] that is subtracted first and
            added back, e.g. the mean of public images. The closer to the private images, the less the
            clipping bites.
        label_counts: Public units per label [L], e.g. a released label histogram; replaces public_size / L.

    Returns:
        float32 [L, m, H, W, C] in [-1, 1], and the event.
    """
    event = mean_images_event(noise_multiplier)
    clip_norm = _positive(clip_norm, "the clip norm")
    labels, shape = len(private.label_names), tuple(private._images.shape[1:])
    if per_label < 1 or not (math.isfinite(public_size) and public_size > 0):
        raise InputError(
            "mean images need at least one group and a positive public size; no budget was spent"
        )
    divisor = np.full(labels, max(public_size, 1.0) / (labels * per_label))
    if label_counts is not None:
        if np.shape(label_counts) != (labels,):
            raise InputError(f"there must be one count for each of the {labels} labels; no budget was spent")
        divisor = np.maximum(np.asarray(label_counts, dtype=np.float64), 1.0) / per_label
    middle = np.broadcast_to(np.asarray(center, dtype=np.float64), (labels, 1, *shape))
    if not np.isfinite(middle).all():
        raise InputError("the center of mean images must be finite; no budget was spent")

    stream = SecureStream()
    sums = np.zeros((labels, per_label, math.prod(shape)))
    for part in _in_parts(private._units):
        _add_clipped(sums, private, part, middle.reshape(labels, -1), clip_norm, stream)
    reservation.begin(MEAN_IMAGES, event)
    sums += noise_multiplier * clip_norm * stream.gaussian(sums.shape)
    means = sums.reshape(labels, per_label, *shape) / divisor.reshape(-1, 1, 1, 1, 1) + middle
    return np.clip(means, -1, 1).astype(np.float32), event


def _add_clipped(
    sums: np.ndarray,
    private: ProtectedImages,
    units: list[np.ndarray],
    center: np.ndarray,
    clip_norm: float,
    stream: SecureStream,
) -> None:
    """Adds the clipped vector of each unit to its random group: sums [L, m, D], center [L, D]."""
    labels, groups = sums.shape[:2]
    rows = np.concatenate(units)
    owner = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    weight = 1.0 / np.bincount(owner, minlength=len(units))[owner]
    label = private._labels[rows]
    pixels = private._images[rows].reshape(len(rows), -1) / 127.5 - 1 - center[label]
    blocks, block = np.unique(owner * labels + label, return_inverse=True)  # one block per unit and label
    vectors = np.zeros((len(blocks), pixels.shape[1]))
    np.add.at(vectors, block, pixels * weight[:, None])
    block_owner, block_label = blocks // labels, blocks % labels
    norms = np.sqrt(np.bincount(block_owner, (vectors**2).sum(axis=1), minlength=len(units)))
    # A hair below the clip norm, so that rounding cannot carry a clipped vector above it.
    scale = np.minimum(1.0, clip_norm * (1 - 1e-9) / np.maximum(norms, 1e-300))
    group = stream.integers(groups, len(units))
    np.add.at(sums, (block_label, group[block_owner]), vectors * scale[block_owner][:, None])


def _in_parts(units: object) -> Iterator[list[np.ndarray]]:
    """The units in lists of about `_ROWS_AT_ONCE` rows; a unit is never split."""
    part: list[np.ndarray] = []
    rows = 0
    for unit in units:  # type: ignore[attr-defined]
        if len(unit) == 0:
            continue
        part.append(unit)
        rows += len(unit)
        if rows >= _ROWS_AT_ONCE:
            yield part
            part, rows = [], 0
    if part:
        yield part


def _padded_batches(
    private: ProtectedImages, rows: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of each batch and their images, uint8 [batch_size, H, W, C], padded with zeros: a public network
    never meets a batch of another shape, whatever the number of images."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        images = np.zeros((batch_size, *private._images.shape[1:]), dtype=np.uint8)
        images[: len(batch)] = private._images[batch]
        yield batch, images


def _one_row_per_unit(private: ProtectedImages, stream: SecureStream) -> np.ndarray:
    """One image of each unit, drawn uniformly: int64 [units]."""
    units = [unit for unit in private._units if len(unit)]
    rows = np.fromiter((unit[0] for unit in units), dtype=np.int64, count=len(units))
    for index, unit in enumerate(units):
        if len(unit) > 1:
            rows[index] = unit[stream.integers(len(unit), 1)[0]]
    return rows


def _gaussian(noise_multiplier: float) -> DpEvent:
    from dp_accounting.dp_event import GaussianDpEvent

    return GaussianDpEvent(_positive(noise_multiplier, "the noise multiplier"))


def _positive(value: float, name: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be positive and finite, not {value}; no budget was spent")
    return float(value)


def _at_least(wanted: float, value: float, factor: Fraction, power: int = 1) -> float:
    """The float `value`, raised by last bits until value**power * factor >= wanted**power exactly."""
    while Fraction(value) ** power * factor < Fraction(wanted) ** power:
        value = math.nextafter(value, math.inf)
    return value
