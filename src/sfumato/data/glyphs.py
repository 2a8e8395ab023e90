"""Public demonstration images: letters, digits and symbols drawn from the fonts that matplotlib ships.

Each glyph is one class. Strokes are thinned to their centre line and redrawn with a pen of random width, then
sheared, turned, stretched and bent, so that one font outline gives many different drawings. Nothing here has
seen a private image.
"""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PER_CLASS = 240
SYMBOLS = "+-=<>/\\|()[]{}?!#$%&*@~^;:§¶ßΓΔΘΛΞΠΣΦΨΩαβγδλμπφψω"
GLYPHS = string.digits + string.ascii_uppercase + string.ascii_lowercase + SYMBOLS
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10",
)  # fmt: skip
CANVAS = 56  # glyphs are drawn and thinned at this many pixels, twice the default image
BOX = 40  # longer side of a drawn glyph on the canvas
_COMPUTER_MODERN_HOLES = set(string.printable) - set(string.ascii_letters + string.digits)


def class_names() -> tuple[str, ...]:
    """The glyphs in class order, one character each."""
    return tuple(GLYPHS)


def render_glyphs(
    *, size: int = 28, per_class: int = PER_CLASS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Draw `per_class` variants of every glyph, white on black.

    Returns images (uint8, [N, size, size, 1]), labels (int64, [N], grouped by class) and the class names.
    The same arguments give the same images.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((len(GLYPHS) * per_class, size, size, 1), np.uint8)
    for row, glyph in enumerate(GLYPHS):
        skeletons = _skeletons(glyph)
        chosen = skeletons[rng.integers(len(skeletons), size=per_class)]
        drawn = _draw(chosen, size, rng)
        images[row * per_class : (row + 1) * per_class, :, :, 0] = drawn
    labels = np.repeat(np.arange(len(GLYPHS)), per_class)
    return images, labels, class_names()


@cache
def _skeletons(glyph: str) -> np.ndarray:
    """Centre lines of one glyph in every font that has it, bool [fonts, CANVAS, CANVAS]."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    outlines = []
    for name in FONTS:
        if name.startswith("cm") and (glyph in _COMPUTER_MODERN_HOLES or ord(glyph) > 127):
            continue  # Computer Modern's encoding puts other signs there
        outline = _outline(glyph, folder / f"{name}.ttf")
        if outline is not None:
            outlines.append(outline)
    return _thin(np.stack(outlines))


def _outline(glyph: str, font_file: Path) -> np.ndarray | None:
    font = ImageFont.truetype(str(font_file), 96)
    left, top, right, bottom = font.getbbox(glyph)
    width, height = int(right - left), int(bottom - top)
    if width < 2 or height < 2:
        return None
    picture = Image.new("L", (width, height))
    ImageDraw.Draw(picture).text((-left, -top), glyph, fill=255, font=font)
    scale = BOX / max(width, height)
    fitted = picture.resize(
        (max(2, round(width * scale)), max(2, round(height * scale))), Image.Resampling.BOX
    )
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(fitted, ((CANVAS - fitted.width) // 2, (CANVAS - fitted.height) // 2))
    return np.asarray(canvas) > 100


def _thin(shapes: np.ndarray) -> np.ndarray:
    """Zhang-Suen thinning (Comm. ACM 27(3), 1984) of a batch of shapes, bool [N, H, W]."""
    shapes = np.pad(shapes, ((0, 0), (1, 1), (1, 1)))
    changed = True
    while changed:
        changed = False
        for first_pass in (True, False):
            p = [np.roll(shapes, shift, (1, 2)) for shift in
                 ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))]  # fmt: skip
            neighbours = sum(q.astype(np.int8) for q in p)
            turns = sum((~p[i] & p[(i + 1) % 8]).astype(np.int8) for i in range(8))
            north, east, south, west = p[0], p[2], p[4], p[6]
            if first_pass:
                corner = ~(north & east & south) & ~(east & south & west)
            else:
                corner = ~(north & east & west) & ~(north & south & west)
            remove = shapes & (neighbours >= 2) & (neighbours <= 6) & (turns == 1) & corner
            if remove.any():
                shapes, changed = shapes & ~remove, True
    return shapes[:, 1:-1, 1:-1]


def _draw(skeletons: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Bend the centre lines and draw them with a round pen; uint8 [N, size, size]."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

    n = len(skeletons)
    centre = (CANVAS - 1) / 2
    axis = (np.arange(2 * size) + 0.5) / (2 * size) * CANVAS - 0.5 - centre  # drawn at twice the size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    turn = rng.normal(0, 0.12, n)
    shear = rng.normal(0.15, 0.25, n)
    stretch_x = np.exp(rng.normal(0, 0.15, n))
    stretch_y = np.exp(rng.normal(0, 0.06, n))
    bend = rng.normal(0, 1, (n, 2, 8, 8))
    bend_size = rng.uniform(0.5, 2.6, n)
    pen = np.clip(rng.normal(2.6, 0.7, n), 1.3, 4.5)  # radius in canvas pixels
    moved = rng.normal(0, 0.8, (n, 2))
    out = np.empty((n, size, size), np.uint8)
    zoom = (np.arange(2 * size) + 0.5) / (2 * size) * 8 - 0.5
    zoom_grid = np.meshgrid(zoom, zoom, indexing="ij")
    for i in range(n):
        field = [map_coordinates(gaussian_filter(b, 1.0, mode="nearest") * 2.5, zoom_grid, order=1, mode="nearest")
                 for b in bend[i]]  # fmt: skip
        u = x * np.cos(turn[i]) + y * np.sin(turn[i])
        v = -x * np.sin(turn[i]) + y * np.cos(turn[i])
        u = (u + shear[i] * v) / stretch_x[i]
        v = v / stretch_y[i]
        rows = v + field[0] * bend_size[i] + centre + moved[i, 0]
        columns = u + field[1] * bend_size[i] + centre + moved[i, 1]
        distance = distance_transform_edt(~skeletons[i])
        distance = map_coordinates(distance, (rows, columns), order=1, mode="nearest")
        ink = np.clip(pen[i] - distance + 0.5, 0, 1)
        out[i] = np.round(255 * ink.reshape(size, 2, size, 2).mean((1, 3)))
    return out
