from types import SimpleNamespace

import numpy as np
import pytest

from sfumato.synthesis.public_images import (
    Labelled,
    all_of_them,
    as_bytes,
    by_name,
    centers,
    selected,
    with_means,
    with_random_labels,
)
from sfumato.synthesis.selection import Selection


def public(names=("cat", "dog", "bird"), per_class=4):
    labels = np.repeat(np.arange(len(names)), per_class)
    images = np.full((len(labels), 2, 2, 1), 0, np.uint8) + labels.astype(np.uint8).reshape(-1, 1, 1, 1) * 50
    return Labels(images=images, labels=labels, label_names=names)


class Labels(SimpleNamespace):
    def __len__(self):
        return len(self.images)


def test_selected_classes_come_under_the_labels_they_were_selected_for():
    images, labels, weights = selected(public(), Selection(((2,), (0,)), ((1.0,), (1.0,))))
    assert (
        sorted(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))
        == [(0, 1)] * 4 + [(100, 0)] * 4
    )
    assert weights == pytest.approx(0.25)


def test_random_labels_say_nothing():
    images, labels, weights = with_random_labels(public(per_class=500), 2, seed=0)
    assert len(images) == 1500 and (weights == 1).all()
    for shown in (0, 50, 100):
        assert 0.4 < labels[images[:, 0, 0, 0] == shown].mean() < 0.6


def test_all_images_keep_their_class_together_under_a_blind_label():
    names = tuple(str(number) for number in range(5))
    images, labels, _ = all_of_them(public(names), 2, seed=0)
    assert len(images) == 20
    label_of = [set(labels[images[:, 0, 0, 0] == 50 * number].tolist()) for number in range(5)]
    assert all(len(found) == 1 for found in label_of) and {2, 3} == {
        sum(found == {label} for found in label_of) for label in (0, 1)
    }
    assert not np.array_equal(labels, all_of_them(public(names), 2, seed=3).labels)


@pytest.mark.parametrize("unlabelled", [False, True])
def test_without_enough_classes_labels_are_random(unlabelled):
    few = public(("cat",), per_class=600)
    if unlabelled:
        few = public(per_class=600)
        few.labels = np.full(1800, -1)
    assert 0.4 < all_of_them(few, 2, seed=0).labels.mean() < 0.6


def test_names_are_matched_only_when_every_label_has_one():
    images, labels, _ = by_name(public(), ("dog", "cat"), seed=0)
    assert len(images) == 8 and set(images[labels == 0].ravel().tolist()) == {50}
    assert len(by_name(public(), ("dog", "fish"), seed=0).images) == 12


def test_centers_are_the_weighted_means_of_each_label():
    images = np.array([0, 255, 255], np.uint8).reshape(3, 1, 1, 1)
    found = centers(Labelled(images, np.array([0, 0, 1]), np.array([3.0, 1.0, 5.0])), 2)
    assert np.ravel(found) == pytest.approx([-0.5, 1.0])
    assert centers(None, 2) == 0.0


def test_mean_images_are_half_of_what_is_drawn_beside_public_ones():
    means = np.zeros((2, 3, 2, 2, 1), np.float32)
    alone = with_means(means, None)
    assert alone.labels.tolist() == [0, 0, 0, 1, 1, 1] and alone.weights.sum() == pytest.approx(1)
    mixed = with_means(means, all_of_them(public(), 2, seed=0))
    assert len(mixed.images) == 18 and mixed.weights[12:].sum() == pytest.approx(mixed.weights.sum() / 2)
    assert mixed.images[12:].tolist() == np.full((6, 2, 2, 1), 128).tolist()


def test_floats_become_bytes():
    assert as_bytes(np.array([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
