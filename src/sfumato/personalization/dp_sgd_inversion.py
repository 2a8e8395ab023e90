"""Textual inversion by DP-SGD: one token learnt from all private images, with the project's own engine.

The baseline that DPAgg-TI is measured against (arXiv 2411.14639 finds it yields nothing usable). The only trained
parameter is the token, so the clipped gradient sum has D numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.images import ProtectedImages
from sfumato.personalization.text_to_image import TEMPLATES, TextToImage
from sfumato.privacy.accounting import calibrate
from sfumato.privacy.budget import Budget
from sfumato.privacy.dp_sgd import DPSGDPlan, dp_sgd


@dataclass(frozen=True)
class DPSGDSettings:
    """steps: T. expected_batch: units per step on average. draws: noise levels per unit, K. clip_norm: C, below the
    usual length of a gradient. learning_rate: of Adam, with a linear fall to a tenth."""

    steps: int = 100
    expected_batch: float = 32.0
    draws: int = 2
    clip_norm: float = 0.1
    learning_rate: float = 0.01


def dp_sgd_plan(budget: Budget, units: float, settings: DPSGDSettings | None = None) -> DPSGDPlan:
    """The plan whose events fit the budget. units: the public number."""
    settings = settings or DPSGDSettings()
    batch = min(settings.expected_batch, max(1.0, units))
    fixed: dict[str, Any] = {
        "sampling_probability": min(1.0, batch / max(1.0, units)), "steps": settings.steps,
        "clip_norm": settings.clip_norm, "rows_per_unit": settings.draws, "expected_batch": batch,
    }  # fmt: skip
    noise = calibrate(lambda z: [DPSGDPlan(noise_multiplier=z, **fixed).planned().total], budget)
    return DPSGDPlan(noise_multiplier=noise, **fixed)


class TokenNet(nn.Module):
    """The token as a network of one parameter, `rows.weight` [1, D]; calling it gives the loss of each row [R]."""

    def __init__(self, model: TextToImage, anchor: Tensor) -> None:
        super().__init__()
        self.rows = nn.Embedding(1, model.dimension)
        self.rows.weight.data.copy_(anchor.float()[None])
        # The model is frozen: not this network's, and not copied with it.
        self._losses = lambda *given: model.losses(*given)
        self._prompts = model.prompts(TEMPLATES)

    def forward(self, latents: Tensor, noise: Tensor, times: Tensor, template: Tensor) -> Tensor:
        """Everything has R rows; template int64 [R] is a position in `TEMPLATES`."""
        tokens = self.rows(torch.zeros_like(template))
        ids = [tower[template] for tower in self._prompts]
        return self._losses(latents, noise, times, ids, tokens)


def token_rows(model: TextToImage) -> Callable[[Tensor, Tensor, torch.Generator], dict[str, Tensor]]:
    """`make_rows` of DP-SGD: images in [-1, 1] to latents, each with noise, a level and a prompt of its own."""

    def make(images: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        latents = torch.cat([model.encoded(image[None]) for image in images])
        rows, device = len(images), images.device
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator, device=device),
            "times": torch.randint(len(model.alphas), (rows,), generator=generator, device=device),
            "template": torch.randint(len(TEMPLATES), (rows,), generator=generator, device=device),
        }

    return make


def row_loss(call: Callable[..., Tensor], rows: dict[str, Tensor]) -> Tensor:
    """Loss of each row, [R]."""
    return call(rows["latents"], rows["noise"], rows["times"], rows["template"])


def dp_sgd_inversion(
    model: TextToImage,
    private: ProtectedImages,
    anchor: Tensor,
    plan: DPSGDPlan,
    reservation: Any,
    *,
    learning_rate: float = DPSGDSettings.learning_rate,
    checkpoint_dir: Path | None = None,
) -> tuple[Tensor, int]:
    """The learnt token, float32 [D], and how many of its steps are in it (fewer than were charged after a crash).

    Guarantee: `plan.planned().total`, for adding or removing one unit; see `privacy.dp_sgd`. Goes on from
    `checkpoint_dir` when called again with the same reservation.
    """
    net = TokenNet(model, anchor.to(model.device)).to(model.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    done = dp_sgd(
        net, private, plan, reservation, make_rows=token_rows(model), row_loss=row_loss, optimizer=optimizer,
        lr=lambda step: learning_rate * (1 - 0.9 * step / plan.steps), checkpoint_dir=checkpoint_dir,
    )  # fmt: skip
    return net.rows.weight.detach()[0].cpu(), done.steps_applied
