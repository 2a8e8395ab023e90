"""Crafted canaries: random blots of full contrast, unlike each other and unlike any image of the data."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from sfumato.errors import InputError
from sfumato.evaluation.neighbours import blocks, squared_distances
from sfumato.progress import Progress

CELLS = 6  # random values a side: what a small network can learn by heart
LEAST_DISTANCE = 0.2  # root mean square, of full scale, between any two of canaries and images; flips count
_COMPARED = 32  # pixels a side that are compared
_AT_ONCE = 1000
_ROUNDS = 20


def draw_patterns(count: int, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`count` patterns of the size and channels of `images` (uint8 [N, H, W, C], N >= 1): uint8 [count, H, W, C].

    Normal values on a grid of 6 x 6, interpolated to the image's size and driven into saturation. One that comes
    nearer than LEAST_DISTANCE to an image or to an earlier pattern, itself or mirrored, is drawn again.

    InputError when the images are too small for so many that differ.
    """
    height, width, channels = images.shape[1:]
    grid = min(CELLS, height), min(CELLS, width)
    kept = np.empty((0, height, width, channels), np.uint8)
    with Progress("drawing patterns", total=count, unit="patterns") as progress:
        for _ in range(_ROUNDS):
            wanted = count - len(kept)
            coarse = torch.from_numpy(rng.standard_normal((wanted + wanted // 4 + 8, channels, *grid)))
            fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
            fine = fine.permute(0, 2, 3, 1).numpy()
            fine = fine - fine.mean((1, 2, 3), keepdims=True)
            drawn = np.round(127.5 + 127.5 * np.tanh(3 * fine)).astype(np.uint8)
            kept = _apart(kept, drawn[_far_from(images, drawn)])[:count]
            progress.advance(len(kept) - progress.done)
            if len(kept) == count:
                return kept
    raise InputError(
        f"--count {count}: images of {height} x {width} pixels are too small for so many patterns that differ; nothing "
        "was planted. Give a smaller --count, or --kind own"
    )


def _points(images: np.ndarray) -> np.ndarray:
    """Pixels on a grid of at most 32 a side, centred, so that squared distances are mean squares of full scale."""
    step = [-(-side // _COMPARED) for side in images.shape[1:3]]
    some = images[:, :: step[0], :: step[1]]
    flat = some.reshape(len(some), some[0].size if len(some) else 1)
    return (flat - 127.5) / 255 / flat.shape[1] ** 0.5


def _far_from(images: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Which patterns no image comes near, neither as they are nor mirrored: bool [n]."""
    far = np.ones(len(drawn), bool)
    for points in (_points(drawn), _points(drawn[:, :, ::-1])):
        for rows in blocks(len(images), points.shape[1] + len(points)):
            near = squared_distances(_points(np.asarray(images[rows])), points) < LEAST_DISTANCE**2
            far &= ~near.any(0)
    return far


def _apart(kept: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """`kept` and those of `drawn` that stay away from all before them."""
    for start in range(0, len(drawn), _AT_ONCE):
        some = drawn[start : start + _AT_ONCE]
        some = some[_far_from(kept, some)] if len(kept) else some
        points = _points(some)
        gaps = np.minimum(
            squared_distances(points, points), squared_distances(points, _points(some[:, :, ::-1]))
        )
        chosen: list[int] = []
        for row, close in enumerate(gaps < LEAST_DISTANCE**2):
            if not close[chosen].any():
                chosen.append(row)
        kept = np.concatenate([kept, some[chosen]])
    return kept
