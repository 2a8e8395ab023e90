"""Ordinary (public) training of a denoiser: no privacy here, so only public or already released images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.checkpoint import WeightAverage, load_checkpoint, save_checkpoint
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import to_float
from sfumato.errors import InputError
from sfumato.progress import Progress

SECONDS_BETWEEN_CHECKPOINTS = 20.0
WARM_UP_STEPS = 50


@dataclass(frozen=True)
class TrainingPlan:
    """Adam on the EDM loss with a linear warm-up and a cosine decay to a tenth.

    Training ends after `steps` steps, or earlier when `seconds` of wall time are used up (the decay follows
    whichever is nearer its end). `perturbation`: radius of adversarial model perturbation (arXiv 2010.04925), 0
    is none: each gradient is taken at w + radius * g / |g|, where g is the gradient at w, so that training
    prefers weights around which the loss stays low, and the noise of DP-SGD does less harm (RPGen, AAAI 2026).
    """

    steps: int
    batch: int = 128
    lr: float = 2e-3
    seconds: float = float("inf")
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    autocast: bool = False
    perturbation: float = 0.0


def train(
    network: Any,
    images: np.ndarray,
    labels: np.ndarray,
    plan: TrainingPlan,
    *,
    edm: EDM,
    no_label: int,
    seed: int,
    checkpoint: Path | None = None,
    description: str = "train",
    weights: np.ndarray | None = None,
) -> int:
    """Train `network` in place on public images (uint8 [N, H, W, C], labels int64 [N]); returns the steps
    taken.

    At the end the network holds the moving average of its weights. `seed` is public randomness. With
    `checkpoint` (a file), an interrupted call goes on where it stopped. `weights` [N]: how often each image
    is drawn relative to the others.
    """
    if len(images) == 0:
        raise InputError(f"{description}: there are no images to train on")
    device = next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), lr=plan.lr)
    average = WeightAverage(network, plan.ema_decay)
    done, used = 0, 0.0
    if checkpoint is not None:
        about = load_checkpoint(checkpoint, network, optimizer, average, owner=description)
        done, used = int(about.get("steps", 0)), float(about.get("seconds", 0.0))
    chance = None if weights is None else weights / weights.sum()
    network.train()
    started = saved = time.monotonic()
    with Progress(description, plan.steps, "steps") as progress:
        progress.advance(done)
        while done < plan.steps and used < plan.seconds:
            order = np.random.default_rng([seed, done])
            generator = torch.Generator(device=device).manual_seed(int(order.integers(2**62)))
            picked = order.choice(len(images), plan.batch, p=chance)
            rows = edm.rows(
                to_float(images[picked]).to(device), torch.from_numpy(labels[picked]).to(device), generator,
                no_label=no_label, label_dropout=plan.label_dropout,
            )  # fmt: skip

            def backward(rows: dict[str, torch.Tensor] = rows) -> torch.Tensor:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=plan.autocast):
                    loss = edm.row_loss(network, rows).mean()
                loss.backward()
                return loss

            for group in optimizer.param_groups:
                group["lr"] = plan.lr * rate(max(done / plan.steps, used / plan.seconds), done)
            loss = _worst_nearby(network, backward, plan.perturbation) if plan.perturbation else backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            average.update(network)
            done += 1
            now = time.monotonic()
            used, started = used + now - started, now
            progress.advance(1, note=f"loss {loss.item():.3f}" if done % 20 == 0 else "")
            if checkpoint is not None and now - saved > SECONDS_BETWEEN_CHECKPOINTS:
                save_checkpoint(
                    checkpoint,
                    network,
                    optimizer,
                    average,
                    owner=description,
                    about={"steps": done, "seconds": used},
                )
                saved = now
    average.copy_to(network)
    network.eval()
    return done


def _worst_nearby(network: Any, backward: Callable[[], torch.Tensor], radius: float) -> torch.Tensor:
    """Leave the gradient at the worst weights within `radius` (to first order) in the network; returns the loss
    at its own weights, which are unchanged."""
    loss = backward()
    weights = [weight for weight in network.parameters() if weight.grad is not None]
    gradients = [weight.grad.clone() for weight in weights]
    before = [weight.detach().clone() for weight in weights]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(gradient, alpha=radius / max(float(norm), 1e-12))
    backward()
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
    return loss


def rate(fraction: float, step: int) -> float:
    """Learning rate as a share of its peak: linear warm-up over the first steps, cosine decay to a tenth."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * (0.55 + 0.45 * float(np.cos(np.pi * min(1.0, fraction))))
