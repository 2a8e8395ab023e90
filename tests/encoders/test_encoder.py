from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data.images import OwnerArray
from sfumato.data.release import refuse_private
from sfumato.encoders.encoder import NetworkEncoder, NotFinite, Preprocessing, marked_like, open_encoder
from sfumato.errors import InputError

PLAIN = Preprocessing((8, 8), "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def noise(count: int, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def encoder(forward=lambda x: x.mean((2, 3)), prepare=PLAIN, weights: str = "w") -> NetworkEncoder:
    return NetworkEncoder("mine", forward, prepare, weights=weights)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("inception", "no such file"),
        ("clip=nowhere/model.pt", "no such file"),
        ("pixels=x.pt", "cannot go by the name 'pixels'"),
        ("EfficientNet-Lite0=x.pt", "cannot go by the name"),
        ("../evil=x.pt", "cannot go by the name"),
        ("mine=", "cannot go by the name"),
        ("=x.pt", "cannot go by the name"),
        ("", "cannot go by the name"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_what_is_no_encoder_is_said_in_one_line(spec: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        open_encoder(spec)
    assert "\n" not in str(caught.value) and "no budget was spent" in str(caught.value)


def test_a_path_cannot_pass_for_a_built_in_encoder(tmp_path: Path) -> None:
    (tmp_path / "pixels.pt").write_bytes(b"")
    with pytest.raises(InputError, match="give NAME=PATH"):
        open_encoder(str(tmp_path / "pixels.pt"))


@pytest.mark.parametrize(("mode", "filter"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
@pytest.mark.parametrize("size", [(11, 17), (40, 24)])
def test_resizing_is_pillows(mode: str, filter: int, size: tuple[int, int]) -> None:
    ramp = np.add.outer(np.arange(20) * 5, np.arange(23) * 7)[:, :, None] + np.array([0, 3, 6])
    image = np.where(np.arange(23)[None, :, None] % 7 < 3, ramp % 256, 255 - ramp % 256).astype(np.uint8)
    ours = Preprocessing(size, mode, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(
        torch.tensor(image).permute(2, 0, 1)[None]
    )
    theirs = np.asarray(Image.fromarray(image).resize(size[::-1], filter), np.float32)
    assert np.abs(ours[0].permute(1, 2, 0).numpy() - theirs).max() < 2  # Pillow rounds after each direction
    assert ours.min() >= 0 and ours.max() <= 255


def test_normalisation_is_per_channel() -> None:
    prepare = Preprocessing((8, 8), "bilinear", (10.0, 20.0, 30.0), (1.0, 2.0, 4.0))
    x = torch.full((1, 3, 8, 8), 50, dtype=torch.uint8)
    assert prepare(x)[0, :, 0, 0].tolist() == [40.0, 15.0, 5.0]


def test_grey_is_repeated_and_sizes_may_differ() -> None:
    grey = noise(3, size=20, channels=1)
    features = encoder()(grey)
    assert features.dtype == np.float32 and features.shape == (3, 3)
    np.testing.assert_array_equal(features, encoder()(np.repeat(grey, 3, axis=3)))


def test_blocks_do_not_show() -> None:
    images = noise(35)
    together = encoder()(images)
    np.testing.assert_allclose(together, images.astype(np.float32).mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(together, np.concatenate([encoder()(images[i : i + 1]) for i in range(35)]))


def test_memory_maps_and_views_are_fine(tmp_path: Path) -> None:
    images = noise(4)
    images.tofile(tmp_path / "x.u8")
    mapped = np.memmap(tmp_path / "x.u8", np.uint8, "r", shape=images.shape)
    np.testing.assert_array_equal(encoder()(mapped), encoder()(images))
    np.testing.assert_array_equal(encoder()(images[:, ::-1]), encoder()(images[:, ::-1].copy()))


def test_features_of_private_images_stay_private() -> None:
    features = encoder()(noise(3).view(OwnerArray))
    assert isinstance(features, OwnerArray)
    for made in (features, features[1:], features * 2, {"x": [features]}):
        with pytest.raises(InputError, match="nothing was released"):
            refuse_private(made, "features")
    refuse_private(encoder()(noise(3)), "features")
    assert not isinstance(marked_like(noise(1), np.zeros(2)), OwnerArray)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_names_the_image(bad: float) -> None:
    images = noise(30)
    images[20] = 255
    broken = encoder(lambda x: torch.where(x.mean((2, 3)) > 254, bad, x.mean((2, 3))))
    with pytest.raises(NotFinite, match=r"encoder 'mine'.*image 21;") as caught:
        broken(images)
    assert caught.value.row == 20


@pytest.mark.parametrize(
    "forward",
    [lambda x: x, lambda x: x.mean((1, 2, 3)), lambda x: x.mean((2, 3))[:1], lambda x: {"features": x}],
)
def test_an_answer_of_another_shape_is_refused(forward) -> None:
    with pytest.raises(InputError, match="not one vector each"):
        encoder(forward)(noise(2))


@pytest.mark.parametrize(
    "images",
    [noise(2).astype(np.float32), noise(2)[0], noise(2, channels=2), noise(2)[:0]],
)
def test_what_is_no_stack_of_images_is_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encoder()(images)


def test_identity_is_of_weights_and_preprocessing() -> None:
    base = encoder().identity
    assert len(base) == 64 and int(base, 16) >= 0
    assert encoder().identity == base
    assert encoder(weights="v").identity != base
    other = Preprocessing((9, 8), "bilinear", PLAIN.mean, PLAIN.std)
    assert encoder(prepare=other).identity != base
    assert NetworkEncoder("renamed", encoder()._forward, PLAIN, weights="w").identity == base


def test_no_distance_is_called_fid_by_default() -> None:
    assert encoder().distance == "FD-mine"
    assert open_encoder("pixels").distance == "FD-pixels"
