"""SIDE's branch for large models: low-rank adaptation to pseudo-labels in the place of a classifier.

The frozen target learns, from its own generated images, to draw one cluster of them at a time (arXiv 2410.02467;
LoRA: Hu et al. 2022, arXiv 2106.09685). Guidance is classifier-free (Ho & Salimans 2022, arXiv 2207.12598),
D_none + scale (D_c - D_none), and goes through the target's own sampler, ours or a diffusers scheduler.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.audit.provenance import content_of, weights_of
from sfumato.audit.surrogate import labels_of_conditions
from sfumato.audit.target import Model
from sfumato.audit.time_classifier import draw_sigma
from sfumato.data.files import write_whole
from sfumato.data.records import fingerprint
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.training import TrainingPlan, train
from sfumato.errors import InputError

CODE = "sfumato-lora/1"  # part of every fingerprint: change it whenever the same call learns otherwise


class _ConditionedTime(nn.Module):
    """A time embedding with the condition's embedding added; zero before training, so that nothing changes.

    conditions: int64 [R] for the next calls, the last index for "none"; None: "none" for all.
    """

    def __init__(self, inner: nn.Module, conditions: int, dimension: int) -> None:
        super().__init__()
        self.inner, self.embedding = inner, nn.Embedding(conditions + 1, dimension)
        nn.init.zeros_(self.embedding.weight)
        self.conditions: Tensor | None = None

    def forward(self, *args: Any) -> Tensor:
        time = self.inner(*args)
        if self.conditions is None:
            return time + self.embedding.weight[-1].to(time.dtype)
        return time + self.embedding(self.conditions).to(time.dtype)


@dataclass(eq=False)
class LoraModel:
    """A target that takes pseudo-labels as its labels; like a `Model`, the target's copy inside it untouched.

    base: the adapted copy. num_labels: how many pseudo-labels. trained_on: SHA-256 of the pixels it was adapted on.
    pseudo_labels, own_labels: of those images, int64 [N]; own_labels is None where the target has no labels.
    """

    base: Model
    time: _ConditionedTime
    num_labels: int
    pseudo_labels: np.ndarray
    own_labels: np.ndarray | None
    trained_on: str = ""

    @property
    def network(self) -> Any:
        """The UNet2DModel with its adapters."""
        return self.base.network

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.base.size

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.base.channels

    @property
    def label_names(self) -> tuple[str, ...]:
        """What the pseudo-labels are called."""
        return tuple(f"cluster {index}" for index in range(self.num_labels))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The target's."""
        return self.base.sigma_range

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base.device

    def denoise(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None, own_labels: Tensor | None = None
    ) -> Tensor:
        """D(x; sigma | pseudo-label), EDM coordinates; labels: pseudo-labels int64 [R], None for no condition.

        own_labels: the target's own labels, int64 [R], where it has some.
        """
        self.time.conditions = labels
        try:
            return self.base.denoise(x, sigma, own_labels)
        finally:
            self.time.conditions = None

    def sample(
        self,
        num_images: int,
        *,
        labels: np.ndarray | None = None,
        own_labels: np.ndarray | None = None,
        seed: int = 0,
        scale: float = 1.0,
        description: str = "generate",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images (uint8 [N, H, W, C]) and their pseudo-labels (int64 [N]), with the target's own sampler.

        labels: the wanted pseudo-labels; default: uniform. own_labels: the target's; default: drawn from those of the
        cluster's images. scale: 0 is the adapted model without a condition, 1 the conditional one, more is guidance.
        """
        conditions = labels
        if conditions is None:
            conditions = np.random.default_rng([seed, 1]).integers(self.num_labels, size=num_images)
        conditions = np.asarray(conditions, np.int64)
        if len(conditions) != num_images or (
            num_images and not 0 <= conditions.min() <= conditions.max() < self.num_labels
        ):
            raise InputError(f"pseudo-labels must be {num_images} numbers from 0 to {self.num_labels - 1}")
        if own_labels is None and self.own_labels is not None:
            own_labels = labels_of_conditions(conditions, self.pseudo_labels, self.own_labels, seed)
        wanted = torch.from_numpy(conditions).to(self.device)
        own = None if own_labels is None else torch.from_numpy(own_labels).to(self.device)

        def towards(x: Tensor, sigma: Tensor, rows: np.ndarray) -> Tensor:
            """(D_c - D_none) / sigma^2: what guidance multiplies by scale * sigma^2 and adds to D_none."""
            at = torch.from_numpy(rows).to(self.device)
            its_own = None if own is None else own[at]
            with torch.no_grad():
                difference = self.denoise(x, sigma, wanted[at], its_own) - self.denoise(
                    x, sigma, None, its_own
                )
            return difference / sigma.reshape(-1, 1, 1, 1) ** 2

        images, _ = self.base.sample(
            num_images, labels=own_labels, seed=seed, gradient=towards, scale=scale, description=description
        )
        return images, conditions


@dataclass(frozen=True)
class _DenoisingLoss(EDM):
    """EDM's loss of the adapted target, whatever its parametrisation; labels are [R, 2]: pseudo-label, own.

    Noise levels are the time classifier's: where one cluster is told from another. The rest the target knows.
    """

    adapted: Any = None

    def draw_sigma(self, rows: int, generator: torch.Generator) -> Tensor:
        return draw_sigma(rows, self.adapted.sigma_range, generator)

    def rows(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        *,
        no_label: int,
        label_dropout: float,
    ) -> dict[str, Tensor]:
        rows = super().rows(images, labels[:, 0], generator, no_label=no_label, label_dropout=label_dropout)
        return {**rows, "labels": torch.stack([rows["labels"], labels[:, 1]], 1)}

    def denoise(self, net: Any, x_noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        own = None if self.adapted.own_labels is None else labels[:, 1]
        return self.adapted.denoise(x_noisy, sigma, labels[:, 0], own)


def train_lora(
    model: Model,
    images: np.ndarray,
    pseudo_labels: np.ndarray,
    own_labels: np.ndarray | None,
    num_classes: int,
    *,
    steps: int,
    seed: int,
    rank: int = 8,
    batch: int = 64,
    lr: float = 1e-3,
    label_dropout: float = 0.1,
    description: str = "LoRA",
    saved: Path | None = None,
) -> LoraModel:
    """Adapt a copy of the model to the pseudo-labels (int64 [N]) of its generated images (uint8 [N, H, W, C]).

    Adapters of `rank` on all convolutions and linear layers (attention's among them), and an embedding of the
    pseudo-label added to the time embedding; both start at zero, so that before training (steps = 0) the output is
    the target's. The target's own weights stay frozen, in the copy too. own_labels: the target's labels of these
    images, None for an unconditional target. saved: a safetensors file; if it holds what the same call learnt before,
    that is returned, else it is written; what is interrupted goes on.

    Raises:
        InputError: no UNet2DModel, peft is not installed, or labels out of range.
    """
    pseudo_labels = np.asarray(pseudo_labels, np.int64)
    if num_classes < 2 or not 0 <= pseudo_labels.min() <= pseudo_labels.max() < num_classes:
        raise InputError(f"{description}: pseudo-labels must be 0 to {num_classes - 1}; nothing was audited")
    own_labels = None if model.num_labels is None or own_labels is None else np.asarray(own_labels, np.int64)
    if (own_labels is None) != (model.num_labels is None):
        raise InputError(
            f"{description}: this model has labels, and those of its images are missing; nothing was audited"
        )
    trained_on = content_of(images, f"{description}: checking")
    adapted = _adapted(model, num_classes, rank, seed)
    adapted.pseudo_labels, adapted.own_labels = pseudo_labels, own_labels
    parts = {name: p for name, p in adapted.network.named_parameters() if p.requires_grad}
    both = np.stack([pseudo_labels, np.zeros_like(pseudo_labels) if own_labels is None else own_labels], 1)
    settings = json.dumps([steps, seed, rank, batch, lr, label_dropout, num_classes])
    key = fingerprint([CODE, weights_of(model.network), trained_on, both.tobytes(), settings])
    if saved is None or not _load(parts, saved, key):
        partial = None if saved is None else saved.with_name(f"{saved.stem}-{key[:16]}.checkpoint")
        if steps:
            train(
                adapted.network, images, both,
                TrainingPlan(steps=steps, batch=batch, lr=lr, label_dropout=label_dropout, ema_decay=0.99),
                edm=_DenoisingLoss(adapted=adapted), no_label=num_classes, seed=seed, checkpoint=partial,
                description=description,
            )  # fmt: skip
        if saved is not None and partial is not None:
            saved.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.detach().cpu().contiguous() for name, value in parts.items()}
            write_whole(saved, save(tensors, {"key": key, "trained_on": trained_on}))
            partial.unlink(missing_ok=True)
    adapted.trained_on = trained_on
    adapted.network.requires_grad_(False).eval()
    return adapted


def _adapted(model: Model, num_classes: int, rank: int, seed: int) -> LoraModel:
    """A copy of the model with adapters and embedding, all else frozen."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError(
            "SIDE's LoRA branch needs peft; nothing was audited; pip install 'sfumato[lora]', or use the classifier"
        ) from None
    if not isinstance(model.network, UNet2DModel):
        raise InputError(
            f"SIDE's LoRA branch adapts a UNet2DModel, not {type(model.network).__name__}; nothing was audited; give "
            "a folder of generated images instead"
        )
    base = copy.deepcopy(model)
    network: Any = base.network
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), network)
    dimension = network.time_embedding.linear_2.out_features
    time = _ConditionedTime(network.time_embedding, num_classes, dimension).to(model.device)
    network.time_embedding = time
    for name, weight in network.named_parameters():
        weight.requires_grad_("lora_" in name)
    time.embedding.weight.requires_grad_()
    network.eval()
    return LoraModel(base, time, num_classes, np.zeros(0, np.int64), None)


def _load(parts: dict[str, nn.Parameter], saved: Path, key: str) -> bool:
    """Fill adapters and embedding from the file, if the same call left it; a damaged file counts as none."""
    if not saved.is_file():
        return False
    try:
        with safe_open(saved, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key or set(file.keys()) != set(parts):
                return False
            values = {name: file.get_tensor(name) for name in parts}
    except (SafetensorError, OSError):
        return False
    with torch.no_grad():
        for name, weight in parts.items():
            weight.copy_(values[name])
    return True
