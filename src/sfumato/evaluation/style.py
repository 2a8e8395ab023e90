"""Style score: do generated images lie nearer to images of one style than to images of others?

For the owner's eyes where the style is private: it is not differentially private.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfumato.errors import InputError
from sfumato.evaluation.frechet import check_dimensions
from sfumato.evaluation.intervals import clopper_pearson


@dataclass(frozen=True)
class StyleScore:
    """value: share of generated images whose nearest neighbour is of the wanted style, in its 95 % Clopper-Pearson
    interval [low, high]. chance: what images that know nothing of style would get."""

    value: float
    low: float
    high: float
    chance: float


def style_score(
    generated: np.ndarray, same: np.ndarray, others: np.ndarray, other_style: np.ndarray, *, seed: int = 0
) -> StyleScore:
    """Nearest neighbours by cosine among as many images of each style.

    Args:
        generated: Features [N, D].
        same: Features [M, D] of the wanted style, none of which the token was learnt from.
        others: Features [K, D] of other styles; other_style: int [K], which.

    InputError for features that are not finite or differ in D, or an empty set.
    """
    check_dimensions(generated=generated, same=same)
    check_dimensions(generated=generated, others=others)
    styles = np.unique(other_style)
    if not len(generated) or not len(same) or not len(styles) or len(other_style) != len(others):
        raise InputError("the style score needs generated images, images of the style and images of others")
    rng = np.random.default_rng(seed)
    each = min(len(same), *(int((other_style == style).sum()) for style in styles))
    picked = [same[rng.permutation(len(same))[:each]]]
    picked += [others[rng.permutation(np.flatnonzero(other_style == style))[:each]] for style in styles]
    known = np.concatenate([_unit(part) for part in picked])
    found = _unit(generated) @ known.T
    if not np.isfinite(found).all():
        raise InputError("the style score needs features that are finite and not zero")
    hits, total = int((found.argmax(1) < each).sum()), len(generated)
    return StyleScore(hits / total, *clopper_pearson(hits, total), 1 / (1 + len(styles)))


def _unit(features: np.ndarray) -> np.ndarray:
    wide = np.asarray(features, np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)
