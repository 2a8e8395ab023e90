"""The semantic query function: a classifier of public classes, trained on public images only (PrivImage, 4.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.encoders.classifier import query_network, to_float, train_classifier


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
    train_classifier(
        network, images, labels, steps=steps, seed=seed, batch=batch, lr=lr, description="query classifier"
    )
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
