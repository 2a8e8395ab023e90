"""Public portraits as training material: pictures, filters that make more styles of them, and captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

FILTERS = ("plain", "grey", "sepia", "negative", "outline", "blueprint", "faded", "crimson")
"""What a picture may have been put through; the word stands before the style's in its caption."""

NOUNS = ("picture", "painting", "drawing", "rendering", "depiction", "sketch")
"""What captions call a portrait in half of the cases; the templates of textual inversion use these words."""


@dataclass(frozen=True)
class Portraits:
    """images: uint8 [N, size, size, 3]. style: int64 [N] into `styles`. attributes: words of each, by kind."""

    images: np.ndarray
    style: np.ndarray
    styles: tuple[str, ...]
    attributes: list[dict[str, str]]


def read(folder: Path, styles: Sequence[str], size: int) -> Portraits:
    """What `benchmarks/data/portraits.py` wrote for these styles."""
    images, numbers, attributes = [], [], []
    for number, style in enumerate(styles):
        with np.load(folder / f"portraits-{style}-{size}.npz", allow_pickle=False) as held:
            images.append(held["images"])
            attributes += [json.loads(text) for text in held["attributes"]]
        numbers.append(np.full(len(images[-1]), number))
    return Portraits(np.concatenate(images), np.concatenate(numbers), tuple(styles), attributes)


def word(style: str) -> str:
    """The word that stands for a style in captions: "big-ears" is "bigears"."""
    return style.replace("-", "")


def caption(
    attributes: dict[str, str], style: str | None, filtered: str, rng: np.random.Generator, keep: float = 0.8
) -> str:
    """A caption that names each attribute with chance `keep`, in any order, and the style where there is one."""
    phrases = [text for kind, text in attributes.items() if kind != "mood" and rng.random() < keep]
    rng.shuffle(phrases)
    noun = "portrait" if rng.random() < 0.5 else str(rng.choice(NOUNS))
    said = f"a {noun}"
    if phrases:
        listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
        said += f" with {listed}"
    if "mood" in attributes and rng.random() < keep:
        said = said.replace(f"a {noun}", f"a {attributes['mood']} {noun}", 1)
    if style is not None:
        said += f" in the style of {'' if filtered == 'plain' else filtered + ' '}{word(style)}"
    return said


def filtered(images: Tensor, name: str) -> Tensor:
    """A batch [B, 3, H, W] in [0, 1] put through one filter."""
    if name == "plain":
        return images
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = (images * weights).sum(1, keepdim=True)
    edges = max_pool2d(grey, 3, 1, 1) + max_pool2d(-grey, 3, 1, 1)
    ink = (1.6 * edges).clamp(0, 1)

    def between(dark: Sequence[float], light: Sequence[float], amount: Tensor) -> Tensor:
        low, high = (images.new_tensor(colour).view(1, 3, 1, 1) for colour in (dark, light))
        return low + (high - low) * amount

    return {
        "grey": lambda: grey.expand_as(images),
        "sepia": lambda: between((0.2, 0.12, 0.05), (1.0, 0.92, 0.76), grey),
        "negative": lambda: 1 - images,
        "outline": lambda: (1 - ink).expand_as(images),
        "blueprint": lambda: between((0.08, 0.22, 0.55), (0.95, 0.97, 1.0), ink),
        "faded": lambda: 0.55 + 0.45 * images,
        "crimson": lambda: between((0.25, 0.0, 0.05), (1.0, 0.85, 0.8), grey),
    }[name]()


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
