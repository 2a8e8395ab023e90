"""The semantic query function: a classifier of public classes, trained on public images only (PrivImage, 4.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.diffusion.generator import to_float
from sfumato.progress import Progress

LARGEST_SHIFT = 2  # pixels


def query_network(channels: int, num_classes: int) -> nn.Module:
    """A small convolutional classifier for images [R, channels, H, W] of any size from 8 pixels up."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 16, num_classes),
    )  # fmt: skip


def train_query(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    steps: int,
    seed: int,
    saved: Path,
    batch: int = 128,
    lr: float = 3e-3,
) -> nn.Module:
    """Train the query function on public images (uint8 [N, H, W, C], labels int64 [N]), or load it from
    `saved`.

    Returned in eval mode: each image is classified by itself, whatever else is in the batch, which the
    sensitivity of the semantic query relies on.
    """
    torch.manual_seed(seed)
    network = query_network(images.shape[-1], num_classes)
    if saved.exists():
        network.load_state_dict(load_file(saved))
        return network.eval()
    order = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    targets = torch.from_numpy(labels)
    network.train()
    with Progress("query classifier", steps, "steps") as progress:
        for _ in range(steps):
            rows = order.integers(len(images), size=batch)
            shift = order.integers(-LARGEST_SHIFT, LARGEST_SHIFT + 1, size=2)
            picture = torch.roll(to_float(images[rows]), (int(shift[0]), int(shift[1])), (2, 3))
            loss = F.cross_entropy(network(picture), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    saved.parent.mkdir(parents=True, exist_ok=True)
    partial = saved.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, partial)
    partial.replace(saved)
    return network.eval()


def scores(network: nn.Module) -> Any:
    """The classifier as the query takes it: uint8 [B, H, W, C] -> float32 scores [B, classes]."""

    @torch.no_grad()
    def classify(images: np.ndarray) -> np.ndarray:
        return network(to_float(images)).numpy()

    return classify
