"""Downstream accuracy: train a classifier on one labelled image set, test it on another.

The protocol is fixed so that figures can be compared: the same small network, the same number of training
steps whatever the size of the training set, light shifts as the only augmentation, no model selection.
A figure measured on private images is for their owner's eyes: it is not differentially private.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.diffusion.generator import to_float
from sfumato.progress import Progress

STEPS = 800
BATCH = 128
LARGEST_SHIFT = 2  # pixels


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
    order = np.random.default_rng(seed)
    network = _small_cnn(train_images.shape[-1], num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    targets = torch.from_numpy(np.asarray(train_labels, np.int64))
    network.train()
    with Progress(f"{description}: training", steps, "steps") as progress:
        for _ in range(steps):
            rows = order.integers(len(train_images), size=BATCH)
            loss = F.cross_entropy(
                network(_shifted(to_float(train_images[rows]), order)), targets[rows], label_smoothing=0.05
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    network.eval()
    with torch.no_grad():
        guesses = [
            network(to_float(test_images[i : i + 500])).argmax(1).numpy()
            for i in range(0, len(test_images), 500)
        ]
    return float(np.mean(np.concatenate(guesses) == np.asarray(test_labels)))


def _small_cnn(channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(7),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, num_classes),
    )  # fmt: skip


def _shifted(images: torch.Tensor, order: np.random.Generator) -> torch.Tensor:
    dy, dx = (int(d) for d in order.integers(-LARGEST_SHIFT, LARGEST_SHIFT + 1, size=2))
    return torch.roll(images, (dy, dx), (2, 3))
