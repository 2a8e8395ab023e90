"""Does the embedded text-to-image model draw what it is asked for? Attributes and styles, judged by classifiers.

    python benchmarks/data/portraits.py public
    python benchmarks/text_to_image.py [--model FOLDER] --out DIR

Classifiers (logistic regression on EfficientNet-Lite0 features and pixels) learn attributes and styles from public
portraits and are tested on held-out ones. Then the model draws each style with and without each attribute in the
prompt. Shown: how often the classifier sees the attribute with the word and without it, and how often it sees the style
that was asked for; beside them what it makes of real held-out portraits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))
from fetch import CACHE
from portraits import PUBLIC

from sfumato.encoders.encoder import open_encoder
from sfumato.personalization.export import draw
from sfumato.personalization.text_to_image import open_pipeline

ATTRIBUTES = {
    "glasses": lambda words: words.get("glasses") == "glasses",
    "sunglasses": lambda words: words.get("glasses") == "sunglasses",
    "a beard": lambda words: words.get("beard") == "a beard",
    "a hat": lambda words: "hat" in words,
    "no hair": lambda words: words.get("hair") == "no hair",
    "long hair": lambda words: "long" in words.get("hair", ""),
    "blue hair": lambda words: "blue" in words.get("hair", ""),
    "dark skin": lambda words: words.get("skin") == "dark skin",
}
FEWEST = 0.05  # share of a style's portraits that must have an attribute for the style to be asked for it
EACH = 600


def main() -> None:
    """Train the classifiers, draw, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=CACHE, help="where portraits.py wrote its files")
    parser.add_argument("--model", default="portraits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=8, help="pictures of each style and prompt")
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pipeline, encode = open_pipeline(options.model), open_encoder("efficientnet-lite0")
    size = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
    images, words, style = [], [], []
    for number, name in enumerate(PUBLIC):
        with np.load(options.data / f"portraits-{name}-{size}.npz", allow_pickle=False) as held:
            images.append(held["images"][:EACH])
            words += [json.loads(text) for text in held["attributes"][:EACH]]
        style += [number] * len(images[-1])
    pixels, style = np.concatenate(images), np.array(style)
    test = np.arange(len(pixels)) % 4 == 0

    def features(some: np.ndarray) -> np.ndarray:
        small = some.reshape(len(some), size // 2, 2, size // 2, 2, 3).mean((2, 4)).reshape(len(some), -1)
        return np.concatenate([encode(some), small / 64], 1)

    known = features(pixels)
    rows = []
    of_style = _classifier(known[~test], style[~test])
    asked_style = np.repeat(np.arange(len(PUBLIC)), options.each)

    def drawn(phrase: str, styles: list[int]) -> np.ndarray:
        prompts = [
            f"a portrait {phrase}in the style of {PUBLIC[s].replace('-', '')}"
            for s in styles
            for _ in range(options.each)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            return draw(pipeline, prompts, steps=options.steps, at_once=64)

    plain = drawn("", list(range(len(PUBLIC))))
    seen = of_style.predict(features(plain))
    rows.append({
        "asked": "the style", "real portraits": float((of_style.predict(known[test]) == style[test]).mean()),
        "with the word": float((seen == asked_style).mean()), "without it": 1 / len(PUBLIC),
    })  # fmt: skip
    sheet = [
        np.concatenate(list(plain.reshape(len(PUBLIC), options.each, size, size, 3)[:, i]), 1)
        for i in range(4)
    ]
    for name, holds in ATTRIBUTES.items():
        truth = np.array([holds(each) for each in words])
        can = [s for s in range(len(PUBLIC)) if truth[style == s].mean() >= FEWEST]
        within = np.isin(style, can)
        judge = _classifier(known[within & ~test], truth[within & ~test])
        real = judge.predict(known[within & test])
        said = truth[within & test]
        with_word = drawn(f"with {name} ", can)
        without = plain[np.isin(asked_style, can)]
        rows.append({
            "asked": name, "styles": len(can), "real portraits": float((real == said).mean()),
            "real with it": float(real[said].mean()), "real without it": float(real[~said].mean()),
            "with the word": float(judge.predict(features(with_word)).mean()),
            "without it": float(judge.predict(features(without)).mean()),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        strip = with_word.reshape(len(can), options.each, size, size, 3)[:, 0]
        blank = np.full((len(PUBLIC), size, size, 3), 255, np.uint8)
        blank[can] = strip
        sheet.append(np.concatenate(list(blank), 1))
    print(json.dumps(rows[0]))
    Image.fromarray(np.concatenate(sheet, 0)).save(options.out / "text_to_image.png")
    (options.out / "text_to_image.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _classifier(features: np.ndarray, truth: np.ndarray):  # type: ignore[no-untyped-def]
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(features, truth)


if __name__ == "__main__":
    main()
