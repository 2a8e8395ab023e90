"""The public styles under all filters as a labelled set, `STYLE` or `FILTER STYLE`, for `sfumato style-bank`.

python training/public_styles.py --out public-styles.npz
sfumato style-bank public-styles.npz --out src/sfumato/personalization/portraits/styles.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from pictures import FILTERS, as_tensor, filtered, read

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "data"))
from fetch import CACHE
from portraits import PUBLIC

EACH = 64


def main() -> None:
    """Write one .npz."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=CACHE, help="where portraits.py wrote its files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    pictures = read(options.data, PUBLIC, options.size)
    images, labels = [], []
    for number, style in enumerate(PUBLIC):
        rows = np.flatnonzero(pictures.style == number)
        for position, name in enumerate(FILTERS):
            some = pictures.images[rows[position * EACH :][:EACH]]
            shown = filtered(as_tensor(some), name).clamp(0, 1) * 255
            images.append(shown.round().byte().permute(0, 2, 3, 1).numpy())
            labels += [style if name == "plain" else f"{name} {style}"] * len(some)
    np.savez_compressed(options.out, images=np.concatenate(images), labels=np.array(labels))
    print(options.out)


if __name__ == "__main__":
    main()
