"""Textual inversion of many images at once: one token for each image, all in one batch (arXiv 2208.01618).

The model is frozen, so images do not share anything that is trained: image b's loss depends on row b of the tokens
alone, and one backward pass of the summed losses gives every row its own gradient. Latents are encoded once.

**Every image by itself.** Noise, noise levels and prompts of a step are public, seeded, and *the same for every image*,
so nothing an image gets depends on its place or on which other images there are; `privacy.vectors` tests that to the
last bit before it relies on it. (Noise seeded by position would move with one image more or less in the folder, and
the sum of all tokens with it by far more than one clip norm.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.data.files import write_whole
from sfumato.errors import InputError
from sfumato.personalization.text_to_image import TEMPLATES, TextToImage
from sfumato.progress import Progress

ROWS_AT_ONCE = 256  # of public styles


@dataclass(frozen=True)
class InversionPlan:
    """steps: of Adam. draws: noise levels per image and step, spread over the schedule. learning_rate: of Adam, with
    a linear fall to a tenth. batch_size: images at once; a speed knob. seed: of public randomness."""

    steps: int = 60
    draws: int = 2
    learning_rate: float = 0.02
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}; no budget was spent")
        if not 0 < self.learning_rate < 10:
            raise InputError(f"the learning rate {self.learning_rate} is out of range; no budget was spent")


class Inversion:
    """uint8 [batch_size, H, W, C] -> tokens float64 [batch_size, D]; what `privacy.vectors.Embed` asks for.

    anchor: flat token [D] that every image starts from. kept: folder under `internal/` for finished tokens, one file
    for each image by a hash of its pixels, so that an interrupted run goes on where it stopped; None keeps
    nothing. What was made with other arithmetic (threads, precision, version, processor) is not taken up: which
    images would have it depends on who else is in the folder.
    """

    def __init__(
        self, model: TextToImage, anchor: Tensor, plan: InversionPlan, *, kept: Path | None = None
    ) -> None:
        self.model, self.anchor, self.plan, self.kept = model, anchor, plan, kept
        self.dimension, self.batch_size = model.dimension, plan.batch_size
        self._purpose = hashlib.sha256(
            f"{model.fingerprint} {model.vectors} {plan} {anchor.cpu().double().numpy().tobytes().hex()} "
            f"{_arithmetic(model)}".encode()
        ).hexdigest()

    def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
        """Tokens of a batch; `steps` shortens the work. Rows that end in NaN are NaN."""
        if steps is not None:
            return self._invert(images, steps, None)
        names = [hashlib.sha256(image.tobytes() + self._purpose.encode()).hexdigest() for image in images]
        if self.kept is not None and all((self.kept / f"{name}.f64").exists() for name in names):
            return np.stack([np.frombuffer((self.kept / f"{name}.f64").read_bytes()) for name in names])
        with Progress("inversion", self.plan.steps, f"steps for {len(images)} images") as progress:
            found = self._invert(images, self.plan.steps, progress.advance)
        if self.kept is not None:
            self.kept.mkdir(parents=True, exist_ok=True)
            for name, token in zip(names, found, strict=True):
                write_whole(self.kept / f"{name}.f64", token.tobytes())
        return found

    def _invert(self, images: np.ndarray, steps: int, advance: Callable[[], None] | None) -> np.ndarray:
        latents = torch.cat([self.model.latents(image[None]) for image in images])
        return invert(self.model, latents, self.anchor, self.plan, steps=steps, advance=advance)


def _arithmetic(model: TextToImage) -> str:
    """Everything that may change the last bits of a token."""
    device = model.device.type
    chip = (
        torch.cuda.get_device_name(model.device)
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return f"{device} {chip} {torch.get_num_threads()} {torch.__version__} {model.autocast}"


def invert(
    model: TextToImage,
    latents: Tensor,
    anchor: Tensor,
    plan: InversionPlan,
    *,
    steps: int | None = None,
    advance: Callable[[], None] | None = None,
) -> np.ndarray:
    """Tokens of B images from their latents [B, C, h, w]: float64 [B, D]. Deterministic given `plan.seed`."""
    images, draws, levels = len(latents), plan.draws, len(model.alphas)
    prompts = model.prompts(TEMPLATES)

    def losses(tokens: Tensor, source: torch.Generator) -> Iterator[Tensor]:
        """One draw of noise, levels and prompts for all images."""
        chosen = torch.randint(len(TEMPLATES), (draws,), generator=source)
        times = (torch.arange(draws) + torch.rand(draws, generator=source)) * (levels / draws)
        noise = torch.randn((draws, *latents.shape[1:]), generator=source).to(model.device)
        yield model.losses(
            latents.repeat_interleave(draws, 0),
            noise.repeat(images, 1, 1, 1),
            times.long().clamp_max(levels - 1).to(model.device).repeat(images),
            [tower.index_select(0, chosen.to(model.device)).repeat(images, 1) for tower in prompts],
            tokens.repeat_interleave(draws, 0),
        )

    return _descend(model, anchor, images, plan, losses, steps=steps, advance=advance)


def invert_style(
    model: TextToImage,
    latents: Tensor,
    style: Tensor,
    count: int,
    anchor: Tensor,
    plan: InversionPlan,
    *,
    advance: Callable[[], None] | None = None,
) -> np.ndarray:
    """Ordinary textual inversion of `count` *public* styles at once, float64 [count, D]: one token learnt from all of
    its images. latents [N, C, h, w]; style int64 [N], whose token an image teaches. No guarantee."""
    prompts, levels, draws = model.prompts(TEMPLATES), len(model.alphas), plan.draws
    members = [torch.nonzero(style == number).flatten() for number in range(count)]
    rows = torch.arange(count).repeat_interleave(draws)

    def losses(tokens: Tensor, source: torch.Generator) -> Iterator[Tensor]:
        """Other images, noise, levels and prompts for each style, in parts that fit into memory."""
        picked = torch.cat([own[torch.randint(len(own), (draws,), generator=source)] for own in members])
        times = (torch.arange(draws) + torch.rand(count, draws, generator=source)) * (levels / draws)
        times = times.flatten().long().clamp_max(levels - 1).to(model.device)
        chosen = torch.randint(len(TEMPLATES), (len(rows),), generator=source).to(model.device)
        noise = torch.randn((len(rows), *latents.shape[1:]), generator=source).to(model.device)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            yield model.losses(
                latents[picked[part]].to(model.device), noise[part], times[part],
                [tower.index_select(0, chosen[part]) for tower in prompts], tokens[rows[part].to(model.device)],
            )  # fmt: skip

    return _descend(model, anchor, count, plan, losses, advance=advance)


def _descend(
    model: TextToImage,
    anchor: Tensor,
    count: int,
    plan: InversionPlan,
    losses: Callable[[Tensor, torch.Generator], Iterator[Tensor]],
    *,
    steps: int | None = None,
    advance: Callable[[], None] | None = None,
) -> np.ndarray:
    """`count` tokens that start from the anchor, by Adam on the sum of a step's losses; float64 [count, D]."""
    tokens = anchor.to(model.device).float().expand(count, -1).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([tokens], lr=plan.learning_rate, betas=(0.9, 0.99), foreach=False)
    source = torch.Generator().manual_seed(plan.seed)  # on the CPU: the same noise on every device
    for step in range(steps or plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * (1 - 0.9 * step / plan.steps)
        for part in losses(tokens, source):
            (part.sum() / plan.draws).backward()
        optimizer.step()
        optimizer.zero_grad()
        if advance is not None:
            advance()
    return tokens.detach().double().cpu().numpy()
