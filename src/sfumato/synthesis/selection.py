"""Which public classes stand for which sensitive label: post-processing of the noisy semantic histogram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfumato.errors import InputError


@dataclass(frozen=True)
class Selection:
    """`classes[l]`: public class indices chosen for label l, most voted first; `shares[l]`: how much each
    counts.

    Computed from a released histogram, hence public.
    """

    classes: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]

    def relabel(self, public_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the public set to train on, their sensitive labels, and the weight to draw each row with.

        A class's share is spread over its images, and every label weighs the same.
        """
        rows, labels, weights = [], [], []
        for label, (classes, shares) in enumerate(zip(self.classes, self.shares, strict=True)):
            for chosen, share in zip(classes, shares, strict=True):
                found = np.flatnonzero(public_labels == chosen)
                rows.append(found)
                labels.append(np.full(len(found), label, np.int64))
                weights.append(np.full(len(found), share / max(1, len(found))))
        return np.concatenate(rows), np.concatenate(labels), np.concatenate(weights)


def select_classes(noisy_histogram: np.ndarray, per_label: int, *, noise_scale: float = 0.0) -> Selection:
    """Give each label (row of [L, M]) `per_label` public classes (columns), each class to one label at most.

    The assignment maximises the total of the chosen noisy counts (`scipy.optimize.linear_sum_assignment` with
    `per_label` copies of each label), so no label chooses first: PrivImage's published code lets label 0 take
    what it likes. Shares are in proportion to the noisy counts; counts below twice `noise_scale` (the
    standard deviation of a cell) are drowned in noise and weigh as if they were that small.
    """
    from scipy.optimize import linear_sum_assignment

    labels, classes = noisy_histogram.shape
    if labels * per_label > classes:
        raise InputError(
            f"{labels} labels cannot have {per_label} public classes each: the public set has {classes}; "
            "no further budget was spent; use a public set with more classes"
        )
    _, columns = linear_sum_assignment(np.repeat(noisy_histogram, per_label, axis=0), maximize=True)
    chosen, shares = [], []
    for label in range(labels):
        mine = columns[label * per_label : (label + 1) * per_label]
        mine = mine[np.argsort(-noisy_histogram[label, mine], kind="stable")]
        votes = np.maximum(noisy_histogram[label, mine].astype(float), max(1.0, 2 * noise_scale))
        chosen.append(tuple(int(c) for c in mine))
        shares.append(tuple(float(v) for v in votes / votes.sum()))
    return Selection(tuple(chosen), tuple(shares))


def random_classes(labels: int, classes: int, per_label: int, seed: int) -> Selection:
    """`per_label` public classes for each label, drawn blindly: what a query has to be better than. Free."""
    if labels * per_label > classes:
        raise InputError(
            f"{labels} labels cannot have {per_label} public classes each: the public set has {classes}; "
            "no budget was spent; use a public set with more classes"
        )
    drawn = np.random.default_rng(seed).permutation(classes)[: labels * per_label].reshape(labels, per_label)
    shares = (1.0 / per_label,) * per_label
    return Selection(tuple(tuple(int(c) for c in row) for row in drawn), (shares,) * labels)
