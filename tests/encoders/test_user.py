from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from sfumato.data.images import OwnerArray
from sfumato.encoders import user
from sfumato.encoders.encoder import open_encoder
from sfumato.errors import InputError

PROCESSOR = {
    "size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": {"height": 12, "width": 12},
    "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 12, "patch_size": 6,
}  # fmt: skip


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Corner(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images[:, :, 0, 0], torch.full((images.shape[0], 1), float(images.shape[2]))], 1)


class InceptionLike(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        means = img.float().mean((2, 3))
        return means if return_features else means.softmax(1)


class NoVectors(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


class NotANumber(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) / 0.0 * 0.0


class Mixing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return means - means.mean(0)


class GreyOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images).mean((2, 3))


def scripted(module: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


def noise(count: int, size: int = 12, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def save(model: transformers.PreTrainedModel, folder: Path, settings: dict | None = None) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR if settings is None else settings))
    return folder


def prepared(images: np.ndarray) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(PROCESSOR["image_mean"]), torch.tensor(PROCESSOR["image_std"])
    return (x - mean[:, None, None]) / std[:, None, None]


def vit(seed: int = 0) -> transformers.ViTModel:
    torch.manual_seed(seed)
    return transformers.ViTModel(transformers.ViTConfig(**TOWER)).eval()


def test_torchscript_gets_imagenet_floats(tmp_path: Path) -> None:
    encoder = open_encoder(scripted(Means(), tmp_path / "my net.v1.pt"))
    assert (encoder.name, encoder.dimension, encoder.distance) == ("my-net.v1", 3, "FD-my-net.v1")
    features = encoder(np.full((1, 5, 7, 1), 51, np.uint8))
    np.testing.assert_allclose(
        features, [[(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]], 1e-4
    )
    assert isinstance(encoder(noise(2).view(OwnerArray)), OwnerArray)


def test_a_file_beside_torchscript_says_how_images_are_prepared(tmp_path: Path) -> None:
    spec = scripted(Corner(), tmp_path / "a.pt")
    plain = open_encoder(f"corner={spec}")
    assert plain(noise(1))[0, 3] == 224
    (tmp_path / "a.pt.json").write_text('{"size": 32, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    told = open_encoder(f"corner={spec}")
    np.testing.assert_allclose(told(np.full((1, 8, 8, 1), 51, np.uint8)), [[0.2, 0.2, 0.2, 32]], rtol=1e-5)
    assert told.name == "corner" and told.identity != plain.identity
    (tmp_path / "a.pt.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.pt\.json' is not JSON"):
        open_encoder(spec)


def test_the_inception_layout_gets_bytes_and_gives_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = scripted(InceptionLike(), tmp_path / "inception.pt")
    encoder = open_encoder(spec)
    images = noise(3, size=20)
    np.testing.assert_allclose(encoder(images), images.astype(np.float32).mean((1, 2)), rtol=1e-5)
    assert encoder.distance == "FD-inception"  # the layout alone does not make it FID
    monkeypatch.setattr(user, "FID_WEIGHTS", user._digest(Path(spec)))
    assert open_encoder(spec).distance == "FID"


def test_identity_is_of_the_content_not_of_the_name(tmp_path: Path) -> None:
    first = Path(scripted(Means(), tmp_path / "a.pt"))
    (tmp_path / "b.ts").write_bytes(first.read_bytes())
    assert open_encoder(str(first)).identity == open_encoder(str(tmp_path / "b.ts")).identity
    other = scripted(Corner(), tmp_path / "c.pt")
    assert open_encoder(other).identity != open_encoder(str(first)).identity


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (NoVectors(), "not one vector each"),
        (NotANumber(), "not finite for image 1"),
        (Mixing(), "other features when another image is beside it"),
        (GreyOnly(), "cannot encode images"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_torchscript_that_is_no_encoder(module: nn.Module, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        open_encoder(scripted(module, tmp_path / "x.pt"))
    assert "\n" not in str(caught.value)


def test_what_is_not_torchscript(tmp_path: Path) -> None:
    torch.save(Means().state_dict(), tmp_path / "weights.pth")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("weights.pth", "noise.pt", "empty.pt"):
        with pytest.raises(
            InputError, match=rf"{name}' is not a TorchScript file .*torch\.jit\.save"
        ) as caught:
            open_encoder(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_vision_transformer(tmp_path: Path) -> None:
    model, images = vit(), noise(3)
    encoder = open_encoder(str(save(model, tmp_path / "vit")))
    with torch.no_grad():
        expected = model(pixel_values=prepared(images)).pooler_output
    np.testing.assert_allclose(encoder(images), expected.numpy(), rtol=1e-3, atol=1e-4)
    assert (encoder.name, encoder.dimension) == ("vit", 16)
    assert isinstance(encoder(images.view(OwnerArray)), OwnerArray)
    again = open_encoder(f"again={tmp_path / 'vit'}")
    assert again.identity == encoder.identity and again.name == "again"
    assert open_encoder(str(save(vit(1), tmp_path / "other"))).identity != encoder.identity
    settings = {**PROCESSOR, "image_mean": [0.5, 0.5, 0.5]}
    assert open_encoder(str(save(model, tmp_path / "third", settings))).identity != encoder.identity


def test_without_a_trained_pooler_the_class_token_is_taken(tmp_path: Path) -> None:
    """Weights that the checkpoint lacks would be drawn anew each time it is loaded."""
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**TOWER), add_pooling_layer=False).eval()
    folder, images = save(model, tmp_path / "vit"), noise(2)
    with torch.no_grad():
        expected = model(pixel_values=prepared(images)).last_hidden_state[:, 0]
    np.testing.assert_allclose(open_encoder(str(folder))(images), expected.numpy(), rtol=1e-3, atol=1e-4)


def test_dinov2_and_half_precision_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {key: value for key, value in TOWER.items() if key != "intermediate_size"}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**config)).half().eval()
    encoder, images = open_encoder(str(save(model, tmp_path / "dino"))), noise(2)
    with torch.no_grad():
        expected = model.float()(pixel_values=prepared(images)).last_hidden_state[:, 0]
    np.testing.assert_allclose(encoder(images), expected.numpy(), rtol=1e-3, atol=1e-3)


def test_clip_gives_its_projected_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {
        key: TOWER[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    text |= {"vocab_size": 20, "max_position_embeddings": 8}
    both = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config={**TOWER, "projection_dim": 7}, projection_dim=7
        )
    ).eval()
    alone = transformers.CLIPVisionModelWithProjection(both.config.vision_config).eval()
    alone.vision_model.load_state_dict(both.vision_model.state_dict())
    alone.visual_projection.load_state_dict(both.visual_projection.state_dict())
    images = noise(2)
    with torch.no_grad():
        expected = alone(pixel_values=prepared(images)).image_embeds.numpy()
    assert expected.shape == (2, 7)
    for name, model in (("clip", both), ("alone", alone)):
        encoder = open_encoder(str(save(model, tmp_path / name)))
        np.testing.assert_allclose(encoder(images), expected, rtol=1e-3, atol=1e-4)


def test_a_convolutional_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 9], depths=[1, 1], layer_type="basic"
    )
    model, images = transformers.ResNetModel(config).eval(), noise(2)
    encoder = open_encoder(str(save(model, tmp_path / "resnet")))
    with torch.no_grad():
        expected = model(pixel_values=prepared(images)).pooler_output[:, :, 0, 0]
    np.testing.assert_allclose(encoder(images), expected.numpy(), rtol=1e-3, atol=1e-4)


def bert() -> transformers.PreTrainedModel:
    small = {
        key: TOWER[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    return transformers.BertModel(transformers.BertConfig(**small, vocab_size=20))


def shortened(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights[
        "encoder.layer.0.output.dense.weight"
        if "encoder.layer.0.output.dense.weight" in weights
        else sorted(weights)[0]
    ]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "pickled weights are not loaded"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (lambda f: (f / "preprocessor_config.json").write_text("[1]"), "is not a JSON object"),
        (
            lambda f: (f / "preprocessor_config.json").write_text('{"size": 12}'),
            "does not say how images are prepared",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be loaded as a transformers model"),
        (shortened, "lacks weights"),
        (lambda f: (f / "config.json").write_text('{"model_type": "of-tomorrow"}'), "cannot be loaded"),
    ],
)
def test_a_folder_that_is_not_whole(spoil, says: str, tmp_path: Path) -> None:
    folder = save(vit(), tmp_path / "vit")
    spoil(folder)
    with pytest.raises(InputError, match=says) as caught:
        open_encoder(str(folder))
    assert "\n" not in str(caught.value) and "no budget was spent" in str(caught.value)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    folder = save(vit(), tmp_path / "vit")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded"):
        open_encoder(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="BertModel, which takes no images"):
        open_encoder(str(save(bert(), tmp_path / "bert")))


def test_without_transformers_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'sfumato\[transformers\]'"):
        open_encoder(str(tmp_path))


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = save(vit(), tmp_path / "somewhere"), []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, "*.bin" in allow_patterns))
        if repository != "owner/tiny-vit":
            raise ConnectionError("no such model\nsecond line")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_encoder("hf:owner/tiny-vit").name == "tiny-vit"
    assert open_encoder("dino=hf:owner/tiny-vit").name == "dino"
    assert asked == [("owner/tiny-vit", False)] * 2
    with pytest.raises(
        InputError, match=r"'hf:owner/other' could not be downloaded .ConnectionError: no such model.;"
    ):
        open_encoder("hf:owner/other")
