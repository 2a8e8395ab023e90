"""From noise to images: Heun, DDIM and stochastic ("churn") samplers of the EDM paper (arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import InputError

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""D(x [R, C, H, W], sigma [R]) -> clean estimate of x, same shape."""


@dataclass(frozen=True)
class Sampler:
    """How to draw images.

    `kind`: "heun" is algorithm 1 (second order, two network calls a step), "ddim" its first-order step, which
    is DDIM (Song et al. 2021) in EDM's parametrisation, "churn" is algorithm 2 (fresh noise at every step).
    """

    kind: Literal["heun", "ddim", "churn"] = "heun"
    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 40.0
    S_min: float = 0.05
    S_max: float = 50.0
    S_noise: float = 1.003

    def __post_init__(self) -> None:
        if self.kind not in ("heun", "ddim", "churn"):
            raise InputError(f"unknown sampler {self.kind!r}: choose heun, ddim or churn")
        if self.steps < 2 or not 0 < self.sigma_min < self.sigma_max:
            raise InputError("a sampler needs at least 2 steps and 0 < sigma_min < sigma_max")


def noise_levels(sampler: Sampler) -> Tensor:
    """The decreasing levels t_0 = sigma_max ... t_{N-1} = sigma_min, t_N = 0 of eq. 5; float64 [steps + 1]."""
    ramp = torch.linspace(0, 1, sampler.steps, dtype=torch.float64)
    low, high = sampler.sigma_min ** (1 / sampler.rho), sampler.sigma_max ** (1 / sampler.rho)
    return torch.cat([(high + ramp * (low - high)) ** sampler.rho, torch.zeros(1, dtype=torch.float64)])


def guided(with_label: Denoiser, without_label: Denoiser, weight: float) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): D_none + weight (D_label - D_none); 1 is no guidance."""
    if weight == 1:
        return with_label

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        plain = without_label(x, sigma)
        return plain + weight * (with_label(x, sigma) - plain)

    return denoise


@torch.no_grad()
def sample(
    denoise: Denoiser,
    shape: tuple[int, ...],
    sampler: Sampler,
    generator: torch.Generator,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw images [R, C, H, W] in about [-1, 1] from Gaussian noise; `generator` holds the public randomness."""
    levels = noise_levels(sampler).tolist()
    x = torch.randn(shape, generator=generator).to(device) * levels[0]

    def at(level: float) -> Tensor:
        return torch.full((shape[0],), level, device=device)

    for level, following in pairwise(levels):
        if sampler.kind == "churn" and sampler.S_min <= level <= sampler.S_max:
            raised = level * (1 + min(sampler.S_churn / sampler.steps, 2**0.5 - 1))
            fresh = torch.randn(shape, generator=generator).to(device) * sampler.S_noise
            x = x + (raised**2 - level**2) ** 0.5 * fresh
            level = raised
        slope = (x - denoise(x, at(level))) / level
        moved = x + (following - level) * slope
        if following > 0 and sampler.kind != "ddim":
            slope_there = (moved - denoise(moved, at(following))) / following
            moved = x + (following - level) * (slope + slope_there) / 2
        x = moved
    return x
