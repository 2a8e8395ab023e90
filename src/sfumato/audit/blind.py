"""The blind baseline: can training and held-out images be told apart without the model?

Where they can, the two sets differ by themselves, and no attack on them says anything about the model. Computed from
private images without a guarantee: for their owner only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from sfumato.diffusion.generator import to_float
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import pixel_digests
from sfumato.progress import Progress

LEVEL = 0.95
FOLDS = 5
MOST_IMAGES = 5_000  # of a side that are looked at
PENALTY = 0.1  # of the linear discriminant, for each image, on standardised features
PERMUTATIONS = 199


@dataclass(frozen=True)
class Blind:
    """The blind baseline: area under the ROC curve, its 95 % interval, and images of a side that were used."""

    auc: float
    ci: tuple[float, float]
    images: int


def blind_baseline(
    train: np.ndarray, holdout: np.ndarray, seed: int = 0, *, groups: np.ndarray | None = None
) -> Blind:
    """How well training and held-out images are told apart without the model; about 1/2 where the split is fair.

    train, holdout: uint8 [N, H, W, C] and [M, H, W, C]. groups: int64 [N], the duplicate group of each training
    image, of which one image is used; by default equal pixels are a group. (Copies in two folds would be
    recognised, and pass for a difference between the sets.)

    A linear discriminant (ridge) on thumbnails, brightness, contrast, gradients and spectrum, five-fold
    cross-validated on equal numbers of both. The value is the mean of the folds' areas: scores of different folds
    come from different fits and are never compared. Fits of different folds share images, so no formula for
    independent scores holds; the interval is the value plus and minus the deviation from 1/2 that 95 % of 199
    permutations of the sides within the folds stay below. Where the two sets are exchangeable it covers 1/2 in 95 %
    of cases exactly, whatever the features and their dependence; elsewhere it is approximate.

    Raises:
        InputError: fewer than 50 images of either, or of different shapes.
    """
    if train.shape[1:] != holdout.shape[1:]:
        raise InputError(
            f"--train has images {train.shape[1:]}, --holdout {holdout.shape[1:]}; nothing was audited. Use --size"
        )
    order = np.random.default_rng(seed)
    held_groups = pixel_digests(np.asarray(holdout), "blind baseline: holdout")
    own_groups = pixel_digests(np.asarray(train), "blind baseline: train") if groups is None else groups
    rows = [_one_of_each(each, order) for each in (own_groups, held_groups)]
    count = min(len(rows[0]), len(rows[1]), MOST_IMAGES)
    if count < 10 * FOLDS:
        raise InputError(
            f"{count} different images of a side are too few for the blind baseline, which needs {10 * FOLDS}; nothing "
            "was audited. Give a larger --holdout"
        )
    features = np.concatenate(
        [_features(side[np.sort(r[:count])]) for side, r in zip((train, holdout), rows, strict=True)]
    )
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-9)
    folds = np.concatenate([order.permutation(np.arange(count) % FOLDS) for _ in range(2)])
    sides = np.repeat([1.0, -1.0], count)[:, None].repeat(PERMUTATIONS + 1, axis=1)  # the first as they are
    areas = np.zeros(PERMUTATIONS + 1)
    for fold in range(FOLDS):
        sides[folds == fold, 1:] = order.permuted(sides[folds == fold, 1:], axis=0)
    with Progress("blind baseline", total=FOLDS, unit="folds") as progress:
        for fold in range(FOLDS):
            x, tested = features[folds != fold], folds == fold
            gram = x.T @ x + PENALTY * len(x) * np.eye(x.shape[1])
            scores = features[tested] @ np.linalg.solve(gram, x.T @ sides[folds != fold])
            areas += _areas(scores, sides[tested] > 0) / FOLDS
            progress.advance()
    area, width = float(areas[0]), float(np.quantile(np.abs(areas - 0.5), LEVEL, method="higher"))
    return Blind(area, (max(0.0, area - width), min(1.0, area + width)), count)


def _areas(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of each column: float64 [P] of scores and bool [N, P]."""
    from scipy.stats import rankdata

    count = positive.sum(0)
    wins = (rankdata(scores, axis=0) * positive).sum(0) - count * (count + 1) / 2
    return wins / (count * (len(scores) - count))


def _one_of_each(groups: np.ndarray, order: np.random.Generator) -> np.ndarray:
    """One row of each group, in random order."""
    shuffled = order.permutation(len(groups))
    return order.permutation(shuffled[np.unique(groups[shuffled], return_index=True)[1]])


def _features(images: np.ndarray) -> np.ndarray:
    """What a simple look tells of images uint8 [N, H, W, C]: float64 [N, D]."""
    parts = []
    for start in range(0, len(images), 512):
        x = to_float(np.asarray(images[start : start + 512])).add(1).div(2)
        grey = x.mean(1)
        size = min(8, x.shape[2]), min(8, x.shape[3])
        found = [F.adaptive_avg_pool2d(x, size).flatten(1), x.mean((2, 3)), x.std((2, 3))]
        found.append(torch.quantile(grey.flatten(1), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=1).T)
        bins = (grey * 16).long().clamp(0, 15).flatten(1)
        found.append(F.one_hot(bins, 16).float().mean(1))
        for step in (torch.diff(grey, dim=1), torch.diff(grey, dim=2)):
            found.append(torch.stack([step.abs().mean((1, 2)), step.square().mean((1, 2)).sqrt()], 1))
        power = torch.fft.rfft2(grey - grey.mean((1, 2), keepdim=True)).abs().square()
        radius = torch.hypot(*torch.meshgrid(
            torch.fft.fftfreq(grey.shape[1]).abs(), torch.fft.rfftfreq(grey.shape[2]), indexing="ij"
        ))  # fmt: skip
        ring = (radius * 16).long().clamp(0, 7)
        found += [
            (power[:, ring == r].mean(1, keepdim=True) + 1e-6).log() for r in range(8) if (ring == r).any()
        ]
        parts.append(torch.cat(found, 1).double().numpy())
    return np.concatenate(parts)
