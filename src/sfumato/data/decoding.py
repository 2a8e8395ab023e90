"""Bytes of unknown origin in, a small uint8 array out; nothing in between may execute or fill the memory.

Only Pillow's raster decoders for six formats are reachable (no EPS, PDF or other format with a program
inside), the size is read from the header and checked before a pixel is decoded, and only the first frame is
ever looked at.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from sfumato.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 256_000_000

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}


class UnreadableImage(InputError):
    """One record that is not a readable image; `--skip-unreadable` may leave it out.

    The message names the record and says what is wrong with the file, never what the picture shows.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"'{where}' {reason}")
        self.where, self.reason = where, reason


def decode_image(raw: bytes, *, size: tuple[int, int] | None, channels: int, where: str) -> np.ndarray:
    """The first frame of an encoded image as uint8 [H, W, C].

    raw: the file's bytes; PNG, JPEG, WebP, GIF, TIFF or BMP, recognised by content, not by name.
    size: (height, width) in pixels of the result, or None for the image's own; the image is shrunk or
        enlarged with antialiasing until it covers the target, and its centre is kept.
    channels: 1 (grey, ITU-R 601 luma) or 3 (RGB).
    where: what to call the image in an error.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled from 0..65535 to
    0..255. Raises `UnreadableImage` when the bytes are empty, not such an image, cut short, damaged, larger
    than 256 MB or than 64 million pixels.
    """
    if not raw:
        raise UnreadableImage(where, "is empty (0 bytes)")
    if len(raw) > MAX_FILE_BYTES:
        raise UnreadableImage(where, f"is larger than {MAX_FILE_BYTES // 1_000_000} MB")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            _check_pixels(image.size, where)
            image.load()
            _check_pixels(image.size, where)
            image = _upright(image)
    except (UnreadableImage, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(where, _too_many_pixels()) from None
    except UnidentifiedImageError:
        raise UnreadableImage(where, f"is not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception:  # Pillow's decoders raise a dozen types on damaged input
        raise UnreadableImage(where, "is damaged or cut short") from None
    if image.mode.startswith("I;16"):
        return _fit(_eight_bits(np.asarray(image)), size, channels)
    if image.mode not in _EIGHT_BIT_MODES:
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}.get(image.mode, f"mode {image.mode}")
        raise UnreadableImage(
            where, f"holds {kind}, whose range is unknown; save it with 8 or 16 bits per channel"
        )
    return _fit(image, size, channels)


def fit_array(pixels: np.ndarray, *, size: tuple[int, int] | None, channels: int, where: str) -> np.ndarray:
    """An image that is already an array, uint8 or uint16 [H, W] or [H, W, 1|3|4], as uint8 [H', W', C].

    Same treatment and same parameters as `decode_image`; the fourth channel is opacity.
    """
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2 or pixels.ndim not in (2, 3):
        raise UnreadableImage(where, "is not an array of uint8 or uint16 pixels")
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        raise UnreadableImage(where, "does not have 1, 3 or 4 channels in its last dimension")
    if pixels.size == 0:
        raise UnreadableImage(where, "has no pixels")
    _check_pixels((pixels.shape[1], pixels.shape[0]), where)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return _fit(_eight_bits(pixels), size, channels)


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.itemsize == 1:
        return pixels
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _check_pixels(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise UnreadableImage(where, _too_many_pixels())


def _too_many_pixels() -> str:
    return f"has more than {MAX_PIXELS // 1_000_000} million pixels"


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block beside intact pixels: shown as stored, as viewers do
        orientation = 1
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image.copy()


def _fit(image: Image.Image | np.ndarray, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    mode = "L" if channels == 1 else "RGB"
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == channels and size in (None, image.shape[:2]):
            return image
        image = Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    if size is not None and (image.height, image.width) != tuple(size):
        image = _cover(image, size)
    pixels = np.asarray(image)
    return pixels[:, :, None] if channels == 1 else pixels


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    scale = min(image.width / width, image.height / height)
    box_width, box_height = min(scale * width, image.width), min(scale * height, image.height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
