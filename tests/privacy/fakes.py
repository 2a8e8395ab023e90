"""Stand-ins of DP-SGD's neighbours, and a tiny problem for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.privacy.budget import Budget
from sfumato.privacy.dp_sgd import DPSGDPlan
from sfumato.privacy.ledger import Ledger


class FakePrivate:
    """`units` units of one 4x4 image each; with `groups`, units of one to three images."""

    def __init__(self, units: int, *, groups: bool = False, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        sizes = 1 + draw.integers(0, 3, units) if groups else np.ones(units, dtype=np.int64)
        ends = np.cumsum(sizes)
        self._units = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        total = int(ends[-1]) if units else 0
        self._images = draw.integers(0, 256, (total, 4, 4, 1), dtype=np.uint8)
        self._labels = draw.integers(0, 3, total)
        self.size, self.channels, self.label_names = (4, 4), 1, ("a", "b", "c")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.label = nn.Conv2d(1, 3, 3, padding=1), nn.Embedding(3, 3)
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(x)).mean((2, 3)) + self.label(y))[:, 0]


def make_rows(images: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    sigma = torch.rand(len(images), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return {"x": images + sigma[:, None, None, None] * noise, "y": labels, "sigma": sigma}


def plain_rows(images: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": images, "y": labels, "sigma": torch.zeros(len(images))}


def row_loss(call, rows) -> Tensor:
    return (call(rows["x"], rows["y"]) - 1 - rows["sigma"]).square()


def plan(**changes) -> DPSGDPlan:
    settings = {
        "sampling_probability": 0.5,
        "steps": 6,
        "noise_multiplier": 1.0,
        "clip_norm": 0.1,
        "rows_per_unit": 2,
        "expected_batch": 10.0,
    }
    return DPSGDPlan(**(settings | changes))  # type: ignore[arg-type]


def reservation(folder: Path, chosen: DPSGDPlan):
    ledger = Ledger.open(folder / "test.ledger.db", total=Budget(epsilon=1e6, delta=1e-4))
    return ledger.reserve("test", [chosen.planned("test")], delta=1e-5, key="test")


class FakeReservation:
    """Counts what began; no ledger."""

    id = "fake"

    def __init__(self) -> None:
        self.log: list[str] = []

    def begin(self, mechanism, event, units=1) -> None:
        self.log.append("begin")

    def begun(self, mechanism) -> int:
        return self.log.count("begin")
