"""Images and texts in one space: CLIP-like models, opened by path, and the small one that is embedded.

Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020). Every vector has length 1, so
that an inner product is a cosine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.data.records import bad_source, fingerprint
from sfumato.encoders.encoder import NotFinite, Preprocessing, check_images, device, marked_like
from sfumato.encoders.open_clip import from_open_clip
from sfumato.encoders.quiet import quiet
from sfumato.encoders.user import _digest, _first_line, _json, _preprocessing

EMBEDDED = "portraits"
CODE = "sfumato-text-image/1"  # part of every identity: change it whenever vectors change
_BLOCK = (
    16  # images, or texts, that go through together; always so many, so that none of them depends on how many
)
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
_HUB_FILES = [
    "*config.json",
    "special_tokens_map.json",
    *_TOKENIZER,
    "*.safetensors",
    "*.safetensors.index.json",
]


class TextImageEncoder:
    """A CLIP-like model.

    name: one word. dimension: D. size: (height, width) it looks at. identity: hexadecimal SHA-256 over weights,
    tokenizer, preprocessing and code; equal identities, equal vectors.

    A vector does not depend on what else is encoded with it, to the last bit: images and texts go through in blocks of
    one size, padded with nothing.
    """

    def __init__(self, name: str, network: Any, tokenizer: Any, prepare: Preprocessing, weights: str) -> None:
        self.name, self.dimension = name, int(network.config.projection_dim)
        self.size, self.identity = prepare.size, fingerprint([CODE, weights, repr(prepare)])
        self._network, self._tokenizer, self._prepare = network, tokenizer, prepare
        self._longest = int(network.config.text_config.max_position_embeddings)

    def images(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, D], rows of length 1, from uint8 [B, H, W, 1 or 3]; an `OwnerArray` stays marked.

        Raises `NotFinite` where the model gives no number.
        """
        check_images(images)
        return marked_like(images, self._unit(np.concatenate([
            self._block(np.ascontiguousarray(images[i : i + _BLOCK])) for i in range(0, len(images), _BLOCK)
        ])))  # fmt: skip

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [B, D] of length 1; what is beyond the model's context is cut off."""
        blocks = []
        for start in range(0, len(texts), _BLOCK):
            part = list(texts[start : start + _BLOCK])
            told = self._tokenizer(
                part + [""] * (_BLOCK - len(part)), padding="max_length", truncation=True, max_length=self._longest,
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                found = self._network.get_text_features(
                    input_ids=told.input_ids.to(device()), attention_mask=told.attention_mask.to(device())
                )
            blocks.append(_tensor(found)[: len(part)].float().cpu().numpy())
        return self._unit(np.concatenate(blocks))

    def _block(self, images: np.ndarray) -> np.ndarray:
        padded = np.zeros((_BLOCK, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        x = torch.from_numpy(padded).to(device()).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self._network.get_image_features(pixel_values=self._prepare(x))
        return _tensor(found)[: len(images)].float().cpu().numpy()

    def _unit(self, vectors: np.ndarray) -> np.ndarray:
        lengths = np.sqrt(np.square(vectors.astype(np.float64)).sum(1, keepdims=True))
        finite = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
        if not finite.all():
            raise NotFinite(self.name, int(np.argmin(finite)))
        return (vectors / lengths).astype(np.float32)


def open_text_image_encoder(spec: str = EMBEDDED) -> TextImageEncoder:
    """The joint space that `spec` names.

    "portraits": the embedded one, for drawn portraits. Else a folder, or hf:OWNER/NAME, in the layout of transformers'
    `CLIPModel` (config.json, preprocessor_config.json, tokenizer files, *.safetensors) or of open_clip
    (open_clip_config.json, open_clip_model.safetensors, tokenizer files). Weights are read from *.safetensors only.

    Raises InputError, in one line, for anything else.
    """
    if spec == EMBEDDED:
        return _opened(Path(__file__).parent / "portraits_clip", EMBEDDED)
    try:
        folder = _downloaded(spec) if spec.startswith("hf:") else Path(spec).expanduser()
        if not folder.is_dir():
            remedy = "give portraits, a folder of a CLIPModel or of open_clip, or hf:OWNER/NAME"
            raise bad_source(spec, "is no joint space of images and texts and no such folder exists", remedy)
        return _opened(folder, folder.resolve().name)
    except OSError as error:
        raise bad_source(spec, f"cannot be read ({error.strerror or error})", "allow reading it") from None


def _downloaded(spec: str) -> Path:
    """The folder of "hf:OWNER/NAME", tokenizer and all: downloaded once and kept in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec.removeprefix("hf:"), allow_patterns=_HUB_FILES))
    except Exception as error:  # it raises whatever the network and the hub make it raise
        problem = f"could not be downloaded ({type(error).__name__}: {_first_line(error)})"
        raise bad_source(spec, problem, "check the name and the connection, or give a local folder") from None


def _opened(folder: Path, name: str) -> TextImageEncoder:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "convert them with save_pretrained: pickled weights are not loaded"
        raise bad_source(str(folder), "has no weights in *.safetensors", remedy)
    if not any((folder / file).is_file() for file in _TOKENIZER):
        raise bad_source(
            str(folder), f"has no tokenizer ({', '.join(_TOKENIZER)})", "copy it from where the model is from"
        )
    if (folder / "open_clip_config.json").is_file() and not (folder / "config.json").is_file():
        network, settings = from_open_clip(folder)
        files = [folder / "open_clip_model.safetensors"]
        described = folder / "open_clip_config.json"
    else:
        network = _network(folder)
        described = folder / "preprocessor_config.json"
        if not described.is_file():
            remedy = "copy it from where the model comes from: it holds the size and the normalisation"
            raise bad_source(str(folder), "has no preprocessor_config.json", remedy)
        settings = _json(described)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its loaders raise whatever the files make them raise
        raise bad_source(
            str(folder), f"has a tokenizer that cannot be loaded ({_first_line(error)})", "copy it again"
        ) from None
    also = ("config.json", *_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")
    named = [described, *files, *(folder / file for file in also if (folder / file).is_file())]
    weights = fingerprint([part for path in named for part in (path.name, _digest(path))])
    network = network.float().eval().to(device())
    return TextImageEncoder(name, network, tokenizer, _preprocessing(described, settings), weights)


def _network(folder: Path) -> Any:
    import transformers

    if not (folder / "config.json").is_file():
        raise bad_source(str(folder), "has no config.json: it is no transformers model", "give such a folder")
    found = _json(folder / "config.json").get("model_type")
    if found != "clip":
        raise bad_source(
            str(folder),
            f"holds a model of type {json.dumps(found)}, not clip",
            "give one with text and image towers",
        )
    kind: Any = transformers.CLIPModel
    try:
        with quiet():
            network, loaded = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # its loaders raise whatever the files make them raise
        problem = f"cannot be loaded as a CLIPModel ({_first_line(error)})"
        raise bad_source(str(folder), problem, "give a folder that CLIPModel.save_pretrained wrote") from None
    missing = list(loaded["missing_keys"]) or list(loaded.get("mismatched_keys") or ())
    if missing:
        problem = f"lacks weights (such as {missing[0]})"
        raise bad_source(str(folder), problem, "give the complete model, with both towers and projections")
    return network


def _tensor(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output
