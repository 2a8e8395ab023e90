"""The public side of the embedded index: vectors of public portraits, and prompts about them.

python training/retrieval_public.py --out src/sfumato/retrieval/portraits/public.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from pictures import read

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "data"))
from fetch import CACHE
from portraits import PUBLIC

from sfumato.encoders.text_image import open_text_image_encoder
from sfumato.retrieval.prompts import portrait_prompts
from sfumato.retrieval.public_side import PublicSide

EACH = 400  # portraits of each public style


def main() -> None:
    """Encode and write one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=CACHE, help="where portraits.py wrote its files")
    parser.add_argument("--encoder", default="portraits")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    encoder, pictures = open_text_image_encoder(options.encoder), read(options.data, PUBLIC, 32)
    rows = np.concatenate([np.flatnonzero(pictures.style == style)[:EACH] for style in range(len(PUBLIC))])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    PublicSide.of(
        encoder.images(pictures.images[rows]), encoder.texts(portrait_prompts()), encoder.identity
    ).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
