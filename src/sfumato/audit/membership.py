"""Membership inference: can somebody who holds the model tell a training image from one that it never saw?

Four attacks on a diffusion model, each one number for each image, higher for likelier members: loss, SecMI
(Duan et al. 2023, arXiv 2302.01316), PIA (Kong et al. 2023, arXiv 2305.18355), SimA (Rao et al. 2025, arXiv
2509.25003). Noise levels are fixed below, before any data are seen: the attacks' papers state theirs as steps
of the linear DDPM schedule, here they are sigma = sqrt(1/alpha_bar - 1) of the same steps. Read every figure
beside the blind baseline (blind.py), which never sees the model.

Guarantee: none. All of this is computed from private images, for their owner only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sfumato.diffusion.generator import to_float
from sfumato.errors import InputError
from sfumato.evaluation.intervals import clopper_pearson
from sfumato.progress import Progress

if TYPE_CHECKING:
    from sfumato.audit.target import Model

LEVEL = 0.95
RATES = (0.001, 0.01)  # false-positive rates at which the true-positive rate is reported
ROC_POINTS = 200
MOST_LABELS = 16  # that a class-conditional model's answer is averaged over where a label is unknown
BATCH_PIXELS = 1 << 18  # pixels that go through a model together


def ddpm_sigma(step: int) -> float:
    """sigma of step t of the linear DDPM schedule, beta from 1e-4 to 0.02 in 1,000 steps (Ho et al. 2020)."""
    betas = np.linspace(1e-4, 0.02, 1000)[: step + 1]
    return math.sqrt(1 / float(np.prod(1 - betas)) - 1)


LOSS_LEVELS = (0.1, 0.2, 0.4, 0.8, 1.6)
SECMI_STEPS = tuple(range(0, 111, 10))  # Duan et al.: t = 100, ten steps apart; one more for the error
PIA_STEP = 200  # Kong et al., DDPM
SIMA_STEP = 100


def loss_scores(
    model: Model, images: np.ndarray, labels: np.ndarray | None = None, *, seed: int = 0
) -> np.ndarray:
    """Minus the denoising loss of each image: float64 [N], higher is likelier a member.

    images: uint8 [N, H, W, C] of the model's size and channels. labels: int64 [N] as the model numbers them, -1
    where unknown; None where all are. The loss is EDM's, (sigma^2 + 1/4) / (sigma/2)^2 times the mean squared error
    (arXiv 2206.00364, eq. 2), averaged over LOSS_LEVELS and, at each, over one noise and its negative. All images
    meet the same noise (seed), so that what differs is the image.
    """
    draw = torch.Generator().manual_seed(seed)
    shape = (model.channels, *model.size)
    levels = [(_clamped(model, level), torch.randn(shape, generator=draw)) for level in LOSS_LEVELS]

    def loss(denoise: _Denoise, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=torch.float64)
        for sigma, noise in levels:
            for sign in (1, -1):
                noisy = x + sign * sigma * noise.to(x.device)
                error = (denoise(noisy, sigma) - x).square().flatten(1).mean(1)
                total += error.double().cpu() * (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        return total / (2 * len(levels))

    return -_each(model, images, labels, loss, "membership: loss")


def secmi_scores(
    model: Model, images: np.ndarray, labels: np.ndarray | None = None, *, seed: int = 0
) -> np.ndarray:
    """Minus SecMI's t-error (eq. 9, SecMI_stat): float64 [N], higher is likelier a member.

    The image is carried deterministically (DDIM) to step 100, ten steps at a time, then one step further and back;
    the error is the squared distance between where it was and where it came back to. Arguments as for
    `loss_scores`; nothing is random, `seed` is there for the common signature.
    """
    del seed
    levels = [_clamped(model, ddpm_sigma(step)) for step in SECMI_STEPS]

    def error(denoise: _Denoise, x: Tensor) -> Tensor:
        def moved(x: Tensor, sigma: float, to: float) -> Tensor:
            return x + (to - sigma) * (x - denoise(x, sigma)) / sigma

        before = x
        for sigma, to in pairwise(levels[:-1]):
            before = moved(before, sigma, to)
        further = moved(before, levels[-2], levels[-1])
        back = moved(further, levels[-1], levels[-2])
        return (back - before).square().flatten(1).sum(1)

    return -_each(model, images, labels, error, "membership: SecMI")


def pia_scores(
    model: Model, images: np.ndarray, labels: np.ndarray | None = None, *, seed: int = 0
) -> np.ndarray:
    """Minus PIA's error R_{t,4} (eq. 11): float64 [N], higher is likelier a member.

    The noise predicted for the clean image at step 0 is added to it as the noise of step 200, and what the model
    predicts there is compared with it in the 4-norm: two calls. Arguments as for `secmi_scores`.
    """
    del seed
    first, later = (_clamped(model, ddpm_sigma(step)) for step in (0, PIA_STEP))

    def error(denoise: _Denoise, x: Tensor) -> Tensor:
        noise = (x - denoise(x, first)) / first
        noisy = x + later * noise
        again = (noisy - denoise(noisy, later)) / later
        return (noise - again).double().flatten(1).norm(4, dim=1)

    return -_each(model, images, labels, error, "membership: PIA")


def sima_scores(
    model: Model, images: np.ndarray, labels: np.ndarray | None = None, *, seed: int = 0
) -> np.ndarray:
    """Minus the 4-norm of the noise predicted for the clean image at step 100 (SimA): float64 [N].

    One call: the optimal denoiser answers with a mean of training images weighted by their nearness, so what it
    would take off a training image is small. Higher is likelier a member. Arguments as for `secmi_scores`.
    """
    del seed
    sigma = _clamped(model, ddpm_sigma(SIMA_STEP))

    def norm(denoise: _Denoise, x: Tensor) -> Tensor:
        return ((x - denoise(x, sigma)) / sigma).double().flatten(1).norm(4, dim=1)

    return -_each(model, images, labels, norm, "membership: SimA")


_Denoise = Callable[[Tensor, float], Tensor]


def _clamped(model: Model, sigma: float) -> float:
    """The level nearest to `sigma` that the model was trained for."""
    low, high = model.sigma_range
    return min(max(sigma, low), high)


@torch.no_grad()
def _each(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray | None,
    score: Callable[[_Denoise, Tensor], Tensor],
    description: str,
) -> np.ndarray:
    """`score(denoise, x)` [R] of all images, in batches, in float64 [N]."""
    if images.shape[1:] != (*model.size, model.channels):
        raise InputError(
            f"images of {images.shape[1:]} for a model of {(*model.size, model.channels)} (height, width, channels); "
            "nothing was audited. Bring them to the model's size"
        )
    known = np.full(len(images), -1) if labels is None else np.asarray(labels, np.int64)
    out = np.empty(len(images))
    step = max(1, BATCH_PIXELS // math.prod(images.shape[1:]))
    with Progress(description, total=len(images), unit="images") as progress:
        for start in range(0, len(images), step):
            rows = slice(start, min(start + step, len(images)))
            x = to_float(np.asarray(images[rows])).to(model.device)
            here = torch.from_numpy(known[rows]).to(model.device)
            out[rows] = score(lambda x, sigma, here=here: _denoised(model, x, sigma, here), x).cpu().numpy()
            progress.advance(len(x))
    if not np.isfinite(out).all():
        raise InputError(
            f"{description}: the model answers image {int(np.argmin(np.isfinite(out))) + 1} with numbers that are not "
            "finite; nothing was audited. Check that its weights are whole"
        )
    return out


def _denoised(model: Model, x: Tensor, sigma: float, labels: Tensor) -> Tensor:
    """D(x; sigma) given each image's own label; where it is unknown, the mean of D over the labels."""
    levels = torch.full((len(x),), sigma, device=x.device)
    if model.num_labels is None:
        return model.denoise(x, levels, None)
    unknown = labels < 0
    if not unknown.any():
        return model.denoise(x, levels, labels)
    count = model.num_labels
    tried = np.unique(np.linspace(0, count - 1, min(count, MOST_LABELS)).round().astype(int)).tolist()
    mean = sum(model.denoise(x, levels, torch.where(unknown, label, labels)) for label in tried)
    assert isinstance(mean, Tensor)
    return mean / len(tried)


@dataclass(frozen=True)
class Rate:
    """The true-positive rate at one false-positive rate, with its Clopper-Pearson interval and the counts.

    All are None where there are too few non-members to see that rate (fewer than 1 / rate).
    """

    value: float | None
    low: float | None
    high: float | None
    true_positives: int | None
    false_positives: int | None


@dataclass(frozen=True)
class Membership:
    """How well one attack tells members from non-members.

    auc: chance that a member scores above a non-member, ties half. auc_ci: its 95 % interval. tpr: "0.001" and
    "0.01" -> Rate. members, nonmembers: counts. roc: at most 200 points [false-positive rate, true-positive
    rate], ascending, dense where the rate is small.
    """

    auc: float
    auc_ci: tuple[float, float]
    tpr: dict[str, Rate]
    members: int
    nonmembers: int
    roc: list[list[float]]


def membership(members: np.ndarray, nonmembers: np.ndarray) -> Membership:
    """ROC of scores of members [N] and non-members [M], higher for likelier members.

    The threshold of a rate `a` is the lowest that at most a M non-members exceed, so the rate is never above the
    target; intervals are for that threshold. The area's interval is DeLong's (1988) on the logit scale; where the
    scores separate fully, so that DeLong has no variance, Clopper and Pearson's for min(N, M) disjoint pairs.

    Raises:
        InputError: fewer than two of either, or scores that are not finite.
    """
    positive, negative = np.asarray(members, float), np.asarray(nonmembers, float)
    for name, scores in (("training", positive), ("held-out", negative)):
        if len(scores) < 2 or not np.isfinite(scores).all():
            problem = "are too few" if len(scores) < 2 else "have scores that are not finite:"
            raise InputError(f"{len(scores)} {name} images {problem} for membership; nothing was audited")
    area, variance = _delong(positive, negative)
    return Membership(
        area,
        _area_interval(area, variance, min(len(positive), len(negative))),
        {f"{rate:g}": _rate(positive, negative, rate) for rate in RATES},
        len(positive),
        len(negative),
        _roc(positive, negative),
    )


def _rate(positive: np.ndarray, negative: np.ndarray, rate: float) -> Rate:
    allowed = int(rate * len(negative) + 1e-9)
    if allowed < 1:
        return Rate(None, None, None, None, None)
    threshold = np.partition(negative, -allowed - 1)[-allowed - 1] if allowed < len(negative) else -np.inf
    found = int((positive > threshold).sum())
    low, high = clopper_pearson(found, len(positive), LEVEL)
    return Rate(found / len(positive), low, high, found, int((negative > threshold).sum()))


def _roc(positive: np.ndarray, negative: np.ndarray) -> list[list[float]]:
    """Points of the curve, one for each threshold, thinned out evenly in the logarithm of the rate."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    above = [np.searchsorted(np.sort(side), thresholds, side="left") for side in (negative, positive)]
    rates = [1 - counts / len(side) for counts, side in zip(above, (negative, positive), strict=True)]
    points = np.vstack([[0.0, 0.0], np.stack(rates, axis=1)])
    if len(points) > ROC_POINTS:
        half = ROC_POINTS // 2
        small = np.geomspace(1 / len(negative), 1, half)
        wanted = np.concatenate([np.searchsorted(points[:, 0], small, side="right") - 1,
                                 np.linspace(0, len(points) - 1, ROC_POINTS - half).round().astype(int)])  # fmt: skip
        points = points[np.unique(wanted)]
    return [[float(x), float(y)] for x, y in points]


def _delong(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """The area under the ROC curve and DeLong's variance of it, by ranks (Sun and Xu 2014)."""
    from scipy.stats import rankdata

    n, m = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    of_positive = (ranks[:n] - rankdata(positive)) / m
    of_negative = 1 - (ranks[n:] - rankdata(negative)) / n
    return float(of_positive.mean()), float(of_positive.var(ddof=1) / n + of_negative.var(ddof=1) / m)


def _area_interval(area: float, variance: float, pairs: int) -> tuple[float, float]:
    if variance <= 0 or not 0 < area < 1:
        return clopper_pearson(round(area * pairs), pairs, LEVEL)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    logit, width = math.log(area / (1 - area)), z * math.sqrt(variance) / (area * (1 - area))
    return 1 / (1 + math.exp(width - logit)), 1 / (1 + math.exp(-width - logit))
