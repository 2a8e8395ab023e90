"""Open_clip's vision transformers as transformers' `CLIPModel`: the same weights under other names.

open_clip itself is not needed. Its attention keeps query, key and value in one matrix; here they are taken apart.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfumato.data.records import bad_source
from sfumato.encoders.user import _first_line, _json

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_INSIDE = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_OUTSIDE = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_READ = {
    "vision_cfg": {
        "width", "layers", "head_width", "mlp_ratio", "image_size", "patch_size",
        "patch_dropout", "output_tokens",  # of training, and of what else is returned
    },
    "text_cfg": {
        "width", "layers", "heads", "vocab_size", "context_length",
        "hf_tokenizer_name", "tokenizer_kwargs", "output_tokens",  # the tokenizer's own files are read instead
    },
}  # fmt: skip
_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def from_open_clip(folder: Path) -> tuple[Any, dict[str, Any]]:
    """(a `CLIPModel`, settings as `preprocessor_config.json` has them) from an open_clip folder.

    Raises InputError where it is no vision transformer with a plain text transformer, or weights are missing.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPConfig, CLIPModel

    described = _json(folder / CONFIG)
    try:
        model, prepared = described["model_cfg"], described.get("preprocess_cfg", {})
        vision, text = model["vision_cfg"], model["text_cfg"]
        for part, known in _READ.items():
            if unknown := sorted(key for key, value in model[part].items() if value and key not in known):
                raise ValueError(f"{part}: {', '.join(unknown)}")
        width, heads = int(vision["width"]), int(vision["width"]) // int(vision.get("head_width", 64))
        act = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
        size = int(vision["image_size"])
        config = CLIPConfig(
            projection_dim=int(model["embed_dim"]),
            vision_config={
                "hidden_size": width, "intermediate_size": int(width * vision.get("mlp_ratio", 4)), "hidden_act": act,
                "num_hidden_layers": int(vision["layers"]), "num_attention_heads": heads, "image_size": size,
                "patch_size": int(vision["patch_size"]), "layer_norm_eps": 1e-5,
            },
            text_config={
                "hidden_size": int(text["width"]), "intermediate_size": 4 * int(text["width"]), "hidden_act": act,
                "num_hidden_layers": int(text["layers"]), "num_attention_heads": int(text["heads"]),
                "vocab_size": int(text["vocab_size"]), "max_position_embeddings": int(text["context_length"]),
                "layer_norm_eps": 1e-5, "eos_token_id": 2,  # 2: the text ends at its largest token, as open_clip has it
            },
        )  # fmt: skip
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        told = " ".join(str(error).split())
        problem = f"describes no vision transformer with a text transformer ({type(error).__name__}: {told})"
        raise bad_source(str(folder / CONFIG), problem, "give a ViT of open_clip") from None
    try:
        held = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise bad_source(
            str(folder / WEIGHTS), f"cannot be read ({_first_line(error)})", "give the complete model"
        ) from None
    network = CLIPModel(config)
    try:
        found = renamed(held)
        missing, unknown = network.load_state_dict(found, strict=False)
    except RuntimeError as error:
        raise bad_source(
            str(folder / WEIGHTS), f"does not fit {CONFIG} ({_first_line(error)})", "give files of one model"
        ) from None
    lacking = [name for name in missing if "position_ids" not in name]
    if lacking:
        raise bad_source(
            str(folder / WEIGHTS), f"lacks weights (such as {lacking[0]})", "give the complete model"
        )
    if unknown:
        problem = f"holds weights that no plain vision or text transformer has (such as {unknown[0]})"
        raise bad_source(str(folder / WEIGHTS), problem, "give a ViT of open_clip")
    settings = {
        "size": size, "resample": 3 if prepared.get("interpolation", "bicubic") == "bicubic" else 2,
        "image_mean": prepared.get("mean", (0.48145466, 0.4578275, 0.40821073)),
        "image_std": prepared.get("std", (0.26862954, 0.26130258, 0.27577711)),
    }  # fmt: skip
    return network, settings


def renamed(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under transformers' names; masks are left out, and what has no place there keeps its name."""
    held = {name.removeprefix("text."): value for name, value in held.items()}
    out: dict[str, Tensor] = {}
    for name, value in held.items():
        if name in _OUTSIDE:
            out[_OUTSIDE[name]] = value
        elif name in _TURNED:
            out[_TURNED[name]] = value.T.contiguous()
        elif (match := _BLOCK.fullmatch(name)) is not None:
            tower = "vision_model" if match[1] else "text_model"
            place, inside = f"{tower}.encoder.layers.{match[2]}", match[3]
            stem, _, kind = inside.rpartition(".")
            if inside.startswith("attn.in_proj_"):
                parts = torch.chunk(value, 3)
                for which, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                    out[f"{place}.self_attn.{which}.{inside.removeprefix('attn.in_proj_')}"] = part.clone()
            elif stem in _INSIDE:
                out[f"{place}.{_INSIDE[stem]}.{kind}"] = value
            else:
                out[name] = value
        elif name not in ("attn_mask", "logit_bias"):
            out[name] = value
    return out
