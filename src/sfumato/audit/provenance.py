"""What an attack's parts were made from, as hashes: images, weights, and a model with the way it is drawn from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from sfumato.data.records import fingerprint
from sfumato.evaluation.image_sets import pixel_digests

if TYPE_CHECKING:
    from torch import nn

    from sfumato.audit.target import Model


def content_of(images: np.ndarray, description: str) -> str:
    """Hexadecimal SHA-256 over the pixels of images [N, H, W, C], their shape and their order.

    description: of the work, for the progress bar.
    """
    digests = pixel_digests(images, description)
    return hashlib.sha256(f"{images.shape} {images.dtype}".encode() + digests.tobytes()).hexdigest()


def weights_of(network: nn.Module) -> str:
    """Hexadecimal SHA-256 over names, shapes and values of a network's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def identity_of(model: Model) -> str:
    """Hexadecimal SHA-256 over a model's weights and settings (its `repr`): equal only if it draws the same."""
    return fingerprint([repr(model), weights_of(model.network)])
