"""Classifier guidance: draw from p(x) p(c | x)^scale instead of p(x), with any sampler.

In EDM coordinates, x = x_0 + sigma n, the score is (D(x; sigma) - x) / sigma^2, so adding scale * g to it,
g = grad_x log p(c | x, sigma), adds scale * sigma^2 * g to the denoiser. For a network in another
parametrisation this is Dhariwal & Nichol (2021, arXiv 2105.05233), algorithm 2: with x_t = sqrt(abar) x,
grad_{x_t} = g / sqrt(abar), and eps - scale * sqrt(1 - abar) * grad_{x_t} = eps - scale * sigma * g.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sfumato.diffusion.sampling import Denoiser

Gradient = Callable[[Tensor, Tensor, np.ndarray], Tensor]
"""grad_x log p(c_row | x, sigma) in EDM coordinates: (x [R, C, H, W], sigma [R], rows int64 [R]) -> [R, C, H, W].

`rows` are the positions of these images in the whole call, so that every image may have its own condition.
"""


def guided_denoiser(denoise: Denoiser, rows: np.ndarray, gradient: Gradient, scale: float) -> Denoiser:
    """D + scale * sigma^2 * g at every network call (both calls of a Heun step)."""

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma) + _pull(gradient, scale, x, sigma, rows)

    return guided


def guided_output(
    output: Tensor,
    c_out: Tensor,
    gradient: Gradient,
    scale: float,
    x: Tensor,
    sigma: Tensor,
    rows: np.ndarray,
) -> Tensor:
    """The network output F' whose denoiser c_skip x + c_out F' is D + scale * sigma^2 * g.

    x: in EDM coordinates [R, C, H, W]. sigma: [R]. c_out: what one unit of output moves D by, broadcastable
    to x; -sigma for a network that predicts eps, and then F' = eps - scale * sigma * g.
    """
    return output + _pull(gradient, scale, x, sigma, rows).to(output.dtype) / c_out


def _pull(gradient: Gradient, scale: float, x: Tensor, sigma: Tensor, rows: np.ndarray) -> Tensor:
    """scale * sigma^2 * g; where the gradient overflows, 0."""
    with torch.enable_grad():  # samplers run without
        g = gradient(x.detach(), sigma, rows).detach()
    return scale * sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2 * g.nan_to_num(0.0, 0.0, 0.0)
