"""AMS and UMS: the share of generated images that match training images, and of distinct images they match.

Both count best matches at or above a similarity. SIDE (arXiv 2410.02467) scores exclusive bands of similarity;
the cumulative scores from a calibrated threshold on are primary here, the bands are for comparison with it.
UMS counts duplicate groups of training images, not files: copying one picture that lies in the set five
times is one unique match. UMS is not linear in the number of generated images (see `saturation`).

No guarantee: scores are computed from private images, for their owner's eyes only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfumato.errors import InputError

Bands = Sequence[tuple[float, float]]


def ams(similarity: np.ndarray, tau: float) -> float:
    """Average matching score: share of generated images whose best match is at least `tau`, in [0, 1].

    similarity [N]: to the best training match; higher is closer. InputError for N = 0.
    """
    _check(similarity)
    return float((similarity >= tau).mean())


def ums(index: np.ndarray, similarity: np.ndarray, groups: np.ndarray, tau: float) -> float:
    """Unique matching score: number of distinct training groups matched at `tau` or above, divided by N.

    index int [N]: the best training match of each generated image; similarity [N]: to it; groups int
    [training images]: their duplicate groups. InputError for N = 0, or an index outside `groups`.
    """
    _check(similarity, index, groups)
    return len(np.unique(groups[index[similarity >= tau]])) / len(similarity)


def banded(
    similarity: np.ndarray, index: np.ndarray, groups: np.ndarray, bands: Bands
) -> list[dict[str, float]]:
    """AMS and UMS of best matches with low <= similarity < high, for each (low, high) of `bands`.

    Bands that do not overlap are exclusive: an image counts in one at most. The sum of their UMS may exceed
    the cumulative UMS, as one training image can be matched in several. Returns low, high, ams, ums.
    InputError as `ums`, and unless low < high.
    """
    _check(similarity, index, groups)
    rows = []
    for low, high in bands:
        if not low < high:
            raise InputError(
                f"a band of similarity from {low:g} to {high:g} is empty; give the lower end first"
            )
        inside = (similarity >= low) & (similarity < high)
        unique = len(np.unique(groups[index[inside]]))
        rows.append(
            {
                "low": float(low),
                "high": float(high),
                "ams": float(inside.mean()),
                "ums": unique / len(similarity),
            }
        )
    return rows


def saturation(
    similarity: np.ndarray, index: np.ndarray, groups: np.ndarray, tau: float, points: int = 10
) -> list[dict[str, float | int]]:
    """AMS and UMS of the first n generated images, at `points` evenly spaced n up to N (fewer if N is less).

    The images must be in the order they were drawn in. While UMS x n still climbs, more images would find
    more of the training set; where it is level, they would not. Returns num_images, ams, ums. InputError as `ums`.
    """
    _check(similarity, index, groups)
    if points < 1:
        raise InputError(f"a curve of {points} points shows nothing; give at least one")
    total = len(similarity)
    sizes = sorted({-(-total * step // points) for step in range(1, points + 1)})
    return [
        {
            "num_images": size,
            "ams": ams(similarity[:size], tau),
            "ums": ums(index[:size], similarity[:size], groups, tau),
        }
        for size in sizes
    ]


def _check(similarity: np.ndarray, index: np.ndarray | None = None, groups: np.ndarray | None = None) -> None:
    if len(similarity) == 0:
        raise InputError("there is no generated image to score; nothing was audited. Generate at least one")
    if np.isnan(similarity).any():
        raise InputError("a generated image has a similarity that is not a number; nothing was audited")
    if index is None or groups is None:
        return
    if len(index) != len(similarity):
        raise InputError(
            f"{len(similarity)} similarities and {len(index)} matches belong to different images; nothing was audited"
        )
    if index.min() < 0 or index.max() >= len(groups):
        raise InputError(
            f"a match points outside the {len(groups)} training images that have groups; nothing was audited"
        )
