"""Training images that cost nothing: public images with sensitive labels, and released mean images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sfumato.data.images import PublicImages
from sfumato.synthesis.selection import Selection


class Labelled(NamedTuple):
    """images: uint8 [N, H, W, C]. labels: int64 [N], sensitive labels. weights: [N], how often each is drawn."""

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def selected(public: PublicImages, selection: Selection) -> Labelled:
    """The images of the selected classes, each under the label that its class was selected for."""
    rows, labels, weights = selection.relabel(public.labels)
    return Labelled(np.asarray(public.images)[rows], labels, weights)


def all_of_them(public: PublicImages, num_labels: int, seed: int) -> Labelled:
    """All public images, each public class under one label, drawn blindly; without classes each image by itself.

    So training learns to tell labels apart, while nothing says which class resembles which label.
    """
    classes = len(public.label_names or ())
    if classes < num_labels or (public.labels < 0).any():
        return with_random_labels(public, num_labels, seed)
    label_of = np.random.default_rng(seed).permutation(classes) % num_labels
    return Labelled(public.images, label_of[np.asarray(public.labels)], np.ones(len(public)))


def with_random_labels(public: PublicImages, num_labels: int, seed: int) -> Labelled:
    """All public images, each under a label of its own drawn blindly: the label means nothing."""
    labels = np.random.default_rng(seed).integers(num_labels, size=len(public))
    return Labelled(public.images, labels, np.ones(len(public)))


def by_name(public: PublicImages, label_names: tuple[str, ...], seed: int) -> Labelled:
    """The classes that bear a label's name; where a label has none, all images under random labels."""
    names = list(public.label_names or ())
    if not all(name in names for name in label_names):
        return with_random_labels(public, len(label_names), seed)
    classes = tuple((names.index(name),) for name in label_names)
    return selected(public, Selection(classes, tuple((1.0,) for _ in label_names)))


def centers(images: Labelled | None, num_labels: int) -> np.ndarray | float:
    """What mean images may be expected to look like: the weighted mean of each label's public images, float
    [L, 1, H, W, C] in [-1, 1]; grey (0) without public images."""
    if images is None:
        return 0.0
    per_label = np.zeros((num_labels, 1, *images.images.shape[1:]))
    for label in range(num_labels):
        mine = images.labels == label
        share = (images.weights[mine] / images.weights[mine].sum()).reshape(-1, 1, 1, 1)
        per_label[label, 0] = (images.images[mine] * share).sum(0) / 127.5 - 1
    return per_label


def with_means(means: np.ndarray, images: Labelled | None) -> Labelled:
    """Mean images (float [L, m, H, W, C] in [-1, 1]) as training images, half of each batch beside public ones."""
    flat = as_bytes(means.reshape(-1, *means.shape[2:]))
    labels = np.repeat(np.arange(means.shape[0]), means.shape[1])
    weights = np.full(len(flat), 1.0 / len(flat))
    if images is None:
        return Labelled(flat, labels, weights)
    return Labelled(
        np.concatenate([images.images, flat]),
        np.concatenate([images.labels, labels]),
        np.concatenate([images.weights / images.weights.sum(), weights]),
    )


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1] (clipped) to uint8, any shape."""
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)
