"""Extractors by hand and against ImageHash and onnxruntime; variants of a query; blank images; bad files."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import imagehash
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor, nn

from sfumato.audit.matching import pair_similarity
from sfumato.audit.similarity import (
    FLIPS,
    FLIPS_AND_SHIFTS,
    NOT_INFORMATIVE,
    TILES,
    FeatureExtractor,
    Variant,
    informative,
    open_extractor,
)
from sfumato.data.digits import load_digits
from sfumato.data.images import OwnerArray
from sfumato.errors import InputError


def noise(count: int, height: int = 16, width: int = 12, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def network(
    path: Path, *, shape: tuple = ("B", 3, 4, 6), nodes=None, output: tuple = ("B", 3), weights=()
) -> Path:
    """An ONNX file; by default the mean of each channel."""
    nodes = nodes or [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)], list(weights),
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))
    return path


# Fixed metrics


def test_pixels_are_the_root_mean_square_difference():
    x, y = noise(5, seed=1), noise(5, seed=2)
    extractor = open_extractor("pixels")
    expected = -np.sqrt(((x / 255.0 - y / 255.0) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(
        pair_similarity(extractor(x), extractor(y), extractor.metric), expected, rtol=1e-5
    )
    black, white = np.zeros((1, 4, 4, 1), np.uint8), np.full((1, 4, 4, 1), 255, np.uint8)
    assert pair_similarity(extractor(black), extractor(white), "euclidean") == pytest.approx(-1)
    assert (extractor.metric, extractor.variants) == ("euclidean", FLIPS_AND_SHIFTS)
    assert "lower is closer" in extractor.direction


@pytest.mark.parametrize(
    ("side", "tiles"), [(32, 4), (28, 4), (16, 4), (18, 4), (14, 3), (8, 2), (7, 1), (3, 1)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_are_the_worst_root_mean_square_difference(side: int, tiles: int, channels: int):
    x, y = noise(6, side, side, channels, 1), noise(6, side, side, channels, 2)
    extractor = open_extractor("tiles")
    apart = (x.astype(float) - y) / 255
    edges = [part[[0, -1]] + [0, 1] for part in np.array_split(np.arange(side), tiles)]
    expected = [np.sqrt((apart[:, a:b, c:d] ** 2).mean(axis=(1, 2, 3))) for a, b in edges for c, d in edges]
    assert len(expected) == tiles**2 and extractor(x).shape[1] % TILES == 0
    found = pair_similarity(extractor(x), extractor(y), extractor.metric)
    np.testing.assert_allclose(found, -np.max(expected, axis=0), rtol=1e-5)


def test_a_small_difference_on_a_large_background_is_large_in_its_tile():
    plain = np.zeros((1, 32, 32, 1), np.uint8)
    dot = plain.copy()
    dot[0, :8, 8:16] = 255
    pixels, tiles = open_extractor("pixels"), open_extractor("tiles")
    assert pair_similarity(pixels(plain), pixels(dot), "euclidean") == pytest.approx(-0.25)
    assert pair_similarity(tiles(plain), tiles(dot), "tiles") == pytest.approx(-1)


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (32, 3), (14, 1), (75, 3)])
def test_phash_is_that_of_imagehash(size: int, channels: int):
    small = noise(40, 5, 5, channels, seed=size)
    images = [
        np.asarray(Image.fromarray(x.squeeze()).resize((size, size), Image.Resampling.BICUBIC)) for x in small
    ]
    images[:3] = [np.full_like(images[0], level) for level in (0, 128, 255)]
    expected = np.stack([imagehash.phash(Image.fromarray(image)).hash.ravel() for image in images])
    extractor = open_extractor("phash")
    found = extractor(np.stack(images).reshape(40, size, size, channels))
    assert found.shape == (40, 64) and np.array_equal(found == 1, expected)
    bits = [
        int(a - b)
        for a, b in zip(
            map(imagehash.ImageHash, expected), map(imagehash.ImageHash, expected[::-1]), strict=True
        )
    ]
    assert np.array_equal(
        pair_similarity(found, found[::-1], extractor.metric), -np.array(bits) / np.float32(64)
    )
    assert max(bits) > 20 and extractor.variants == FLIPS


# Variants


def test_shifts_repeat_the_edge_and_flips_come_first():
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1)
    assert Variant(right=1)(image)[0, :, :, 0].tolist() == [[0, 0, 1], [3, 3, 4]]
    assert Variant(right=-1)(image)[0, :, :, 0].tolist() == [[1, 2, 2], [4, 5, 5]]
    assert Variant(down=1)(image)[0, :, :, 0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert Variant(down=-1)(image)[0, :, :, 0].tolist() == [[3, 4, 5], [3, 4, 5]]
    assert Variant(flip=True, right=1)(image)[0, :, :, 0].tolist() == [[2, 2, 1], [5, 5, 4]]
    assert np.array_equal(Variant()(image), image)


def test_all_shifts_and_flips_are_there_once():
    results = {variant(noise(1)).tobytes() for variant in FLIPS_AND_SHIFTS}
    assert len(FLIPS_AND_SHIFTS) == len(results) == 18 and FLIPS_AND_SHIFTS[0] == FLIPS[0] == Variant()
    assert noise(1)[:, :, ::-1].tobytes() in results


# Encoders


def test_efficientnet_by_cosine():
    extractor = open_extractor("efficientnet-lite0")
    features = extractor(noise(3).view(OwnerArray))
    assert isinstance(features, OwnerArray) and features.shape == (3, 1280)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert (extractor.name, extractor.metric, extractor.variants) == ("efficientnet-lite0", "cosine", FLIPS)


def test_torchscript_by_path(tmp_path: Path):
    class Means(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Means()).save(str(tmp_path / "sscd.pt"))
    extractor = open_extractor(str(tmp_path / "sscd.pt"))
    assert (extractor.name, extractor.metric) == ("sscd", "cosine")
    mean = (0.2 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(
        extractor(np.full((1, 5, 7, 1), 51, np.uint8))[0], mean / np.linalg.norm(mean), rtol=1e-4
    )
    with pytest.raises(InputError, match="cannot go by the name 'copy'"):
        open_extractor(f"copy={tmp_path / 'sscd.pt'}")


def test_onnx_gets_imagenet_floats_of_its_own_size(tmp_path: Path):
    corner = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["sides"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["sides", "two", "four"], ["size"]),
        helper.make_node("Unsqueeze", ["size", "zero"], ["row"]),
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Mul", ["means", "naught"], ["nothing"]),
        helper.make_node("ReduceSum", ["nothing", "one"], ["column"], keepdims=1),
        helper.make_node("Add", ["column", "row"], ["sizes"]),
        helper.make_node("Concat", ["means", "sizes"], ["y"], axis=1),
    ]
    numbers = {"two": 2, "four": 4, "zero": 0, "one": 1}
    weights = [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in numbers.items()]
    weights.append(helper.make_tensor("naught", TensorProto.FLOAT, [1], [0.0]))
    mean = (0.2 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    for shape, size in ((("B", 3, 4, 6), (4, 6)), (("B", 3, "H", "W"), (224, 224)), ((1, 3, 4, 6), (4, 6))):
        path = network(tmp_path / "net.onnx", shape=shape, nodes=corner, weights=weights, output=("N", 5))
        extractor = open_extractor(f"mine={path}")
        expected = np.array([*mean, *size])
        grey = np.full((3, 5, 7, 1), 51, np.uint8)
        found = extractor(grey)
        np.testing.assert_allclose(found, np.tile(expected / np.linalg.norm(expected), (3, 1)), rtol=1e-4)
        assert (extractor.name, extractor.metric, extractor.variants) == ("mine", "cosine", FLIPS)
        assert f"{size[0]} by {size[1]}" in extractor.preprocessing and "ImageNet" in extractor.preprocessing


def test_onnx_tokens_give_the_first_one(tmp_path: Path):
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["y"], perm=[0, 2, 1]),
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], [0, 3, -1])
    path = network(
        tmp_path / "vit.onnx", shape=("B", 3, 2, 2), nodes=nodes, weights=[shape], output=("B", 4, 3)
    )
    images = noise(2, 2, 2)
    found = open_extractor(str(path))(images)
    first = (images[:, 0, 0] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(found, first / np.linalg.norm(first, axis=1, keepdims=True), rtol=1e-4)


def test_identities_follow_what_features_depend_on(tmp_path: Path):
    def scaled(weight: float) -> str:
        nodes = [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
            helper.make_node("Mul", ["m", "w"], ["y"]),
        ]
        tensor = helper.make_tensor("w", TensorProto.FLOAT, [3], [weight, 1.0, 1.0])
        return open_extractor(str(network(tmp_path / "net.onnx", nodes=nodes, weights=[tensor]))).identity

    one = scaled(1.0)
    assert one == scaled(1.0) != scaled(2.0)
    (tmp_path / "net.onnx.data").write_bytes(b"weights beside it")
    assert scaled(1.0) != one
    names = ("pixels", "tiles", "phash", "efficientnet-lite0")
    identities = {open_extractor(name).identity for name in names}
    assert len(identities) == 4 and all(len(bytes.fromhex(identity)) == 32 for identity in identities)
    assert open_extractor("pixels").identity == open_extractor("pixels").identity


def test_bad_onnx_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(path: Path, match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            open_extractor(str(path))
        assert "\n" not in str(caught.value) and "nothing was audited" in str(caught.value)

    refuses(tmp_path / "none.onnx", "does not exist")
    (tmp_path / "text.onnx").write_text("no model")
    refuses(tmp_path / "text.onnx", "no ONNX model|not an ONNX model")
    one = network(tmp_path / "grey.onnx", shape=("B", 1, 4, 4), output=("B", 1))
    refuses(one, r"one float input \[B, 3, H, W\]")
    refuses(network(tmp_path / "many.onnx", shape=(8, 3, 4, 4), output=(8, 3)), r"takes \[8, 3, 4, 4\]")
    whole = [helper.make_node("Identity", ["x"], ["y"])]
    picture = network(tmp_path / "picture.onnx", nodes=whole, output=("B", 3, 4, 6))
    refuses(picture, "has no output")
    mixing = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["m"], ["a"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["m", "a"], ["y"]),
    ]
    refuses(network(tmp_path / "mixing.onnx", nodes=mixing), "when another image is beside it")
    network(tmp_path / "two words.onnx")
    refuses(tmp_path / "two words.onnx", "cannot go by the name")
    with pytest.raises(InputError, match="cannot go by the name 'pixels'"):
        open_extractor(f"pixels={network(tmp_path / 'net.onnx')}")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refuses(network(tmp_path / "net.onnx"), r"pip install 'sfumato\[onnx\]'")


def test_unknown_names_and_numbers_that_are_not_finite():
    with pytest.raises(InputError, match="no such file or folder"):
        open_extractor("sscd")
    broken = FeatureExtractor("broken", "", "", "cosine", FLIPS, lambda x: np.full((len(x), 2), np.nan))
    with pytest.raises(
        InputError, match="'broken' gives a number that is not finite for image 1; nothing was"
    ):
        broken(noise(2))


def test_an_image_without_features_is_like_nothing():
    zeros = FeatureExtractor("zeros", "", "", "cosine", FLIPS, lambda x: np.zeros((len(x), 2)))
    assert not zeros(noise(2)).any()


# Blank images


def test_what_is_blank_shows_nothing_and_what_is_drawn_does():
    rng = np.random.default_rng(0)
    flat = np.full((1, 16, 16, 3), 131)
    ramp = np.broadcast_to(np.arange(16)[:, None, None] / 2 + 100, (16, 16, 3))
    blank = [flat[0] * 0, flat[0], flat[0] * 0 + 255, ramp, flat[0] + rng.normal(0, 2, (16, 16, 3))]
    shown = informative(np.stack(blank).astype(np.uint8))
    assert shown.dtype == bool and not shown.any()
    dot = np.zeros((1, 16, 16, 1), np.uint8)
    dot[0, 5:7, 5:7] = 255
    assert informative(dot).all() and informative(noise(50)).all()
    digits = load_digits(holdout=True)[0].reshape(-1, 28, 28, 1)
    assert informative(digits).all()
    assert len(informative(digits[:0])) == 0 and NOT_INFORMATIVE == 0.1
