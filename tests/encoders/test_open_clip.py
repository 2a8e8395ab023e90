"""open_clip's weights, taken over, give what open_clip's own architecture gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.encoders.text_image import open_text_image_encoder
from sfumato.errors import InputError
from tests.encoders.clip import TOKENIZER

WIDTH, HEADS, LAYERS, SIZE, PATCH, DIMENSION, CONTEXT = 32, 2, 2, 16, 8, 10, 20


class Block(nn.Module):
    """A residual attention block as the CLIP paper has it, by torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.quick = False
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        z = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](z * torch.sigmoid(1.702 * z) if self.quick else nn.functional.gelu(z))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block() for _ in range(LAYERS)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Tower()
        self.proj = nn.Parameter(torch.randn(WIDTH, DIMENSION))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Reference(nn.Module):
    """The model with open_clip's own parameter names."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.visual, self.transformer = Visual(), Tower()
        self.token_embedding, self.ln_final = nn.Embedding(words, WIDTH), nn.LayerNorm(WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.text_projection = nn.Parameter(torch.randn(WIDTH, DIMENSION))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def text(self, ids: Tensor) -> Tensor:
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


@pytest.fixture
def made(tmp_path) -> tuple[Path, Reference]:
    torch.manual_seed(0)
    words = 60_000  # beyond the end-of-text token, which has to be the largest there is in a text
    reference = Reference(words).eval()
    folder = tmp_path / "ViT-tiny"
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in reference.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    common = {"width": WIDTH, "layers": LAYERS}
    described = {
        "model_cfg": {
            "embed_dim": DIMENSION,
            "vision_cfg": {**common, "image_size": SIZE, "patch_size": PATCH, "head_width": WIDTH // HEADS},
            "text_cfg": {**common, "heads": HEADS, "vocab_size": words, "context_length": CONTEXT},
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.25]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder, reference


def described(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """open_clip_config.json with a change in its model_cfg."""
    content = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    change(content["model_cfg"])
    (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("quick", [False, True])
def test_both_towers_give_what_the_reference_gives(made, quick) -> None:
    folder, reference = made
    described(folder, lambda model: model.update(quick_gelu=quick))
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, Block):
                module.quick = quick
                module.mlp["c_fc"].weight.mul_(4)  # far enough from 0 for the two activations to differ
    save_file(
        {k: v.contiguous() for k, v in reference.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    encoder = open_text_image_encoder(str(folder))
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.3, 0.2, 0.25]).view(1, 3, 1, 1)
    texts = ["a portrait with glasses", "a hat"]
    told = encoder._tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        seen, said = reference.visual(x).numpy(), reference.text(told).numpy()
    for found, wanted in ((encoder.images(images), seen), (encoder.texts(texts), said)):
        np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=2e-5)


def test_what_is_no_vision_transformer_or_lacks_weights_is_refused(made) -> None:
    folder, reference = made
    held = {k: v.contiguous() for k, v in reference.state_dict().items() if k != "visual.proj"}
    save_file(held, folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"lacks weights \(such as visual_projection"):
        open_text_image_encoder(str(folder))
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 4}}), encoding="utf-8"
    )
    with pytest.raises(InputError, match="describes no vision transformer"):
        open_text_image_encoder(str(folder))


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("vision_cfg", "global_average_pool"),
        ("vision_cfg", "timm_model_name"),
        ("text_cfg", "no_causal_mask"),
    ],
)
def test_a_setting_that_would_give_other_vectors_is_refused_not_ignored(made, part, setting) -> None:
    folder, _ = made
    described(folder, lambda model: model[part].update({setting: False}))
    assert open_text_image_encoder(str(folder)).dimension == DIMENSION
    described(folder, lambda model: model[part].update({setting: True}))
    with pytest.raises(InputError, match=f"{part}: {setting}.*no budget was spent"):
        open_text_image_encoder(str(folder))


@pytest.mark.parametrize("extra", ["visual.transformer.resblocks.0.ls_1.gamma", "visual.attn_pool.query"])
def test_weights_that_have_no_place_are_refused_and_masks_are_not(made, extra) -> None:
    folder, reference = made
    held = {k: v.contiguous() for k, v in reference.state_dict().items()}
    save_file({**held, "attn_mask": torch.zeros(CONTEXT, CONTEXT)}, folder / "open_clip_model.safetensors")
    assert open_text_image_encoder(str(folder)).dimension == DIMENSION
    save_file({**held, extra: torch.ones(WIDTH)}, folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=f"such as {extra}"):
        open_text_image_encoder(str(folder))


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("vision_cfg", {"image_size": [16, 16]}),
        ("vision_cfg", {"head_width": 0}),
        ("vision_cfg", {"layers": [3, 4]}),
        ("text_cfg", {"heads": 3}),
    ],
)
def test_a_setting_no_such_transformer_can_have_is_refused_in_one_line(made, part, setting) -> None:
    folder, _ = made
    described(folder, lambda model: model[part].update(setting))
    with pytest.raises(InputError, match=r"describes no vision transformer[^\n]*no budget was spent[^\n]*$"):
        open_text_image_encoder(str(folder))
