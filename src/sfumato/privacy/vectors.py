"""Two one-shot mechanisms on vectors made from private images: a noisy mean, and a vote for the nearest candidate.

Both are what private personalisation needs (DPAgg-TI, arXiv 2411.14639: one textual-inversion token per image, and
only their noisy mean leaves), and neither knows what the vectors mean.

**Order of work**, as in `mechanisms`: everything that can fail, then the exact sum, then `reservation.begin`, durable,
then the noise. **Exact noise**: a unit's clipped vector is rounded towards zero onto a lattice of clip_norm / 2^20,
which cannot make it longer; lengths are checked in integers, the sum is an integer, and it gets OpenDP's discrete
Gaussian. So the noise and the sensitivity do not rest on floating point; that a unit's vector is the same number
whoever else is there does, and `check_embed` tests it. The certificate states the continuous event; a test compares
the two.

**A unit that cannot be embedded** (its vector is not finite) counts as the centre, its residual being zero, and a unit
whose scores are not finite casts no vote. Nobody is told: that it happened is a fact about private images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sfumato.errors import InputError
from sfumato.privacy.mechanisms import _at_least, _one_row_per_unit, _padded_batches, _positive
from sfumato.privacy.randomness import SecureStream, discrete_gaussian
from sfumato.privacy.selection import _noisy_max

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from sfumato.data.images import ProtectedImages
    from sfumato.privacy.ledger import Reservation

VECTOR_MEAN, NEAREST = "vector_mean", "nearest_candidate"
_FINE = 1 << 20  # lattice steps in one clip norm


class Embed(Protocol):
    """Images to vectors, each image by itself; `check_embed` tests it.

    dimension: D. batch_size: images in every call; batches are padded with zeros up to it. A call with uint8
    [batch_size, H, W, C] gives [batch_size, D], rows of NaN where it failed; `steps` shortens the work for the test.
    """

    @property
    def dimension(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray: ...


Scores = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, C] -> float [B, m]: how well each candidate fits each image, higher is better."""


@dataclass(frozen=True)
class MeanPlan:
    """All that enters the noisy mean besides the images; fixed and public.

    center: [D]; what vectors are measured from, and what nothing pulls away from. basis: [D, k] with orthonormal
    columns, or None for all D directions; only what lies along it is released. clip_norm: R, the length a residual
    is clipped to. noise_multiplier: standard deviation of the noise over R. divisor: *public* number of units times
    the sampling probability. sampling_probability: q, each unit's chance to take part (Poisson). normalise: make each
    vector exactly R long instead of at most, as published DPAgg-TI does with R = 1 and center 0.
    """

    center: np.ndarray
    clip_norm: float
    noise_multiplier: float
    divisor: float
    basis: np.ndarray | None = None
    sampling_probability: float = 1.0
    normalise: bool = False

    def __post_init__(self) -> None:
        _positive(self.clip_norm, "the clip norm")
        _positive(self.noise_multiplier, "the noise multiplier")
        _positive(self.divisor, "the public divisor")
        if not 0 < self.sampling_probability <= 1:
            raise InputError(
                f"the sampling probability must lie above 0 and not above 1, not {self.sampling_probability}; no "
                "budget was spent"
            )
        if self.center.ndim != 1 or not np.isfinite(self.center).all():
            raise InputError("the center must be one vector of finite numbers; no budget was spent")
        basis = self.basis
        if basis is not None:
            fits = basis.ndim == 2 and len(basis) == len(self.center) and 1 <= basis.shape[1] <= len(basis)
            if not fits or not np.allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5):
                raise InputError(
                    f"the basis must be orthonormal columns of length {len(self.center)}; no budget was spent"
                )

    @property
    def dimension(self) -> int:
        """k, the number of directions that get noise."""
        return len(self.center) if self.basis is None else self.basis.shape[1]

    @property
    def noise(self) -> float:
        """Standard deviation of the released mean in each of the k directions."""
        return self.noise_multiplier * self.clip_norm / self.divisor

    @property
    def event(self) -> DpEvent:
        """The event of `vector_mean` under this plan."""
        return vector_mean_event(self.noise_multiplier, self.sampling_probability)


def vector_mean_event(noise_multiplier: float, sampling_probability: float = 1.0) -> DpEvent:
    """The event of `vector_mean`: Gaussian, of a Poisson sample where the probability is below 1."""
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

    gaussian = GaussianDpEvent(_positive(noise_multiplier, "the noise multiplier"))
    return gaussian if sampling_probability == 1 else PoissonSampledDpEvent(sampling_probability, gaussian)


def nearest_candidate_event(epsilon: float) -> DpEvent:
    """The event of `nearest_candidate`: epsilon-DP and nothing more, see `selection`."""
    from dp_accounting.dp_event import DiscreteLaplaceDpEvent

    return DiscreteLaplaceDpEvent(_positive(epsilon, "epsilon"), 1)


def vector_mean(
    private: ProtectedImages, embed: Embed, plan: MeanPlan, reservation: Reservation
) -> tuple[np.ndarray, DpEvent]:
    """center + (sum over units of the clipped residual + noise) / divisor (arXiv 2411.14639, with a public divisor).

    A unit's residual is the average over its images of their vectors, minus the centre, in the coordinates of the
    basis, clipped to clip_norm. Each unit takes part with probability q.

    Guarantee: `plan.event`, for adding or removing one unit; the sum then moves by at most clip_norm in L2. It
    requires that `embed` treats each image by itself, which is tested first on random images, to the last bit:
    training for hundreds of steps would make much of a difference in rounding.

    Returns:
        float64 [D], and the event.

    Raises:
        InputError: `embed` lets images influence each other, or gives another shape; no budget was spent.
    """
    event = plan.event
    if embed.dimension != len(plan.center):
        raise InputError(
            f"the vectors have {embed.dimension} numbers and the center has {len(plan.center)}; no budget was spent"
        )
    check_embed(embed, private._images.shape[1:])
    stream = SecureStream()
    units = [unit for unit in private._units if len(unit)]
    if plan.sampling_probability < 1:
        taken = stream.bernoulli(plan.sampling_probability, len(units))
        units = [unit for unit, here in zip(units, taken, strict=True) if here]
    total = np.zeros(plan.dimension, np.int64)
    with np.errstate(all="ignore"):  # a warning of an overflow would tell
        for vector in _unit_vectors(private, units, embed, plan.center):
            total += _on_lattice(vector, plan)
    scale = _FINE * plan.noise_multiplier  # exact: a power of two
    reservation.begin(VECTOR_MEAN, event)
    noisy = discrete_gaussian(total, scale) * (plan.clip_norm / _FINE / plan.divisor)
    return plan.center + (noisy if plan.basis is None else plan.basis @ noisy), event


def nearest_candidate(
    private: ProtectedImages,
    scores: Scores,
    candidates: int,
    epsilon: float,
    reservation: Reservation,
    batch_size: int = 32,
) -> tuple[int, DpEvent]:
    """The candidate that fits most units best, by report-noisy-max over one vote for each unit, and the event.

    After DPPL (arXiv 2406.08039): choosing among public prototypes costs nothing in their dimension. A unit of several
    images votes by one of them, drawn uniformly.

    Guarantee: (epsilon, 0)-DP for adding or removing one unit, see `selection`: one unit raises one count by 1. It
    requires that `scores` treats each image by itself; tested on random images first.

    Raises:
        InputError: Fewer than two candidates, or scores of another shape; no budget was spent.
    """
    event = nearest_candidate_event(epsilon)
    if candidates < 2:
        raise InputError(f"there is nothing to choose between {candidates} candidate(s); no budget was spent")

    def asked(images: np.ndarray) -> np.ndarray:
        found = np.array(scores(images), np.float64)  # a copy: the next call may reuse the array
        if found.shape != (len(images), candidates):
            raise InputError(
                f"scores must be {candidates} numbers for each image, not {found.shape}; no budget was spent"
            )
        return found

    _check_alone(asked, private._images.shape[1:], batch_size, "the scores")
    exact = np.zeros(candidates, np.int64)
    rows = _one_row_per_unit(private, SecureStream())
    with np.errstate(all="ignore"):
        for batch, images in _padded_batches(private, rows, batch_size):
            found = asked(images)[: len(batch)]
            found = found[np.isfinite(found).all(1)]
            exact += np.bincount(found.argmax(1), minlength=candidates) if len(found) else 0
    scale = _at_least(1.0, 1 / epsilon, Fraction(epsilon))
    reservation.begin(NEAREST, event)
    return _noisy_max(exact, scale), event


def check_embed(embed: Embed, shape: Any, steps: int = 2) -> None:
    """Tries `embed` on random images for a few steps; raises InputError where one image moves another's vector, or
    where nothing comes back that could tell."""

    def asked(images: np.ndarray) -> np.ndarray:
        found = _embedded(embed, images, steps)
        shown = found[images.any(axis=(1, 2, 3))]  # not the padding
        if not np.isfinite(shown).all() or (len(shown) > 1 and (shown == shown[0]).all()):
            raise InputError(
                "embedding random images gives nothing to compare (not finite, or all alike), so whether images "
                "influence each other cannot be tested; no budget was spent. Use another model"
            )
        return found

    _check_alone(asked, shape, embed.batch_size, "the embedding")


def _embedded(embed: Embed, images: np.ndarray, steps: int | None = None) -> np.ndarray:
    """The vectors, in an array of their own (the next call may reuse the other): float64 [batch_size, D]."""
    found = np.array(embed(images, steps=steps), np.float64)
    if found.shape != (len(images), embed.dimension):
        raise InputError(
            f"embedding gave {found.shape} for {len(images)} images of {embed.dimension} numbers; no budget was "
            "spent"
        )
    return found


def _check_alone(asked: Callable[[np.ndarray], np.ndarray], shape: Any, batch_size: int, what: str) -> None:
    """Each row's answer must be the same to the last bit in another place, and among other images."""
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}; no budget was spent")
    source = np.random.default_rng(0)
    images = source.integers(0, 256, (batch_size, *shape), dtype=np.uint8)
    first = asked(images)
    moved = asked(np.roll(images, 1, axis=0))
    alone = images.copy()
    alone[1:] = 0
    if not (
        np.array_equal(np.roll(moved, -1, axis=0), first, equal_nan=True)
        and np.array_equal(asked(alone)[0], first[0], equal_nan=True)
    ):
        raise InputError(
            f"{what} of one image changes with the other images of its batch or its place among them, so adding one "
            "image would move all others and no guarantee would hold; no budget was spent. Use a batch size of 1"
        )


def _unit_vectors(
    private: ProtectedImages, units: list[np.ndarray], embed: Embed, center: np.ndarray
) -> Iterator[np.ndarray]:
    """Each unit's vector minus the centre, float64 [D]; an image without a finite vector counts as the centre."""
    if not units:
        return
    rows = np.concatenate(units)
    residuals = np.empty((len(rows), len(center)))
    done = 0
    for batch, images in _padded_batches(private, rows, embed.batch_size):
        found = _embedded(embed, images)[: len(batch)] - center
        found[~np.isfinite(found).all(1)] = 0.0
        residuals[done : done + len(batch)] = found
        done += len(batch)
    start = 0
    for unit in units:
        yield residuals[start : start + len(unit)].mean(0)
        start += len(unit)


def _on_lattice(residual: np.ndarray, plan: MeanPlan) -> np.ndarray:
    """A residual clipped to the clip norm, in steps of clip_norm / 2^20, int64 [k]; never longer than 2^20."""
    along = residual  # einsum adds in one order, always
    if plan.basis is not None:
        along = np.einsum("dk,d->k", plan.basis, residual)
    length = float(np.linalg.norm(along))
    if not math.isfinite(length) or length == 0:
        return np.zeros(plan.dimension, np.int64)
    short = plan.clip_norm * (1 - 1e-9)
    factor = short / length if plan.normalise else min(1.0, short / length)
    steps = np.trunc(along * (factor * _FINE / plan.clip_norm)).astype(np.int64)
    if sum(int(step) ** 2 for step in steps) > _FINE**2:  # proven, not hoped for
        return np.zeros(plan.dimension, np.int64)
    return steps
