"""How alike two images are: feature extractors with a metric, and the changes of a query that are looked through.

Similarities are higher for closer images, always; distances are negated. Nothing here carries a privacy guarantee:
features of private images are as private as the images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from sfumato.data.records import fingerprint, printable
from sfumato.encoders.encoder import NetworkEncoder, Preprocessing, check_images, marked_like, open_encoder
from sfumato.encoders.user import IMAGENET_MEAN, IMAGENET_STD
from sfumato.errors import InputError

Metric = Literal["cosine", "euclidean", "tiles", "hamming"]
CODE = "sfumato-similarity/1"  # part of every identity: change it whenever features change
NOTHING_AUDITED = "nothing was audited"
TILES = 16  # tiles of an image, some of them empty where the image is small
NOT_INFORMATIVE = 0.1  # bits of entropy; at most this: as good as blank
_BIN = 16  # grey levels
_HASH, _HASHED = 8, 32  # sides of the hash and of the image it is taken from
_AT_ONCE = 1024
_TAKEN = ("pixels", "tiles", "phash", "efficientnet-lite0", "copy")
_DIRECTIONS: dict[Metric, str] = {
    "cosine": "cosine, higher is closer",
    "euclidean": "RMS pixel distance (0 to 1), lower is closer",
    "tiles": "largest RMS pixel distance of a tile (0 to 1), lower is closer",
    "hamming": "share of 64 bits that differ, lower is closer",
}


class Variant(NamedTuple):
    """A change of the query that makes it no other picture: a horizontal flip, then a shift by whole pixels."""

    flip: bool = False
    down: int = 0
    right: int = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, C] changed; what a shift lays bare is filled with the edge."""
        images = images[:, :, ::-1] if self.flip else images
        for axis, shift in ((1, self.down), (2, self.right)):
            if shift:
                side = images.shape[axis]
                images = np.take(images, np.clip(np.arange(side) - shift, 0, side - 1), axis=axis)
        return images


FLIPS = (Variant(), Variant(flip=True))
FLIPS_AND_SHIFTS = tuple(
    Variant(flip, down, right) for flip in (False, True) for down in (0, -1, 1) for right in (0, -1, 1)
)


class Extractor(Protocol):
    """Images to vectors, one image independent of the others, and how two vectors are compared.

    name: one word. identity: hexadecimal SHA-256 of weights, preprocessing and code. preprocessing, direction: one
    line each, for people. variants: the changes of a query over which the best match is taken.

    metric: how similarity comes from two feature vectors x and y: "cosine" x·y / |x||y|; "euclidean" -|x - y|;
    "tiles" minus the largest |x_t - y_t| of the `TILES` equal parts of the vector; "hamming" minus the share of
    entries, all 0 or 1, that differ.

    Calling it with uint8 [N, H, W, C], C 1 or 3, N >= 1, gives float32 [N, D], all finite; an `OwnerArray` for one.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def preprocessing(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def metric(self) -> Metric: ...
    @property
    def variants(self) -> tuple[Variant, ...]: ...
    def __call__(self, images: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A function of uint8 images [N, H, W, C] to features [N, D] with what an `Extractor` says of itself.

    Features that are compared by cosine come out with length 1 (or 0, where the function gives zeros).
    """

    name: str
    identity: str
    preprocessing: str
    metric: Metric
    variants: tuple[Variant, ...]
    function: Callable[[np.ndarray], np.ndarray]

    @property
    def direction(self) -> str:
        return _DIRECTIONS[self.metric]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, D]. InputError for a feature that is not finite."""
        check_images(images)
        plain = np.asarray(images)
        parts = [self.function(plain[i : i + _AT_ONCE]) for i in range(0, len(plain), _AT_ONCE)]
        features = np.concatenate(parts).astype(np.float32, copy=False)
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            raise InputError(
                f"extractor '{self.name}' gives a number that is not finite for image {int(np.argmin(finite)) + 1}; "
                f"{NOTHING_AUDITED}; leave that image out or use another extractor"
            )
        if self.metric == "cosine":
            features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        return marked_like(images, features)


def open_extractor(spec: str) -> Extractor:
    """The extractor that `spec` names.

    - "pixels": root mean square difference of all values on a scale of 0 to 1.
    - "tiles": the image is cut into 4 by 4 tiles, or as many as leave them 4 pixels a side; the largest root mean
      square difference of two tiles in the same place (Carlini et al. 2023, arXiv 2301.13188, section 4.1).
      Unlike the distance of whole images it is not small for two pictures that share a large plain background.
    - "phash": 64 bits from the lowest 8 by 8 frequencies of the grey image at 32 by 32 pixels; equal to
      ImageHash's `phash`.
    - "efficientnet-lite0": ImageNet features, by cosine.
    - PATH or NAME=PATH of an ONNX file (`*.onnx`; see `onnx_extractor`), a TorchScript file or a transformers folder
      (see `encoders.encoder.open_encoder`): SSCD, DINOv2 and the like, by cosine.

    Raises `InputError` in one line for whatever is missing or cannot be used.
    """
    if spec == "pixels":
        return _fixed("pixels", "euclidean", FLIPS_AND_SHIFTS, _pixels, "values / 255, no resizing")
    if spec == "tiles":
        said = "values / 255 in 4 by 4 tiles of at least 4 pixels a side (fewer tiles in smaller images)"
        return _fixed("tiles", "tiles", FLIPS_AND_SHIFTS, _tiles, said)
    if spec == "phash":
        return _fixed("phash", "hamming", FLIPS, _phash, "grey, 32 by 32 (Lanczos), lowest 8 by 8 of its DCT")
    if spec.endswith(".onnx"):
        name, given, place = spec.partition("=")
        named = bool(given) and not Path(spec).exists()
        path = Path(place if named else spec).expanduser()
        return onnx_extractor(path, name if named else path.stem)
    encoder = open_encoder(spec)
    if encoder.name in _TAKEN and spec != encoder.name:
        raise _unusable(
            spec, f"cannot go by the name '{encoder.name}'", "give NAME=PATH with a name of its own"
        )
    return _cosine(
        encoder.name, encoder.identity, "grey repeated to 3 channels, then the encoder's own", encoder
    )


def onnx_extractor(path: Path, name: str) -> Extractor:
    """The network in an ONNX file, run by onnxruntime on the CPU; an ONNX file is data, no code in it is run.

    It takes one float32 [B, 3, H, W]. Images are resized as a whole (bicubic, antialiased) to the model's own H and
    W, or 224 by 224 where the file leaves them open, scaled to 0..1, and ImageNet's mean and deviation are taken
    out. The feature is the first output [B, D], else the first token of the first output [B, T, D]. A model whose B
    is fixed to 1 gets one image at a time.

    Raises `InputError` when onnxruntime or the file is missing, or it is not such a network.
    """
    try:
        import onnxruntime
    except ImportError:
        raise _unusable(
            path, "needs the 'onnxruntime' library", "type: pip install 'sfumato[onnx]'"
        ) from None
    if not path.is_file():
        raise _unusable(path, "does not exist", "give the path of an ONNX file")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name in _TAKEN:
        raise _unusable(
            path, f"cannot go by the name '{name}'", "give NAME=PATH with letters, digits, - and _"
        )
    settings: Any = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 4
    try:
        session: Any = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions, of no common base
        problem = f"is not an ONNX model that onnxruntime can run ({_first_line(error)})"
        raise _unusable(path, problem, "export the network again") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = list(inputs[0].shape) if len(inputs) == 1 and inputs[0].type == "tensor(float)" else []
    fixed = [side if isinstance(side, int) and side > 0 else None for side in shape]
    if len(shape) != 4 or fixed[1] not in (3, None) or fixed[0] not in (1, None):
        raise _unusable(
            path, f"takes {shape or 'something else'}", "export it with one float input [B, 3, H, W]"
        )
    ranks = [len(output.shape) for output in outputs]
    rank = next((rank for rank in (2, 3) if rank in ranks), None)
    if rank is None:
        raise _unusable(
            path, "has no output [B, D]", "export it so that it returns one vector for each image"
        )
    taken, wanted = inputs[0].name, outputs[ranks.index(rank)].name

    def forward(images: torch.Tensor) -> torch.Tensor:
        batches = images.cpu().split(1 if fixed[0] == 1 else len(images))
        answers = [session.run([wanted], {taken: batch.numpy()})[0] for batch in batches]
        answer = torch.from_numpy(np.concatenate(answers))
        return answer[:, 0] if rank == 3 else answer

    mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    size = (fixed[2] or 224, fixed[3] or 224)
    prepare = Preprocessing(size, "bicubic", (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    parts = [path, *sorted(path.parent.glob(path.name + "?*"))]  # weights may lie in a file beside it
    weights = fingerprint([hashlib.sha256(part.read_bytes()).digest() for part in parts if part.is_file()])
    encoder = NetworkEncoder(name, forward, prepare, weights=weights)
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    try:
        together, alone = encoder(noise), encoder(noise[:1])
    except InputError:
        raise
    except Exception as error:
        raise _unusable(path, f"cannot encode images ({_first_line(error)})", "export it again") from None
    if not np.allclose(together[:1], alone, rtol=1e-2, atol=1e-2 * float(np.abs(together).max())):
        problem = "gives an image other features when another image is beside it"
        raise _unusable(path, problem, "export it in evaluation mode")
    said = f"RGB resized to {size[0]} by {size[1]} (bicubic), ImageNet mean and deviation taken out"
    return _cosine(name, encoder.identity, said, encoder)


def informative(images: np.ndarray) -> np.ndarray:
    """Whether each image uint8 [N, H, W, C] shows anything: bool [N].

    The entropy of its grey values in bins of 16 levels, one of them centred on the median, has to exceed
    `NOT_INFORMATIVE` bits: about one pixel in a hundred that differs. Blank images, flat ones with faint noise and
    flat averages fall below, and match anything plain; handwritten digits are at 0.4 and more.
    """
    shown = np.zeros(len(images), bool)
    for start in range(0, len(images), _AT_ONCE):
        grey = (
            np.asarray(images[start : start + _AT_ONCE])
            .mean(axis=3)
            .reshape(len(images[start : start + _AT_ONCE]), -1)
        )
        middle = np.median(grey, axis=1, keepdims=True)
        bins = np.floor((grey - middle) / _BIN + 0.5).astype(np.int64) + 256 // _BIN
        width = 2 * 256 // _BIN + 1
        counts = np.bincount(
            (bins + width * np.arange(len(bins))[:, None]).ravel(), minlength=width * len(bins)
        )
        share = counts.reshape(len(bins), width) / grey.shape[1]
        entropy = -(share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum(axis=1)
        shown[start : start + len(bins)] = entropy > NOT_INFORMATIVE
    return shown


def _fixed(
    name: str,
    metric: Metric,
    variants: tuple[Variant, ...],
    function: Callable[[np.ndarray], np.ndarray],
    said: str,
) -> FeatureExtractor:
    return FeatureExtractor(name, fingerprint([CODE, name, said]), said, metric, variants, function)


def _cosine(
    name: str, identity: str, said: str, function: Callable[[np.ndarray], np.ndarray]
) -> FeatureExtractor:
    return FeatureExtractor(name, fingerprint([CODE, identity, said]), said, "cosine", FLIPS, function)


def _pixels(images: np.ndarray) -> np.ndarray:
    """Scaled such that the Euclidean distance is the RMS difference on a scale of 0 to 1."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    return flat / np.float32(255 * np.sqrt(flat.shape[1]))


def _tiles(images: np.ndarray) -> np.ndarray:
    """`TILES` equal parts, each scaled as `_pixels` does; short tiles and missing ones are filled with zeros."""
    rows, columns = (np.array_split(np.arange(side), max(1, min(4, side // 4))) for side in images.shape[1:3])
    largest = len(rows[0]) * len(columns[0]) * images.shape[3]
    features = np.zeros((len(images), TILES, largest), np.float32)
    for number, (down, right) in enumerate((down, right) for down in rows for right in columns):
        tile = images[:, down[0] : down[-1] + 1, right[0] : right[-1] + 1]
        flat = _pixels(tile)
        features[:, number, : flat.shape[1]] = flat
    return features.reshape(len(images), -1)


def _phash(images: np.ndarray) -> np.ndarray:
    """0 or 1, float32 [N, 64], row-major over frequencies."""
    from scipy.fft import dct

    grey = np.empty((len(images), _HASHED, _HASHED))
    for row, image in enumerate(images):
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("L")
        grey[row] = np.asarray(picture.resize((_HASHED, _HASHED), Image.Resampling.LANCZOS))
    low = np.asarray(dct(dct(grey, axis=1), axis=2))[:, :_HASH, :_HASH].reshape(len(images), -1)
    return (low > np.median(low, axis=1, keepdims=True)).astype(np.float32)


def _unusable(path: Path | str, problem: str, remedy: str) -> InputError:
    return InputError(printable(f"'{path}' {problem}; {NOTHING_AUDITED}; {remedy}"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
