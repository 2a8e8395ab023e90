"""The quick figure of downstream accuracy: one small CNN, trained on one labelled set and tested on another.

The protocol is fixed so that figures can be compared: the same network, the same number of training steps
whatever the size of the training set, light shifts as the only augmentation, no model selection. `accuracy`
holds the full protocol. A figure measured on private images is for their owner's eyes: it is not
differentially private.
"""

from __future__ import annotations

import numpy as np
import torch

from sfumato.encoders.classifier import predict, small_cnn, train_classifier

STEPS = 800


def downstream_accuracy(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    seed: int = 0,
    steps: int = STEPS,
    description: str = "classifier",
) -> float:
    """Accuracy in [0, 1] on the test set of a small CNN trained on the training set.

    Images are uint8 [N, H, W, C] of one size; labels int64 [N] below `num_classes`.
    """
    torch.manual_seed(seed)
    network = small_cnn(train_images.shape[-1], num_classes)
    train_classifier(
        network, train_images, train_labels, steps=steps, seed=seed, label_smoothing=0.05,
        description=f"{description}: training",
    )  # fmt: skip
    return float(np.mean(predict(network, test_images) == np.asarray(test_labels)))
