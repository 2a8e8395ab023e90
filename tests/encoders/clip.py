"""A tiny randomly initialised `CLIPModel` folder, with the embedded tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import sfumato

TOKENIZER = Path(sfumato.__file__).parent / "personalization" / "portraits" / "tokenizer"
PREPARED = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.25]}


def tiny_clip(seed: int = 0, dimension: int = 12) -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer: Any = CLIPTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(seed)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=dimension,
        text_config={
            **common, "vocab_size": len(tokenizer), "max_position_embeddings": 20,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**common, "image_size": 16, "patch_size": 8},
    )  # fmt: skip
    return CLIPModel(config).eval()


def save_clip(folder: Path, seed: int = 0, dimension: int = 12) -> Path:
    tiny_clip(seed, dimension).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED), encoding="utf-8")
    return folder
