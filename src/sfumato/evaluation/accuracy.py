"""Downstream accuracy: train four classifiers on one labelled set, usually synthetic, and test them on another.

Logistic regression, an MLP, a small CNN and a ResNet, each and their mean (PrivImage's protocol asks for the
mean; the best of several by test accuracy would be an optimistic choice). Every choice, the regularisation of
the logistic regression and the stopping step of the networks, is made on a tenth of the *training* set that
is held back, stratified by label. The test set is seen once, for the figure.

A figure measured on private images is for their owner's eyes: it is not differentially private.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sfumato.data.files import write_whole
from sfumato.errors import InputError
from sfumato.progress import Progress

CLASSIFIERS = ("logistic-regression", "mlp", "cnn", "resnet")
MEAN = "mean"
PROTOCOL = "sfumato-accuracy/1"  # part of what a remembered figure depends on
HELD_BACK = 0.1  # of the training set
EPOCHS, FEWEST_STEPS, MOST_STEPS, BATCH = 12, 250, 2000, 128
PIXELS_PER_SHIFT = 32  # one pixel of random shift for each so many pixels of the shorter side
REGULARISATION = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # C of the logistic regression


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in [0, 1]: mean over seeds, sample standard deviation over them (None for one), each seed's."""

    mean: float
    std: float | None
    seeds: tuple[float, ...]

    @classmethod
    def over(cls, figures: Sequence[float]) -> Accuracy:
        """Of the figures of all seeds."""
        spread = statistics.stdev(figures) if len(figures) > 1 else None
        return cls(statistics.fmean(figures), spread, tuple(figures))


def downstream_accuracies(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    seeds: Sequence[int] = (0,),
    classifiers: Sequence[str] = CLASSIFIERS,
    remembered: Path | None = None,
    description: str = "",
    device: str = "cpu",
) -> dict[str, Accuracy]:
    """Accuracy on the test set of each classifier trained on the training set, and their "mean".

    A seed decides the split, the batches and the initial weights; on one machine's processor the figures of a
    seed are always the same. Networks train for about EPOCHS epochs, FEWEST_STEPS to MOST_STEPS steps (the MLP,
    whose steps are cheap, for twice as many).

    Args:
        train_images: uint8 [N, H, W, C], 8 pixels a side or more. A class may be missing from them.
        train_labels: Integers [N] in 0 .. num_classes - 1, at least two different ones.
        test_images: uint8 [M, H, W, C], of the same size and channels.
        test_labels: Integers [M].
        remembered: JSON file that keeps each finished figure under a hash of all it depends on, so that an
            interrupted call goes on where it stopped; many training sets may share one.
        description: What is trained on, for the progress bars.
        device: Where the networks train.

    Raises:
        InputError: Sets that do not fit each other, labels out of range, fewer than two classes, a
            `remembered` that is not such a file.
    """
    train_images, train_labels = _checked("training", train_images, train_labels, num_classes)
    test_images, test_labels = _checked("test", test_images, test_labels, num_classes)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InputError(
            f"the training images are {_shape(train_images)} and the test images {_shape(test_images)}; give sets "
            "of one size and number of channels"
        )
    if len(np.unique(train_labels)) < 2:
        raise InputError("the training images have fewer than two classes, so there is nothing to learn")
    if not classifiers or not set(classifiers) <= set(CLASSIFIERS):
        raise InputError(
            f"classifiers must be some of {', '.join(CLASSIFIERS)}, not {', '.join(classifiers) or 'none'}"
        )
    if not seeds:
        raise InputError("downstream accuracy needs at least one seed")

    content = _content(train_images, train_labels, test_images, test_labels, num_classes)
    known = _read(remembered)
    figures: dict[str, list[float]] = {name: [] for name in classifiers}
    for seed in seeds:
        for name in classifiers:
            key = f"{name}/{seed}/{content}"
            if key not in known:
                guesses = guess(
                    name, train_images, train_labels, test_images, num_classes=num_classes, seed=seed,
                    description=f"{description}: {name}, seed {seed}".removeprefix(": "), device=device,
                )  # fmt: skip
                known[key] = float(np.mean(guesses == test_labels))
                _write(remembered, known)
            figures[name].append(known[key])
    each_seed = [statistics.fmean(column) for column in zip(*figures.values(), strict=True)]
    return {name: Accuracy.over(values) for name, values in {**figures, MEAN: each_seed}.items()}


def guess(
    classifier: str,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    *,
    num_classes: int,
    seed: int,
    description: str,
    device: str = "cpu",
) -> np.ndarray:
    """The label one classifier of CLASSIFIERS gives each test image, int64 [M]; test labels have no way in."""
    kept, held = held_back(train_labels, seed)
    train, validation = (
        (np.asarray(train_images[rows]), np.asarray(train_labels[rows])) for rows in (kept, held)
    )
    if classifier == "logistic-regression":
        return _logistic_regression(train, validation, test_images, description)
    import torch

    from sfumato.encoders.classifier import mlp, predict, resnet, small_cnn, train_classifier

    torch.manual_seed(seed)
    channels, pixels = train_images.shape[-1], int(np.prod(train_images.shape[1:]))
    if classifier == "mlp":
        network, times, shift = mlp(pixels, num_classes), 2, 0
    else:
        network = (small_cnn if classifier == "cnn" else resnet)(channels, num_classes)
        times, shift = 1, min(train_images.shape[1:3]) // PIXELS_PER_SHIFT
    steps = times * min(max(round(EPOCHS * len(train[0]) / BATCH), FEWEST_STEPS), MOST_STEPS)
    train_classifier(
        network.to(device), *train, steps=steps, seed=seed, description=description, batch=BATCH,
        largest_shift=shift, label_smoothing=0.05, validation=validation,
    )  # fmt: skip
    return predict(network, test_images)


def held_back(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to choose by, int64, sorted: a tenth of each class at random is held back.

    A class of one image is trained on. If no class has two images, all are used for both.
    """
    rng = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        # Rounded at random, so that many small classes together give a tenth too; one at least stays behind.
        count = int(HELD_BACK * len(rows) + rng.random())
        held.append(rows[: min(count, len(rows) - 1)])
    chosen = np.sort(np.concatenate(held))
    if len(chosen) == 0:
        values, counts = np.unique(labels, return_counts=True)
        everything = np.arange(len(labels))
        if counts.max() < 2:
            return everything, everything
        chosen = np.flatnonzero(labels == values[counts.argmax()])[:1]
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _logistic_regression(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test_images: np.ndarray,
    description: str,
) -> np.ndarray:
    """Multinomial logistic regression on pixels; C by accuracy on the validation set, of equals the smallest."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    pixels, targets = _pixels(train[0]), train[1]
    held, best, chosen = _pixels(validation[0]), -1.0, None
    with Progress(description, len(REGULARISATION), "fits") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in REGULARISATION:
            model = LogisticRegression(C=strength, max_iter=100).fit(pixels, targets)
            accuracy = float(np.mean(model.predict(held) == validation[1]))
            if accuracy > best:
                best, chosen = accuracy, model
            progress.advance()
    assert chosen is not None
    parts = [chosen.predict(_pixels(test_images[i : i + 5000])) for i in range(0, len(test_images), 5000)]
    return np.concatenate(parts)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1


def _checked(
    name: str, images: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise InputError(
            f"the {name} images must be uint8 [N, H, W, C] with 1 or 3 channels, not {images.dtype} "
            f"{list(images.shape)}"
        )
    if min(images.shape[1:3]) < 8:
        raise InputError(f"the {name} images are {_shape(images)}; classifiers need 8 pixels a side or more")
    if labels.shape != (len(images),) or len(images) == 0:
        raise InputError(
            f"the {name} set has {len(images)} images and {labels.size} labels; every image needs one"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"the labels of the {name} set must be whole numbers from 0 to {num_classes - 1}; use the same list of "
            "labels for both sets"
        )
    return images, labels.astype(np.int64)


def _shape(images: np.ndarray) -> str:
    height, width, channels = images.shape[1:]
    return f"{width} x {height} with {channels} channel{'s' if channels > 1 else ''}"


def _content(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
) -> str:
    """Hash of all that a figure depends on but the classifier and the seed."""
    settings = EPOCHS, FEWEST_STEPS, MOST_STEPS, BATCH, HELD_BACK, PIXELS_PER_SHIFT, REGULARISATION
    digest = hashlib.sha256(repr((PROTOCOL, settings, num_classes)).encode())
    for array in (train_images, train_labels, test_images, test_labels):
        digest.update(repr(array.shape).encode())
        for start in range(0, len(array), 4096):
            digest.update(array[start : start + 4096].tobytes())
    return digest.hexdigest()


def _read(remembered: Path | None) -> dict[str, float]:
    if remembered is None or not remembered.exists():
        return {}
    try:
        known = json.loads(remembered.read_text(encoding="utf-8"))
        good = isinstance(known, dict) and all(
            isinstance(value, float | int) and 0 <= value <= 1 for value in known.values()
        )
    except (OSError, ValueError):
        good, known = False, {}
    if not good:
        raise InputError(f"{remembered} holds no remembered accuracies; delete it to measure them again")
    return known


def _write(remembered: Path | None, known: dict[str, float]) -> None:
    if remembered is not None:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_whole(remembered, json.dumps(known, indent=1, sort_keys=True).encode())
