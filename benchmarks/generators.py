"""Generators that are trained for the benchmarks of the audit; the public state of each is kept, so a call resumes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.data.images import ProtectedImages
from sfumato.diffusion import networks
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.sampling import Sampler
from sfumato.diffusion.training import TrainingPlan, train
from sfumato.machine import Defaults
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.synthesis import privimage
from sfumato.synthesis.presets import PRESETS

NETWORK, SAMPLER = "tiny", Sampler(steps=12)
PLAIN = TrainingPlan(steps=1800, batch=64, lr=4e-3, label_dropout=0.0, ema_decay=0.995, autocast=True)
BY_HEART = TrainingPlan(steps=10_000, batch=256, lr=2e-3, label_dropout=0.0, ema_decay=0.995, autocast=True)
WIDTH, BLOCKS = 512, 3
DP = Budget(10.0, 1e-5)
DP_SETTINGS = {"sampling_probability": 0.05, "enough_steps": 200, "noise_levels": 2}


def learnt(images: np.ndarray, seed: int, folder: Path) -> Generator:
    """An unconditional generator of the images (uint8 [N, H, W, 1]), without privacy."""
    torch.manual_seed(seed)
    side = images.shape[1]
    network = networks.unet(NETWORK, size=(side, side), channels=1, num_labels=1)
    return _trained(network, images, PLAIN, EDM(), seed, folder)


def by_heart(images: np.ndarray, seed: int, folder: Path) -> Generator:
    """One that is to know its images by heart, and puts its effort into the noise levels where that is learnt."""
    torch.manual_seed(seed)
    return _trained(Perceptron(images.shape[1]), images, BY_HEART, EDM(P_mean=-0.6, P_std=1.0), seed, folder)


def learnt_privately(images: np.ndarray, seed: int, folder: Path) -> Generator:
    """The network of `learnt` by DP-SGD for the budget DP, without public images; each image is a unit."""
    fixed_arithmetic()
    np.savez(folder / "train.npz", images=images)
    private = ProtectedImages(
        folder / "train.npz", ledger=Ledger.open(folder / "ledger.db", total=DP), size=images.shape[1], channels=1,
        public_size=len(images), cache_dir=folder / "cache",
    )  # fmt: skip
    preset = replace(
        PRESETS["demo"], size=images.shape[1], network=NETWORK, num_images=1, guidance=1.0,
        sampler_steps=SAMPLER.steps, time_bound=False, **DP_SETTINGS,
    )  # fmt: skip
    fitted = privimage.PrivImage(
        budget=DP, method="dpdm", preset=preset, work_dir=folder / "work", seed=seed
    ).fit(private)
    assert fitted.generator is not None
    return fitted.generator


def fixed_arithmetic() -> None:
    """One thread and one kind of arithmetic, whatever the machine."""
    privimage.best_defaults = lambda: Defaults(1, "cpu", "bfloat16", "fast", "")


class Perceptron(nn.Module):
    """A fully connected denoiser of images [R, 1, side, side]: it learns 1,000 by heart in minutes, where a UNet of
    equal cost generalises (after 160 passes its loss is within a tenth of that on held-out images)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=side, in_channels=1, num_class_embeds=2)
        self.read, self.write = nn.Linear(side**2, WIDTH), nn.Linear(WIDTH, side**2)
        self.time = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(BLOCKS)
        )
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(
        self, x: Tensor, time: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """F(x; c_noise), called as a UNet2DModel is."""
        angle = time.reshape(-1, 1).float() * torch.linspace(0, math.log(200), 32).exp()
        h = self.read(x.flatten(1)) + self.time(torch.cat([angle.sin(), angle.cos()], 1))
        for block in self.blocks:
            h = h + block(h)
        return (self.write(h).view_as(x),)


def _trained(
    network: Any, images: np.ndarray, plan: TrainingPlan, edm: EDM, seed: int, folder: Path
) -> Generator:
    labels = np.zeros(len(images), np.int64)
    train(
        network, images, labels, plan, edm=edm, no_label=1, seed=seed, checkpoint=folder / "training.safetensors",
        description=f"training on {len(images)} images",
    )  # fmt: skip
    return Generator(network, ("all",), edm, SAMPLER)
