"""How well each public style explains an image: the model's own loss, for `privacy.vectors.nearest_candidate`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sfumato.personalization.style_bank import StyleBank
from sfumato.personalization.text_to_image import TEMPLATES, TextToImage

ROWS_AT_ONCE = 512


def style_votes(
    model: TextToImage, bank: StyleBank, *, draws: int = 8, seed: int = 0
) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [B, H, W, 3] -> minus the loss under each style's token, float64 [B, S].

    `draws` noises and noise levels, public and the same for every image and style, so that only the style differs.
    """
    tokens = torch.from_numpy(bank.tokens.astype(np.float32)).to(model.device)
    levels, source = len(model.alphas), torch.Generator().manual_seed(seed)
    times = ((torch.arange(draws) + 0.5) * levels / draws).long().to(model.device)
    prompts = [tower[:1] for tower in model.prompts(TEMPLATES[:1])]
    styles, chunk = len(tokens), max(1, ROWS_AT_ONCE // draws)

    @torch.no_grad()
    def score(images: np.ndarray) -> np.ndarray:
        out = np.empty((len(images), styles))
        for position, image in enumerate(images):
            latents = model.latents(image[None])
            for start in range(0, styles, chunk):
                some = tokens[start : start + chunk]
                rows = len(some) * draws
                losses = model.losses(
                    latents.expand(rows, -1, -1, -1), noise(latents).repeat(len(some), 1, 1, 1),
                    times.repeat(len(some)), [tower.expand(rows, -1) for tower in prompts],
                    some.repeat_interleave(draws, 0),
                )  # fmt: skip
                out[position, start : start + chunk] = -losses.view(len(some), draws).mean(1).double().cpu().numpy()
        return out

    held: list[torch.Tensor] = []

    def noise(latents: torch.Tensor) -> torch.Tensor:
        if not held:
            held.append(torch.randn((draws, *latents.shape[1:]), generator=source).to(model.device))
        return held[0]

    return score
