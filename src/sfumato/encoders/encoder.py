"""Image encoders: what they promise, how they are opened by name, and the frame all networks share.

A distance is comparable with another only in the same feature space, so an encoder carries an `identity`
(weights, preprocessing and code) and the name its Fréchet distance goes by. "FID" is the distance in the
features of one file, the TorchScript Inception of 2015-12-05, and of nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.images import OwnerArray
from sfumato.data.records import bad_source, fingerprint
from sfumato.errors import InputError

BUILT_IN = ("efficientnet-lite0", "pixels")
ACCEPTED = (
    "give efficientnet-lite0, pixels, [NAME=]PATH of a TorchScript file or a transformers folder, "
    "or hf:OWNER/NAME"
)
CODE = "sfumato-encoders/1"  # part of every identity: change it whenever features change
_BLOCK = 16  # images that go through a network together: fits the processor's cache, and memory stays small
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Encoder(Protocol):
    """Images to vectors, each image independently of the others in its batch.

    name: one word, also the name of a folder. distance: what a Fréchet distance between its features is called.
    dimension: D; None where it depends on the size of the images (pixels).
    identity: hexadecimal SHA-256 over weights, preprocessing and code; equal identities, equal features.

    Calling it with uint8 [B, H, W, C], C 1 or 3, gives float32 [B, D], all finite, as an `OwnerArray` when the
    images were one. Nothing here is private by itself: features of private images are as private as they are.
    """

    @property
    def name(self) -> str: ...
    @property
    def distance(self) -> str: ...
    @property
    def dimension(self) -> int | None: ...
    @property
    def identity(self) -> str: ...
    def __call__(self, images: np.ndarray) -> np.ndarray: ...


class NotFinite(InputError):
    """A feature that is NaN or infinite; `row` is the image's position in the call, from 0."""

    def __init__(self, encoder: str, row: int) -> None:
        self.row = row
        super().__init__(
            f"encoder '{encoder}' gives a number that is not finite for image {row + 1}; no budget was spent; "
            "leave that image out or use another encoder"
        )


def open_encoder(spec: str) -> Encoder:
    """The encoder that `spec` names.

    - "efficientnet-lite0": ImageNet features, 1280 numbers; the default. "pixels": the images themselves.
    - PATH or NAME=PATH of a TorchScript file: see `user.torchscript_encoder`. Such a file is a program: loading
      it runs what its author wrote, so open only files from a source you would run code of.
    - PATH or NAME=PATH of a transformers folder (`config.json`, `preprocessor_config.json`, `*.safetensors`), or
      "hf:OWNER/NAME", downloaded when first used: see `user.transformers_encoder`. No code in it is run.

    NAME is what figures and folders are called; by default the file's or the model's own name.
    Raises `InputError` in one line for whatever is missing or cannot encode images.
    """
    if spec == "efficientnet-lite0":
        from sfumato.encoders.efficientnet import efficientnet_lite0

        return efficientnet_lite0()
    if spec == "pixels":
        from sfumato.encoders.pixels import Pixels

        return Pixels()
    from sfumato.encoders import user

    try:
        name, place = _named(spec)
        path = Path(place).expanduser()
        if place.startswith("hf:"):
            return user.transformers_encoder(user.downloaded(place), name)
        if path.is_dir():
            return user.transformers_encoder(path, name)
        if path.is_file():
            return user.torchscript_encoder(path, name)
    except OSError as error:  # no permission, or a name no file can have
        raise bad_source(spec, f"cannot be read ({error.strerror or error})", "allow reading it") from None
    raise bad_source(place, "is no encoder and no such file or folder exists", ACCEPTED)


def _named(spec: str) -> tuple[str, str]:
    """(name, path or hub id) of what the user typed; names of built-in encoders stay theirs."""
    name, given, place = spec.partition("=")
    if not given or Path(spec).exists():
        place = spec
        path = Path(place.removeprefix("hf:")).expanduser().resolve()
        own = path.name if place.startswith("hf:") or path.is_dir() else path.stem
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", own).strip("-.")[:64]
    if not place or not _NAME.fullmatch(name) or name.lower() in BUILT_IN:
        problem = f"cannot go by the name '{name}'"
        raise bad_source(
            spec, problem, "give NAME=PATH with a name of letters, digits, - and _ that is not taken"
        )
    return name, place


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 RGB [B, 3, H, W] to what a network takes: the whole image resized to `size` (height, width),
    nothing cropped off, with antialiasing; then (x - mean) / std of each channel, in units of 0 to 255."""

    size: tuple[int, int]
    mode: str  # "bilinear" or "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode=self.mode, align_corners=False, antialias=True).clamp(0, 255)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std


class NetworkEncoder:
    """A network with its preprocessing; an `Encoder`.

    forward: float or uint8 [B, 3, h, w] -> float [B, D]. prepare: `Preprocessing`, or what does the same.
    Grey images are repeated to three channels. No gradients, 32-bit floats, `_BLOCK` images at a time.
    """

    dimension: int | None = None

    def __init__(
        self,
        name: str,
        forward: Callable[[Tensor], Any],
        prepare: Callable[[Tensor], Tensor],
        *,
        weights: str,
        distance: str | None = None,
    ) -> None:
        """weights: the SHA-256 of the file(s) the network came from."""
        self.name, self.distance = name, distance or f"FD-{name}"
        self.identity = fingerprint(
            [CODE, weights, repr(prepare) if isinstance(prepare, Preprocessing) else "as is"]
        )
        self._forward, self._prepare = forward, prepare

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, D] from uint8 [B, H, W, 1 or 3]. Raises `NotFinite`, `InputError` for another shape."""
        check_images(images)
        blocks = [self._encode(images[i : i + _BLOCK]) for i in range(0, len(images), _BLOCK)]
        features = np.concatenate(blocks)
        finite = np.isfinite(features).all(1)
        if not finite.all():
            raise NotFinite(self.name, int(np.argmin(finite)))
        return marked_like(images, features)

    def _encode(self, images: np.ndarray) -> np.ndarray:
        x = torch.tensor(np.ascontiguousarray(images), device=device()).permute(0, 3, 1, 2)
        x = x.expand(-1, 3, -1, -1).contiguous()  # one layout, hence one rounding, however the images came
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            rows = self._forward(self._prepare(x))
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(x):
            got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise InputError(
                f"encoder '{self.name}' gives {got} for {len(x)} images, not one vector each; no budget was spent; "
                "export the network so that it returns [images, numbers]"
            )
        return rows.float().cpu().numpy()


def check_images(images: np.ndarray) -> None:
    """Raise `ValueError` unless images are uint8 [B, H, W, 1 or 3], at least one."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise ValueError(f"images must be uint8 [B, H, W, 1 or 3], B >= 1, not {images.dtype} {images.shape}")


def marked_like(images: Any, features: np.ndarray) -> np.ndarray:
    """`features`, as an `OwnerArray` when the images are one: no release accepts them then."""
    return features.view(OwnerArray) if isinstance(images, OwnerArray) else features


def device() -> str:
    """Where networks run."""
    return "cuda" if torch.cuda.is_available() else "cpu"
