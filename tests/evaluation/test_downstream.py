"""The downstream classifier: learns what can be learnt, nothing from random labels, the same every time."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from sfumato.encoders.classifier import train_classifier
from sfumato.evaluation import downstream
from sfumato.evaluation.downstream import downstream_accuracy


def bars(count, seed, *, channels=1, size=8):
    """Images uint8 with a bright bar, upright (label 0) or level (label 1), at a random place in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.integers(0, 90, (count, size, size, channels), np.uint8)
    for image, label, at in zip(images, labels, rng.integers(0, size, count), strict=True):
        if label:
            image[at] = 255
        else:
            image[:, at] = 255
    return images, labels


@pytest.mark.parametrize("channels", [1, 3])
def test_it_learns_what_can_be_learnt(channels):
    accuracy = downstream_accuracy(
        *bars(300, 1, channels=channels), *bars(200, 2, channels=channels), num_classes=2, steps=20
    )
    assert accuracy > 0.95


def test_random_labels_teach_nothing():
    images, labels = bars(300, 1)
    shuffled = np.random.default_rng(5).permutation(labels)
    accuracy = downstream_accuracy(images, shuffled, *bars(600, 2), num_classes=2, steps=15)
    assert abs(accuracy - 0.5) < 0.2


def test_labels_that_are_swapped_give_the_complement():
    images, labels = bars(300, 1)
    assert downstream_accuracy(images, 1 - labels, *bars(200, 2), num_classes=2, steps=20) < 0.05


def test_the_seed_decides():
    train, test = bars(200, 1), bars(300, 2)
    first, again, other = (
        downstream_accuracy(*train, *test, num_classes=2, steps=3, seed=seed) for seed in (0, 0, 1)
    )
    torch.manual_seed(99)
    assert first == again == downstream_accuracy(*train, *test, num_classes=2, steps=3, seed=0)
    assert first != other


def test_a_class_that_is_never_shown_is_never_guessed():
    images, labels = bars(200, 1)
    only = labels == 0
    test_images, test_labels = bars(300, 2)
    accuracy = downstream_accuracy(
        images[only], labels[only], test_images, test_labels, num_classes=2, steps=12
    )
    assert accuracy == pytest.approx(np.mean(test_labels == 0))


def test_its_training_images_are_left_as_they_are():
    images, labels = bars(100, 1)
    before = images.copy()
    downstream_accuracy(images, labels, images, labels, num_classes=2, steps=3)
    assert np.array_equal(images, before)


def test_the_protocol_is_what_published_figures_were_made_with(monkeypatch):
    given = {}

    def noted(network, images, labels, **settings):
        given.update(settings)
        return network

    monkeypatch.setattr(downstream, "train_classifier", noted)
    downstream_accuracy(*bars(20, 1), *bars(20, 2), num_classes=2, seed=7, description="x")
    assert given == {"steps": 800, "seed": 7, "label_smoothing": 0.05, "description": "x: training"}
    defaults = inspect.signature(train_classifier).parameters
    assert (defaults["batch"].default, defaults["lr"].default, defaults["largest_shift"].default) == (
        128,
        3e-3,
        2,
    )
