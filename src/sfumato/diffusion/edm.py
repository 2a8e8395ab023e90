"""What a diffusion model is here: the EDM denoiser and its loss (Karras et al. 2022, arXiv 2206.00364).

Symbols follow the paper: x is a clean image, n unit Gaussian noise, sigma the noise level, F the raw network,
D the preconditioned denoiser (eq. 7, table 1). Images are float tensors [R, C, H, W] in [-1, 1], sigma is
[R], labels are int64 [R]; the last class index of a network stands for "no label".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class EDM:
    """Preconditioning and noise-level distribution; the defaults are PrivImage's (sigma_data = sqrt(1/3))."""

    sigma_data: float = 3.0**-0.5
    P_mean: float = -1.2
    P_std: float = 1.2

    def denoise(self, net: Network, x_noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), eq. 7, with c_noise = ln(sigma) / 4."""
        s = sigma.reshape(-1, *[1] * (x_noisy.ndim - 1))
        total = s**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = s * self.sigma_data / total.sqrt()
        c_in = 1 / total.sqrt()
        F = net(c_in * x_noisy, sigma.log() / 4, class_labels=labels, return_dict=False)[0]
        return c_skip * x_noisy + c_out * F.to(x_noisy.dtype)

    def draw_sigma(self, rows: int, generator: torch.Generator) -> Tensor:
        """Noise levels with ln(sigma) ~ N(P_mean, P_std^2); [rows], on the generator's device."""
        return (
            self.P_mean + self.P_std * torch.randn(rows, generator=generator, device=generator.device)
        ).exp()

    def rows(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        *,
        no_label: int,
        label_dropout: float,
    ) -> dict[str, Tensor]:
        """Training rows for `row_loss`: each image gets its own noise level, noise and label dropout."""
        device = generator.device
        dropped = torch.rand(len(labels), generator=generator, device=device) < label_dropout
        return {
            "x": images,
            "n": torch.randn(images.shape, generator=generator, device=device),
            "sigma": self.draw_sigma(len(images), generator),
            "labels": torch.where(dropped, no_label, labels),
        }

    def row_loss(self, net: Network, rows: dict[str, Tensor]) -> Tensor:
        """lambda(sigma) * mean over pixels of (D(x + sigma n) - x)^2 for each row, eq. 2 and table 1; [R].

        lambda = 1 / c_out^2 makes every noise level weigh the same at initialisation. Rows do not interact.
        """
        x, sigma = rows["x"], rows["sigma"]
        noise = rows["n"] * sigma.reshape(-1, *[1] * (x.ndim - 1))
        error = self.denoise(net, x + noise, sigma, rows["labels"]) - x
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return weight * error.square().mean(tuple(range(1, x.ndim)))
