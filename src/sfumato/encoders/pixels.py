"""The images themselves as features: the plainest space, and a good one for finding copies."""

from __future__ import annotations

import numpy as np

from sfumato.data.records import fingerprint
from sfumato.encoders.encoder import CODE, check_images, marked_like


class Pixels:
    """Row-major pixels, scaled to [-1, 1]: float32 [B, H * W * C]; an `Encoder`.

    The dimension depends on the images, so a distance is comparable at one size and number of channels only.
    """

    name, distance = "pixels", "FD-pixels"
    dimension: int | None = None
    identity = fingerprint([CODE, "pixels", "x / 127.5 - 1"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, H * W * C] from uint8 [B, H, W, 1 or 3]."""
        check_images(images)
        flat = np.asarray(images).reshape(len(images), -1)
        return marked_like(images, flat.astype(np.float32) / np.float32(127.5) - np.float32(1))
