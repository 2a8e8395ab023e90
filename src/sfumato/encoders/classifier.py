"""Small classifiers of labelled images, and the one loop that trains them.

The semantic query and every figure of downstream accuracy use this loop. Which images it is given decides
whether its result is private; the loop itself adds no noise.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.progress import Progress

LARGEST_SHIFT = 2  # pixels
_ROWS_AT_ONCE = 500


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] to float32 [B, C, H, W] in [-1, 1]; the same floats as generators are trained on."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def query_network(channels: int, num_classes: int) -> nn.Module:
    """The semantic query's classifier for images [B, channels, H, W] of any size from 8 pixels up."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 16, num_classes),
    )  # fmt: skip


def small_cnn(channels: int, num_classes: int) -> nn.Module:
    """Three convolutions and a linear layer, for images [B, channels, H, W] from 8 pixels up."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(7),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, num_classes),
    )  # fmt: skip


def mlp(pixels: int, num_classes: int) -> nn.Module:
    """Two hidden layers of 256 on the `pixels` = C H W values of an image [B, C, H, W]."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, num_classes),
    )  # fmt: skip


class _Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, arXiv 1512.03385, figure 2)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def resnet(channels: int, num_classes: int) -> nn.Module:
    """A ResNet of eight layers with widths 32, 64, 128, for images [B, channels, H, W] from 8 to 64 pixels."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        _Residual(32, 32, 1), _Residual(32, 64, 2), _Residual(64, 128, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes),
    )  # fmt: skip


def train_classifier(
    network: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    seed: int,
    description: str,
    batch: int = 128,
    lr: float = 3e-3,
    largest_shift: int = LARGEST_SHIFT,
    label_smoothing: float = 0.0,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    checks: int = 8,
) -> nn.Module:
    """Trains the network in place on images uint8 [N, H, W, C] and labels int64 [N]; returned in eval mode.

    AdamW with weight decay 1e-3 and one cycle of the learning rate up to `lr`. A batch is drawn with
    replacement and shifted, all alike, by up to `largest_shift` pixels. With `validation` (images and labels)
    the state with the best accuracy on it is kept, looked at `checks` times evenly; of equals the later.

    seed: for batches and shifts. Dropout draws from torch's own generator: seed that before the network is
    made, and both its parameters and its dropout follow.
    """
    order = np.random.default_rng(seed)
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    targets = torch.from_numpy(np.asarray(labels, np.int64))
    looks = {steps * (check + 1) // checks for check in range(checks)} if validation else set()
    best, kept = -1.0, {}
    network.train()
    with Progress(description, steps, "steps") as progress:
        for step in range(1, steps + 1):
            rows = order.integers(len(images), size=batch)
            shift = order.integers(-largest_shift, largest_shift + 1, size=2)
            shifted = torch.roll(to_float(images[rows]).to(device), (int(shift[0]), int(shift[1])), (2, 3))
            loss = F.cross_entropy(
                network(shifted), targets[rows].to(device), label_smoothing=label_smoothing
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if validation and step in looks:
                accuracy = float(np.mean(predict(network, validation[0]) == validation[1]))
                if accuracy >= best:
                    best, kept = accuracy, copy.deepcopy(network.state_dict())
                network.train()
            progress.advance()
    if kept:
        network.load_state_dict(kept)
    return network.eval()


@torch.no_grad()
def predict(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """The likeliest class of each image uint8 [N, H, W, C], int64 [N]; leaves the network in eval mode."""
    network.eval()
    device = next(network.parameters()).device
    parts = [
        network(to_float(images[start : start + _ROWS_AT_ONCE]).to(device)).argmax(1).cpu().numpy()
        for start in range(0, len(images), _ROWS_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
