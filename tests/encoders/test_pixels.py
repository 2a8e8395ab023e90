from __future__ import annotations

import numpy as np
import pytest

from sfumato.data.images import OwnerArray
from sfumato.encoders.encoder import open_encoder


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_images(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels), dtype=np.uint8)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 0, 255
    pixels = open_encoder("pixels")
    features = pixels(images)
    assert features.dtype == np.float32 and features.shape == (5, 24 * channels) and pixels.dimension is None
    assert features[0, 0] == -1 and features[1, 0] == 1
    back = np.round((features.astype(np.float64) + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(back.reshape(images.shape), images)


def test_private_pixels_stay_private() -> None:
    assert isinstance(open_encoder("pixels")(np.zeros((2, 3, 3, 1), np.uint8).view(OwnerArray)), OwnerArray)


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        open_encoder("pixels")(np.zeros((2, 3, 3, 1)))
