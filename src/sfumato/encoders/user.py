"""Encoders that the user brings: a TorchScript file, or a transformers folder or hub id."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.data.records import bad_source, fingerprint
from sfumato.encoders.encoder import NetworkEncoder, Preprocessing, device
from sfumato.errors import InputError

# The Inception of FID, as a TorchScript file: the SHA-256 of inception-2015-12-05.pt.
FID_WEIGHTS = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor_config.json has them
_HUB_FILES = [
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]


def torchscript_encoder(path: Path, name: str) -> NetworkEncoder:
    """The network in a TorchScript file. Loading it runs its author's program: open only files you trust.

    - When its `forward` takes `return_features` (the layout of FID's inception-2015-12-05.pt), it is called with
      uint8 [B, 3, H, W] and return_features=True and resizes by itself. The distance is called FID when the file
      is that very one.
    - Otherwise it is called with float32 [B, 3, 224, 224], resized bicubically, with ImageNet's mean and
      deviation taken out, and returns [B, D]. A file PATH.json beside it, in the layout of
      `preprocessor_config.json` (`size`, `image_mean`, `image_std`), says otherwise where that is wrong.

    Raises `InputError` when the file is no TorchScript, or does not give one finite vector for each image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network: Any = torch.jit.load(str(path), map_location=device()).eval()
        takes = {argument.name for argument in network.forward.schema.arguments}
    except (RuntimeError, ValueError, AttributeError) as error:
        raise bad_source(
            str(path), f"is not a TorchScript file ({_first_line(error)})",
            "export the network with torch.jit.save, or give a transformers folder",
        ) from None  # fmt: skip
    weights = _digest(path)
    if "return_features" in takes:
        encoder = NetworkEncoder(
            name, lambda images: network(images, return_features=True), lambda images: images.contiguous(),
            weights=weights, distance="FID" if weights == FID_WEIGHTS else None,
        )  # fmt: skip
        return _checked(encoder, str(path))
    beside = path.with_name(path.name + ".json")
    given = _json(beside) if beside.is_file() else {}
    settings = {"size": 224, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, **given}
    return _checked(
        NetworkEncoder(name, network, _preprocessing(beside, settings), weights=weights), str(path)
    )


def transformers_encoder(folder: Path, name: str) -> NetworkEncoder:
    """The image side of a transformers model: ViT, DINOv2, CLIP, SigLIP, ResNet and their like.

    The feature is the projected embedding where the model has one (CLIP), else its pooled output, else the class
    token. Size, mean and deviation come from the folder's own `preprocessor_config.json`; the whole image is
    resized with antialiasing and nothing is cropped off. Weights are read from `*.safetensors` only, no code of
    the folder is run, and every weight has to be there.

    Raises `InputError` when transformers is not installed, or the folder holds no such model.
    """
    try:
        import transformers
    except ImportError:
        raise bad_source(
            str(folder), "needs the 'transformers' library", "type: pip install 'sfumato[transformers]'"
        ) from None
    if not (folder / "config.json").is_file():
        raise bad_source(str(folder), "has no config.json: it is no transformers model", "give such a folder")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "convert them with save_pretrained: pickled weights are not loaded"
        raise bad_source(str(folder), "has no weights in *.safetensors", remedy)
    described = folder / "preprocessor_config.json"
    settings = _json(described) if described.is_file() else {}
    if not settings and (folder / "processor_config.json").is_file():
        settings = _json(folder / "processor_config.json").get("image_processor") or {}
    if not settings:
        remedy = "copy it from where the model comes from: it holds the size and the normalisation"
        raise bad_source(str(folder), "has no preprocessor_config.json", remedy)
    prepare = _preprocessing(described, settings)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        wanted = (getattr(config, "architectures", None) or [""])[0]
        projected = wanted.endswith("VisionModelWithProjection")
        kind: Any = getattr(transformers, wanted) if projected else transformers.AutoModel
        network, loaded = kind.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # its loaders raise whatever the files make them raise
        problem = f"cannot be loaded as a transformers model ({_first_line(error)})"
        raise bad_source(str(folder), problem, "give a folder that AutoModel loads") from None
    missing = [key for key in loaded["missing_keys"] if "pooler" not in key]
    if missing or loaded.get("mismatched_keys"):
        first = missing[0] if missing else "one of another shape"
        raise bad_source(str(folder), f"lacks weights (such as {first})", "give the complete model")
    if not hasattr(network, "get_image_features") and network.main_input_name != "pixel_values":
        raise bad_source(
            str(folder), f"holds a {type(network).__name__}, which takes no images", "give an image model"
        )
    network = network.float().eval().to(device())
    pooled = not loaded["missing_keys"]

    def forward(images: Tensor) -> Any:
        if hasattr(network, "get_image_features"):
            answer = network.get_image_features(pixel_values=images)
            return answer if isinstance(answer, Tensor) else answer.pooler_output
        answer = network(pixel_values=images)
        for field in ("image_embeds", "pooler_output") if pooled else ():
            if getattr(answer, field, None) is not None:
                return getattr(answer, field).flatten(1)  # convolutional networks: [B, D, 1, 1]
        return answer.last_hidden_state[:, 0]

    parts = [part for path in (folder / "config.json", *files) for part in (path.name, _digest(path))]
    encoder = NetworkEncoder(name, forward, prepare, weights=fingerprint(parts))
    return _checked(encoder, str(folder))


def downloaded(spec: str) -> Path:
    """The folder of "hf:OWNER/NAME": what is needed of it is downloaded once and kept in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec.removeprefix("hf:"), allow_patterns=_HUB_FILES))
    except Exception as error:  # it raises whatever the network and the hub make it raise
        problem = f"could not be downloaded ({type(error).__name__}: {_first_line(error)})"
        raise bad_source(spec, problem, "check the name and the connection, or give a local folder") from None


def _preprocessing(where: Path, settings: dict[str, Any]) -> Preprocessing:
    """From the layout of `preprocessor_config.json`; where it crops, the crop's size is the network's input."""
    try:
        size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
        if isinstance(size, dict):
            side = size.get("shortest_edge")
            size = (side, side) if side is not None else (size["height"], size["width"])
        size = (size, size) if isinstance(size, int) else tuple(size)
        scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        normalise = settings.get("do_normalize", True)
        mean = [float(m) / scale for m in (settings["image_mean"] if normalise else (0, 0, 0))]
        std = [float(s) / scale for s in (settings["image_std"] if normalise else (1, 1, 1))]
        mode = _MODES[settings.get("resample", 3)]
        if len(size) != 2 or not all(type(n) is int and 1 <= n <= 4096 for n in size):
            raise ValueError(f"size {size}")
        if len(mean) != 3 or len(std) != 3 or not np.isfinite(mean + std).all() or min(std) <= 0:
            raise ValueError("image_mean or image_std")
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        problem = f"does not say how images are prepared ({type(error).__name__}: {_first_line(error)})"
        raise bad_source(
            str(where), problem, "give size, image_mean and image_std as transformers does"
        ) from None
    return Preprocessing((size[0], size[1]), mode, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def _checked(encoder: NetworkEncoder, where: str) -> NetworkEncoder:
    """Try the user's network on two images of noise, together and alone, and note how many numbers it gives."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    try:
        together, alone = encoder(noise), encoder(noise[:1])
    except InputError:
        raise
    except Exception as error:  # the user's network raises what it likes
        problem = f"cannot encode images ({type(error).__name__}: {_first_line(error)})"
        raise bad_source(where, problem, "see how it is called under open_encoder") from None
    if not np.allclose(together[:1], alone, rtol=1e-2, atol=1e-2 * float(np.abs(together).max())):
        problem = "gives an image other features when another image is beside it"
        raise bad_source(where, problem, "export it in evaluation mode")
    encoder.dimension = together.shape[1]
    return encoder


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise bad_source(str(path), f"is not JSON ({_first_line(error)})", "repair or remove it") from None
    if not isinstance(content, dict):
        raise bad_source(str(path), "is not a JSON object", "repair or remove it")
    return content


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if isinstance(error, torch.jit.Error) else 0][:200]
