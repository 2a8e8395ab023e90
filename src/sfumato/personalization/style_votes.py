"""How well each public style explains an image: the model's own loss, for `privacy.vectors.nearest_candidate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sfumato.personalization.style_bank import StyleBank
from sfumato.personalization.text_to_image import TEMPLATES, TextToImage

ROWS_AT_ONCE = 512  # of latents up to 16 x 16; fewer of larger ones


def style_votes(
    model: TextToImage, bank: StyleBank, *, draws: int = 3, seed: int = 0
) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [B, H, W, 3] -> minus the loss under each style's token, float64 [B, S].

    `draws` noises and noise levels, public and the same for every image and style, so that only the style differs.
    One image at a time, in calls of one shape.
    """
    levels, source = len(model.alphas), torch.Generator().manual_seed(seed)
    times = ((torch.arange(draws) + 0.5) * levels / draws).long().to(model.device)
    noise: list[torch.Tensor] = []
    side = max(1, model.unet.config.sample_size // 16)
    chunk = max(1, ROWS_AT_ONCE // (draws * side * side))
    parts = [bank.tokens[start : start + chunk] for start in range(0, len(bank.tokens), chunk)]
    told = [_told(model, part, draws) for part in parts]

    @torch.no_grad()
    def score(images: np.ndarray) -> np.ndarray:
        out = []
        for image in images:
            latents = model.latents(image[None])
            if not noise:
                noise.append(torch.randn((draws, *latents.shape[1:]), generator=source).to(model.device))
            found = []
            for part, condition in zip(parts, told, strict=True):
                count = len(part)
                losses = model.losses_told(
                    latents.expand(count * draws, -1, -1, -1), noise[0].repeat(count, 1, 1, 1), times.repeat(count),
                    condition,
                )  # fmt: skip
                found.append(-losses.view(count, draws).mean(1))
            out.append(torch.cat(found).double().cpu().numpy())
        return np.stack(out)

    return score


@torch.no_grad()
def _told(model: TextToImage, tokens: np.ndarray, draws: int) -> dict[str, Any]:
    """The conditions of these styles, each `draws` times, worked out once."""
    rows = torch.from_numpy(tokens.astype(np.float32)).to(model.device).repeat_interleave(draws, 0)
    return model.conditions([tower[:1].expand(len(rows), -1) for tower in model.prompts(TEMPLATES[:1])], rows)
