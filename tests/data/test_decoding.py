from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.data import decoding
from sfumato.data.decoding import UnreadableImage, decode_image, fit_array
from sfumato.errors import InputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLOURS = np.kron(np.arange(4).reshape(2, 2), np.ones((8, 8), int))
COLOUR = np.array([RED, GREEN, BLUE, WHITE], np.uint8)[COLOURS]  # [16, 16, 3], four quadrants
GREY = np.array([0, 90, 180, 255], np.uint8)[COLOURS]
BLACK_WHITE = np.array([0, 255, 255, 0], np.uint8)[COLOURS]
GREY16 = (GREY.astype(np.uint16) * 257).astype(np.uint16)
OPACITY = np.array([255, 0, 128, 255], np.uint8)[COLOURS]
LUMA = {RED: 76, GREEN: 150, BLUE: 29, WHITE: 255}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def over_white(pixels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    weight = opacity[..., None] / 255 if pixels.ndim == 3 else opacity / 255
    return pixels * weight + 255 * (1 - weight)


def as_colour(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def palette_with_hole() -> Image.Image:
    image = Image.fromarray(COLOURS.astype(np.uint8), "P")
    image.putpalette([*RED, *GREEN, *BLUE, *WHITE])
    image.info["transparency"] = 1
    return image


COLOUR_IMAGE, GREY_IMAGE = Image.fromarray(COLOUR), Image.fromarray(GREY)
RGBA_IMAGE = Image.fromarray(np.dstack([COLOUR, OPACITY]))
LA_IMAGE = Image.merge("LA", [GREY_IMAGE, Image.fromarray(OPACITY)])
BILEVEL_IMAGE = Image.fromarray(BLACK_WHITE).convert("1")
HOLE = np.where((COLOURS == 1)[..., None], 255, COLOUR)
CASES = [
    ("PNG", BILEVEL_IMAGE, {}, as_colour(BLACK_WHITE), 0),
    ("PNG", GREY_IMAGE, {}, as_colour(GREY), 0),
    ("PNG", LA_IMAGE, {}, as_colour(over_white(GREY, OPACITY)), 1),
    ("PNG", COLOUR_IMAGE.quantize(4), {}, COLOUR, 0),
    ("PNG", palette_with_hole(), {"transparency": 1}, HOLE, 0),
    ("PNG", palette_with_hole(), {"transparency": bytes([255, 0, 128, 255])}, over_white(COLOUR, OPACITY), 1),
    ("PNG", COLOUR_IMAGE, {}, COLOUR, 0),
    ("PNG", COLOUR_IMAGE, {"transparency": GREEN}, HOLE, 0),
    ("PNG", RGBA_IMAGE, {}, over_white(COLOUR, OPACITY), 1),
    ("PNG", Image.fromarray(GREY16), {}, as_colour(GREY), 0),
    ("JPEG", GREY_IMAGE, {"quality": 95}, as_colour(GREY), 4),
    ("JPEG", COLOUR_IMAGE, {"quality": 95}, COLOUR, 8),
    ("JPEG", COLOUR_IMAGE.convert("CMYK"), {"quality": 95}, COLOUR, 8),
    ("WEBP", COLOUR_IMAGE, {"lossless": True}, COLOUR, 0),
    ("WEBP", COLOUR_IMAGE.resize((64, 64), 0), {"quality": 95}, np.kron(COLOUR, np.ones((4, 4, 1))), 60),
    ("WEBP", RGBA_IMAGE, {"lossless": True}, over_white(COLOUR, OPACITY), 1),
    ("GIF", GREY_IMAGE, {}, as_colour(GREY), 0),
    ("GIF", COLOUR_IMAGE.quantize(4), {}, COLOUR, 0),
    ("GIF", palette_with_hole(), {"transparency": 1}, HOLE, 0),
    ("TIFF", BILEVEL_IMAGE, {}, as_colour(BLACK_WHITE), 0),
    ("TIFF", GREY_IMAGE, {}, as_colour(GREY), 0),
    ("TIFF", LA_IMAGE, {}, as_colour(over_white(GREY, OPACITY)), 1),
    ("TIFF", COLOUR_IMAGE.quantize(4), {}, COLOUR, 0),
    ("TIFF", COLOUR_IMAGE, {"compression": "tiff_lzw"}, COLOUR, 0),
    ("TIFF", RGBA_IMAGE, {}, over_white(COLOUR, OPACITY), 1),
    ("TIFF", COLOUR_IMAGE.convert("CMYK"), {}, COLOUR, 0),
    ("TIFF", Image.fromarray(GREY16), {}, as_colour(GREY), 0),
    ("BMP", BILEVEL_IMAGE, {}, as_colour(BLACK_WHITE), 0),
    ("BMP", GREY_IMAGE, {}, as_colour(GREY), 0),
    ("BMP", COLOUR_IMAGE.quantize(4), {}, COLOUR, 0),
    ("BMP", COLOUR_IMAGE, {}, COLOUR, 0),
]


@pytest.mark.parametrize(
    ("kind", "image", "options", "expected", "tolerance"),
    CASES,
    ids=[f"{c[0]}-{c[1].mode}-{i}" for i, c in enumerate(CASES)],
)
def test_formats_and_modes(kind, image, options, expected, tolerance) -> None:
    pixels = decode_image(encoded(image, kind, **options), size=None, channels=3, where="x")
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    # Lossy formats may bleed over the edges between the quadrants, so their centres are compared.
    inner = np.zeros(expected.shape[:2], bool)
    step = expected.shape[0] // 16
    inner[2 * step : 6 * step, 2 * step : 6 * step] = inner[10 * step : 14 * step, 10 * step : 14 * step] = (
        True
    )
    inner |= inner[:, ::-1]
    where = inner if kind in ("JPEG", "WEBP") and tolerance > 1 else np.ones_like(inner)
    assert np.abs(pixels[where] - expected[where].astype(float)).max() <= tolerance


def test_colour_becomes_grey_by_luma() -> None:
    grey = decode_image(encoded(COLOUR_IMAGE, "PNG"), size=None, channels=1, where="x")
    assert grey.shape == (16, 16, 1)
    expected = np.array(list(LUMA.values()))[COLOURS]
    assert np.abs(grey[:, :, 0] - expected).max() <= 1


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        pixels = decode_image(encoded(Image.fromarray(ramp), kind), size=None, channels=1, where="x")
        assert np.abs(pixels[:, :, 0] - ramp / 257.0).max() <= 0.5
    assert np.abs(fit_array(ramp, size=None, channels=1, where="x")[:, :, 0] - ramp / 257.0).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    tall = np.array([[10, 60], [110, 160], [210, 250]], np.uint8).repeat(16, 0).repeat(16, 1)
    shown = {
        1: tall,
        2: tall[:, ::-1],
        3: tall[::-1, ::-1],
        4: tall[::-1],
        5: tall.T,
        6: np.rot90(tall, -1),
        7: tall[::-1, ::-1].T,
        8: np.rot90(tall, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}}.get(kind, {})
    image = Image.fromarray(tall).convert("RGB") if kind == "WEBP" else Image.fromarray(tall)
    pixels = decode_image(encoded(image, kind, exif=exif, **options), size=None, channels=1, where="x")
    assert pixels.shape == (*shown.shape, 1)
    assert np.abs(pixels[:, :, 0].astype(int) - shown).max() <= (6 if kind == "JPEG" else 0)


def test_sixteen_bit_grey_is_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "TIFF"):
        raw = encoded(Image.fromarray(GREY16[:, :12].copy()), kind, exif=exif)
        pixels = decode_image(raw, size=None, channels=1, where="x")[:, :, 0]
        assert (pixels == np.rot90(GREY[:, :12], -1)).all()


def test_damaged_exif_beside_intact_pixels_is_no_obstacle() -> None:
    raw = encoded(GREY_IMAGE, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f junk")
    assert (decode_image(raw, size=None, channels=1, where="x")[:, :, 0] == GREY).all()


def test_only_the_first_frame_is_read() -> None:
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (40, 120, 200)]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode_image(raw, size=None, channels=1, where="x") == 40).all(), kind


def test_resizing_keeps_the_centre_and_antialiases() -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    pixels = decode_image(encoded(Image.fromarray(wide), "PNG"), size=(10, 10), channels=1, where="x")
    assert (pixels == 200).all()
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = decode_image(encoded(Image.fromarray(checks), "PNG"), size=(8, 8), channels=1, where="x")
    assert np.abs(small.astype(int) - 127).max() <= 3, "nearest-neighbour sampling would give 0 or 255"
    assert decode_image(encoded(COLOUR_IMAGE, "PNG"), size=(6, 20), channels=3, where="x").shape == (6, 20, 3)


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3])
)
@settings(max_examples=40, deadline=None)
def test_any_size_becomes_the_size_asked_for_and_flat_stays_flat(
    height, width, new_height, new_width, channels
) -> None:
    flat = np.full((height, width, 3), (77, 77, 77), np.uint8)
    pixels = fit_array(flat, size=(new_height, new_width), channels=channels, where="x")
    assert pixels.shape == (new_height, new_width, channels)
    assert (pixels == 77).all()


def png_header(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    raw = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks]:
        raw += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return raw


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_from_its_header(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("a pixel was decoded"))
    with warnings.catch_warnings(), pytest.raises(UnreadableImage, match="64 million pixels"):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        decode_image(png_header(width, height, (b"IDAT", b"")), size=(8, 8), channels=1, where="bomb.png")


def test_a_bomb_in_a_text_chunk_is_refused() -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(5_000_000))
    pixels = zlib.compress(bytes(3 * 2))
    raw = png_header(2, 2, (b"zTXt", text), (b"IDAT", pixels), (b"IEND", b""))
    with pytest.raises(UnreadableImage):
        decode_image(raw, size=None, channels=1, where="x")
    harmless = png_header(
        2, 2, (b"zTXt", b"Comment\0\0" + zlib.compress(b"hello")), (b"IDAT", pixels), (b"IEND", b"")
    )
    assert decode_image(harmless, size=None, channels=1, where="x").shape == (2, 2, 1)


def test_a_file_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", 10)
    with pytest.raises(UnreadableImage, match="larger than"):
        decode_image(encoded(GREY_IMAGE, "PNG"), size=None, channels=1, where="x")


@pytest.mark.parametrize(
    "raw",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        b"%PDF-1.4\n",
        b"<svg/>",
        b"P5 2 2 255 abcd",
        b"hello, this is a text",
        b"\0" * 100,
    ],
)
def test_other_formats_are_not_even_tried(raw: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"'cat/7\.png' is not an image in one of the formats"):
        decode_image(raw, size=None, channels=1, where="cat/7.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_file_cut_short_is_an_error(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image = noise.quantize(64) if kind == "GIF" else noise
    raw = encoded(image, kind)
    with pytest.raises(UnreadableImage, match=r"cut short|not an image"):
        decode_image(raw[: len(raw) // 2], size=None, channels=3, where="x")


def test_empty_is_an_input_error_that_names_the_file() -> None:
    with pytest.raises(InputError, match=r"'a/b\.png' is empty \(0 bytes\)"):
        decode_image(b"", size=None, channels=3, where="a/b.png")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(UnreadableImage, match="range is unknown"):
        decode_image(encoded(GREY_IMAGE.convert(mode), "TIFF"), size=None, channels=1, where="x")


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
@settings(max_examples=150, deadline=None)
def test_damage_never_ends_in_another_exception(kind: str, data: st.DataObject) -> None:
    raw = bytearray(encoded(COLOUR_IMAGE.quantize(4) if kind == "GIF" else COLOUR_IMAGE, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        assert decode_image(bytes(raw), size=(5, 7), channels=3, where="x").shape == (5, 7, 3)
    except UnreadableImage as error:
        assert str(error).startswith("'x' ")


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (np.zeros((4, 4)), "uint8 or uint16"),
        (np.zeros((4, 4), np.int16), "uint8 or uint16"),
        (np.zeros((3, 5, 5), np.uint8), "channels"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.zeros(4, np.uint8), "uint8 or uint16"),
        (np.zeros((4, 4), "U1"), "uint8 or uint16"),
    ],
)
def test_arrays_of_another_kind_are_refused(pixels: np.ndarray, problem: str) -> None:
    with pytest.raises(UnreadableImage, match=problem):
        fit_array(pixels, size=None, channels=1, where="x")


def test_arrays_are_treated_like_files() -> None:
    assert (fit_array(COLOUR, size=None, channels=3, where="x") == COLOUR).all()
    assert (fit_array(GREY, size=None, channels=3, where="x") == as_colour(GREY)).all()
    rgba = np.dstack([COLOUR, OPACITY])
    expected = over_white(COLOUR, OPACITY)
    assert np.abs(fit_array(rgba, size=None, channels=3, where="x") - expected).max() <= 1
    for size in ((8, 8), (20, 12)):
        from_file = decode_image(encoded(COLOUR_IMAGE, "PNG"), size=size, channels=1, where="x")
        assert (fit_array(COLOUR, size=size, channels=1, where="x") == from_file).all()
