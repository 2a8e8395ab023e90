"""Unconditional and class-conditional diffusers pipelines, as a denoiser in EDM coordinates and a sampler.

The schedulers are diffusers' own: what is drawn without guidance is what the stock pipeline draws. How a
folder is opened: pipeline_folder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.audit.guidance import Gradient, guided_output
from sfumato.errors import InputError
from sfumato.progress import Progress

EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
BATCH, BATCH_PIXELS = 250, 250 * 64 * 64


@dataclass
class PipelineModel:
    """A UNet2DModel and the scheduler that it is drawn from with.

    network: diffusers' UNet2DModel, or a module called like one. steps: of the scheduler, for each image.
    label_names: of a class-conditional network, else None. Weights are frozen; `denoise` is differentiable in x.
    """

    network: Any
    scheduler: Any
    steps: int
    label_names: tuple[str, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        side = self.network.config.sample_size
        return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.network.config.in_channels

    @property
    def num_labels(self) -> int | None:
        """How many class embeddings the network has, None without."""
        return None if self.label_names is None else len(self.label_names)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def batch(self) -> int:
        """How many images are drawn together: at most 250, fewer above 64 x 64 pixels."""
        return max(1, min(BATCH, BATCH_PIXELS // (self.size[0] * self.size[1])))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The least and the greatest noise level that the network was trained on, in EDM coordinates."""
        if self.is_edm:
            return float(self.scheduler.config.sigma_min), float(self.scheduler.config.sigma_max)
        _, sigmas = self._table()
        return float(sigmas[0]), float(sigmas[-1])

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F(c_in x; t), EDM eq. 7 with the coefficients of this network.

        x: [R, C, H, W] = image + sigma * noise. sigma: [R]. labels: int64 [R] for a class-conditional network.
        The estimate is not clipped. Between the timesteps of a DDPM or DDIM scheduler t is interpolated in
        log sigma; outside them it stays at the end, only the scaling follows sigma.

        Raises:
            InputError: labels are missing, or the network knows none.
        """
        if (labels is None) != (self.label_names is None):
            need = "needs labels" if labels is None else "has no labels"
            raise InputError(f"this diffusers network {need}; nothing was audited")
        c_skip, c_out = self._coefficients(sigma, x)
        s = sigma.reshape(-1, 1, 1, 1).to(x.dtype)
        if self.is_edm:
            scaled, t = self.scheduler.precondition_inputs(x, s), self.scheduler.precondition_noise(sigma)
        else:
            scaled, t = x / (1 + s**2).sqrt(), self._timestep(sigma)
        return c_skip * x + c_out * self._network(scaled, t, labels)[:, : self.channels]

    @torch.no_grad()
    def sample(
        self,
        num_images: int,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
        gradient: Gradient | None = None,
        scale: float = 0.0,
        description: str = "generate",
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Draw images (uint8 [N, H, W, C]) with the pipeline's own scheduler; and their labels (int64 [N]).

        Without a gradient the images are those of the stock pipeline, called with `torch.Generator()` of
        this seed for one batch of `self.batch` images after the other. With one, every network output is
        guided (`guided_output`) and the stock scheduler does the rest, clipping included. labels: by default
        every one equally often, in order. A scheduler's step without any signal (abar = 0) is not guided.

        Raises:
            InputError: no image was asked for, impossible labels, or weights that give no numbers.
        """
        if num_images < 1:
            raise InputError(f"cannot generate {num_images} images: ask for at least one (--num-images)")
        wanted = self._wanted(num_images, labels)
        generator = torch.Generator().manual_seed(seed)
        images = np.empty((num_images, *self.size, self.channels), np.uint8)
        batches = [range(at, min(at + self.batch, num_images)) for at in range(0, num_images, self.batch)]
        self.network.eval()
        with Progress(description, len(batches) * self.steps, "steps") as progress:
            for batch in batches:
                rows = np.asarray(batch)
                x = self._draw(
                    rows,
                    None if wanted is None else torch.from_numpy(wanted[rows]).to(self.device),
                    generator,
                    None if scale == 0 else gradient,
                    scale,
                    progress,
                )
                images[batch.start : batch.stop] = _to_uint8(x)
        return images, wanted

    def _draw(
        self,
        rows: np.ndarray,
        labels: Tensor | None,
        generator: torch.Generator,
        gradient: Gradient | None,
        scale: float,
        progress: Progress,
    ) -> Tensor:
        scheduler = self.scheduler
        x = torch.randn((len(rows), self.channels, *self.size), generator=generator)
        x = x.to(self.device) * scheduler.init_noise_sigma
        scheduler.set_timesteps(self.steps)
        for index, t in enumerate(scheduler.timesteps):
            output = self._network(scheduler.scale_model_input(x, t), t, labels)
            shrink = 1.0 if self.is_edm else float(scheduler.alphas_cumprod[t]) ** 0.5
            if gradient is not None and shrink > 0:
                level = float(scheduler.sigmas[index]) if self.is_edm else (1 - shrink**2) ** 0.5 / shrink
                sigma = torch.full((len(rows),), level, device=self.device)
                c_out = self._coefficients(sigma, x)[1]
                mean, variance = output[:, : self.channels], output[:, self.channels :]
                mean = guided_output(mean, c_out, gradient, scale, x / shrink, sigma, rows)
                output = torch.cat([mean, variance], 1)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
            progress.advance()
        if gradient is None and not bool(x.isfinite().all()):
            raise InputError(
                "the pipeline's images are not finite numbers, its weights are broken; nothing was audited"
            )
        return x

    def _network(self, scaled: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.network(scaled, t, class_labels=labels, return_dict=False)[0]

    def _coefficients(self, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out), each [R, 1, 1, 1], with D = c_skip x + c_out F for this kind of prediction."""
        s = sigma.reshape(-1, 1, 1, 1).to(x.dtype)
        kind = self.scheduler.config.prediction_type
        if self.is_edm:
            data = self.scheduler.config.sigma_data
            total = s**2 + data**2
            return data**2 / total, (-1 if kind == "v_prediction" else 1) * s * data / total.sqrt()
        if kind == "epsilon":
            return torch.ones_like(s), -s
        if kind == "sample":
            return torch.zeros_like(s), torch.ones_like(s)
        return 1 / (1 + s**2), -s / (1 + s**2).sqrt()

    def _table(self) -> tuple[Tensor, Tensor]:
        """Timesteps and their sigma = sqrt((1 - abar) / abar), float64, rising; without those of 0 and infinity."""
        abar = self.scheduler.alphas_cumprod.double()
        timesteps = torch.arange(len(abar), dtype=torch.float64)
        usable = (abar > 0) & (abar < 1)
        return timesteps[usable], ((1 - abar[usable]) / abar[usable]).sqrt()

    def _timestep(self, sigma: Tensor) -> Tensor:
        timesteps, sigmas = (values.to(sigma.device) for values in self._table())
        s = sigma.detach().double().clamp(sigmas[0], sigmas[-1])
        high = torch.searchsorted(sigmas, s).clamp(1, len(sigmas) - 1)
        low = high - 1
        share = (s / sigmas[low]).log() / (sigmas[high] / sigmas[low]).log()
        t = timesteps[low] + share * (timesteps[high] - timesteps[low])
        return t.round().long() if self.network.config.time_embedding_type == "learned" else t.float()

    @property
    def is_edm(self) -> bool:
        """Whether the scheduler works in EDM coordinates; else it is variance-preserving."""
        return type(self.scheduler).__name__ in EDM_SCHEDULERS

    def _wanted(self, num_images: int, labels: Sequence[int] | np.ndarray | None) -> np.ndarray | None:
        if self.label_names is None:
            if labels is not None:
                raise InputError("this diffusers network has no labels; nothing was audited")
            return None
        if labels is None:
            return np.arange(num_images, dtype=np.int64) * len(self.label_names) // num_images
        wanted = np.asarray(labels, np.int64)
        if len(wanted) != num_images or wanted.min() < 0 or wanted.max() >= len(self.label_names):
            raise InputError(
                f"labels must be {num_images} class indices from 0 to {len(self.label_names) - 1}"
            )
        return wanted


def _to_uint8(x: Tensor) -> np.ndarray:
    """As diffusers' pipelines do: [R, C, H, W] in [-1, 1] to [0, 1] to uint8 [R, H, W, C]."""
    unit = (x / 2 + 0.5).clamp(0, 1).nan_to_num(0.0).cpu().permute(0, 2, 3, 1).numpy()
    return (unit * 255).round().astype(np.uint8)
