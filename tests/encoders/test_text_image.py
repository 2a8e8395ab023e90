"""CLIP-like models by path, and the embedded one."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

from sfumato.data.images import OwnerArray
from sfumato.encoders.encoder import NotFinite
from sfumato.encoders.text_image import open_text_image_encoder
from sfumato.errors import InputError
from tests.encoders.clip import PREPARED, save_clip

TEXTS = ["a portrait with glasses", "a smiling portrait", ""]


def pictures(count: int, size: int = 16, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


def test_vectors_are_those_of_transformers_brought_to_length_one(folder) -> None:
    from transformers import AutoTokenizer, CLIPModel

    encoder, model = open_text_image_encoder(str(folder)), CLIPModel.from_pretrained(folder).eval()
    assert (encoder.name, encoder.dimension, encoder.size) == ("tiny", 12, (16, 16))
    images = pictures(5)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(PREPARED[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = tokenizer(TEXTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=(x - mean) / std)
        said = model.get_text_features(**{name: told[name] for name in ("input_ids", "attention_mask")})
    for found, expected in ((encoder.images(images), seen), (encoder.texts(TEXTS), said)):
        wanted = (expected if isinstance(expected, torch.Tensor) else expected.pooler_output).numpy()
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_vector_is_the_same_to_the_last_bit_whatever_is_beside_it(folder) -> None:
    encoder = open_text_image_encoder(str(folder))
    images, texts = pictures(37), [f"portrait {i}" for i in range(37)]
    together, said = encoder.images(images), encoder.texts(texts)
    for row in (0, 15, 16, 36):
        assert np.array_equal(encoder.images(images[row : row + 1])[0], together[row])
        assert np.array_equal(encoder.texts(texts[row : row + 1])[0], said[row])
    assert np.array_equal(encoder.images(images[5:]), together[5:])


def test_grey_and_other_sizes_are_taken_and_the_owners_mark_stays(folder) -> None:
    encoder = open_text_image_encoder(str(folder))
    grey = pictures(3, channels=1)
    assert np.array_equal(encoder.images(grey), encoder.images(np.repeat(grey, 3, axis=3)))
    assert encoder.images(pictures(2, size=40)).shape == (2, 12)
    assert isinstance(encoder.images(pictures(2).view(OwnerArray)), OwnerArray)


def test_a_long_text_is_cut_off_at_the_context(folder) -> None:
    encoder = open_text_image_encoder(str(folder))
    long = "glasses " * 60
    assert np.array_equal(encoder.texts([long]), encoder.texts([long + "and a hat"]))


def test_the_identity_is_that_of_weights_tokenizer_and_preprocessing(folder, tmp_path) -> None:
    first = open_text_image_encoder(str(folder)).identity
    assert first == open_text_image_encoder(str(folder)).identity and len(first) == 64
    other = save_clip(tmp_path / "other", seed=1)
    assert open_text_image_encoder(str(other)).identity != first
    same = save_clip(tmp_path / "same")
    assert open_text_image_encoder(str(same)).identity == first
    (same / "preprocessor_config.json").write_text(
        json.dumps({**PREPARED, "image_mean": [0, 0, 0]}), encoding="utf-8"
    )
    assert open_text_image_encoder(str(same)).identity != first


def test_a_vector_that_is_no_number_is_named(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    broken = save_clip(tmp_path / "broken")
    held = load_file(broken / "model.safetensors")
    held["visual_projection.weight"][0, 0] = float("nan")
    save_file(held, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFinite, match="image 1"):
        open_text_image_encoder(str(broken)).images(pictures(2))


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("model.safetensors", "no weights in"),
        ("tokenizer.json", "no tokenizer"),
        ("config.json", "no config.json"),
        ("preprocessor_config.json", "no preprocessor_config.json"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_in_one_line(tmp_path, lacking, said) -> None:
    folder = save_clip(tmp_path / "part")
    (folder / lacking).unlink()
    with pytest.raises(InputError, match=f"{said}.*no budget was spent"):
        open_text_image_encoder(str(folder))


def test_other_models_and_missing_weights_are_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_clip(tmp_path / "part")
    held = load_file(folder / "model.safetensors")
    del held["text_projection.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights \(such as text_projection"):
        open_text_image_encoder(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(InputError, match='type "vit", not clip'):
        open_text_image_encoder(str(folder))
    with pytest.raises(InputError, match="no such folder exists"):
        open_text_image_encoder(str(tmp_path / "nowhere"))


def test_the_embedded_space_puts_words_beside_what_they_name() -> None:
    encoder = open_text_image_encoder()
    assert (encoder.name, encoder.dimension, encoder.size) == ("portraits", 64, (32, 32))
    said = encoder.texts(
        ["a portrait with glasses", "a portrait with glasses and a hat", "a portrait with no hair"]
    )
    assert said[0] @ said[1] > said[0] @ said[2]


def test_the_embedded_space_is_the_one_its_generator_and_public_vectors_were_made_in() -> None:
    encoder, again = open_text_image_encoder(), open_text_image_encoder()
    assert encoder.identity == "91f10b564e679408cae8197857832e0f7b07a43f0944dd477b2a0945112595ff"
    images, texts = (
        pictures(20, size=32),
        [f"a portrait {word}" for word in ("with a hat", "with dark skin", "")],
    )
    for found in (encoder.images(images), encoder.texts(texts)):
        assert found.dtype == np.float32 and found.shape[1] == 64
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.array_equal(encoder.images(images), again.images(images))
    assert np.array_equal(encoder.texts(texts), again.texts(texts))
    assert np.array_equal(encoder.images(images[7:8])[0], encoder.images(images)[7])


def test_a_hub_id_brings_its_tokenizer(folder, monkeypatch) -> None:
    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        if repository != "owner/tiny":
            raise ConnectionError("no such model\nsecond line")
        for file in (
            *folder.iterdir(),
            Path("open_clip_config.json"),
            Path("vocab.json"),
            Path("merges.txt"),
        ):
            assert any(fnmatch(file.name, pattern) for pattern in allow_patterns), file.name
        assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_text_image_encoder("hf:owner/tiny").identity == open_text_image_encoder(str(folder)).identity
    with pytest.raises(InputError, match=r"'hf:owner/other' could not be downloaded .*no such model\);"):
        open_text_image_encoder("hf:owner/other")
