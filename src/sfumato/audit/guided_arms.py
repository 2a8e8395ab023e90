"""Arms of an attack: what is learnt to guide a model, the pilot that chooses how strongly, and what is kept on disk."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sfumato.audit.target import Model
from sfumato.audit.time_classifier import train_time_classifier
from sfumato.data.files import write_whole
from sfumato.data.records import fingerprint
from sfumato.errors import InputError

CODE = "sfumato-side/1"  # part of every fingerprint: change it whenever the same call draws otherwise

Draw = Callable[[np.ndarray, np.ndarray | None, float, int, str], np.ndarray]
"""(conditions int64 [N], the model's own labels or None, scale, seed, description) -> images uint8 [N, H, W, C]."""


@dataclass(frozen=True)
class SideSettings:
    """How hard SIDE tries. The defaults are for a few minutes on two cores, a small network and 16 x 16 pixels.

    synthetic_images: how many images of the target the caller draws for the surrogate. clusters, scales: the grid
    of K and lambda that the pilot chooses from. cohesion: least mean cosine of a cluster. pilot: images per point of
    the grid. branch: "classifier", or "lora" for large models (scales are then classifier-free guidance weights).
    steps, batch, lr: of the classifier (AdamW) or the adapters. rank: of the adapters.

    The paper has K = 100, cohesion 0.5 and lr = 1e-4, and does not print the rest: `PAPER` has what others use.
    """

    synthetic_images: int = 1_000
    clusters: tuple[int, ...] = (20, 100)
    cohesion: float = 0.5
    scales: tuple[float, ...] = (1.5, 3.0, 6.0)
    pilot: int = 100
    branch: Literal["classifier", "lora"] = "classifier"
    steps: int = 400
    batch: int = 128
    lr: float = 2e-3
    rank: int = 8

    def __post_init__(self) -> None:
        grid = [*self.clusters, *self.scales]
        if not self.clusters or not self.scales or min(grid) <= 0 or not all(map(math.isfinite, grid)):
            raise InputError("SIDE needs numbers of clusters and scales above 0; nothing was audited")
        if min(self.pilot, self.steps, self.batch, self.rank) < 1 or not self.lr > 0:
            raise InputError("SIDE needs pilot, steps, batch, rank and lr above 0; nothing was audited")


PAPER = SideSettings(synthetic_images=10_000, clusters=(100,), scales=(10.0,), steps=1_563, lr=1e-4)
"""The published settings, and where none are printed those of others: 10,000 images, 20 epochs, lambda = 10."""


@dataclass(frozen=True, eq=False)
class Arm:
    """images: uint8 [N, H, W, C]. conditions: int64 [N], the class that guided each; None without guidance.
    labels: int64 [N], the model's own; None for an unconditional model."""

    images: np.ndarray
    conditions: np.ndarray | None
    labels: np.ndarray | None


@dataclass(frozen=True)
class PilotPoint:
    """One point of the grid. score: what `score_pilot` gave, higher is closer to the training images."""

    clusters: int
    scale: float
    score: float


def check_images(model: Model, images: np.ndarray, labels: np.ndarray | None, num_images: int) -> None:
    if num_images < 1:
        raise InputError(
            f"SIDE cannot draw {num_images} images; nothing was audited; ask for one or more (--num-images)"
        )
    wanted = (*model.size, model.channels)
    if images.ndim != 4 or images.shape[1:] != wanted or images.dtype != np.uint8:
        raise InputError(
            f"the images are {images.dtype} {list(images.shape[1:])} and the model's uint8 {list(wanted)}; nothing was "
            "audited; give images of the model's size and channels"
        )
    if (model.num_labels or 0) > 1 and (labels is None or len(labels) < len(images)):
        raise InputError("this model has labels, and those of its images are missing; nothing was audited")


def learn(
    model: Model,
    images: np.ndarray,
    classes: np.ndarray,
    own_labels: np.ndarray | None,
    count: int,
    settings: SideSettings,
    seed: int,
    saved: Path,
    provenance: str,
) -> Draw:
    """How to draw under a condition, learnt from these images and from nothing else."""
    if settings.branch == "lora":
        from sfumato.audit.lora import train_lora

        adapted = train_lora(
            model, images, classes, own_labels, count, steps=settings.steps, seed=seed, rank=settings.rank,
            batch=settings.batch, lr=settings.lr, description=f"LoRA, {count} classes", saved=saved,
        )  # fmt: skip
        _same_images(adapted.trained_on, provenance)

        def draw_adapted(
            conditions: np.ndarray, labels: np.ndarray | None, scale: float, seed: int, description: str
        ) -> np.ndarray:
            return adapted.sample(
                len(conditions),
                labels=conditions,
                own_labels=labels,
                seed=seed,
                scale=scale,
                description=description,
            )[0]

        return draw_adapted
    classifier = train_time_classifier(
        images, classes, count, steps=settings.steps, seed=seed, sigma_range=model.sigma_range,
        batch=settings.batch, lr=settings.lr, device=model.device, saved=saved,
        description=f"time classifier, {count} classes",
    )  # fmt: skip
    _same_images(classifier.trained_on, provenance)

    def draw_guided(
        conditions: np.ndarray, labels: np.ndarray | None, scale: float, seed: int, description: str
    ) -> np.ndarray:
        return model.sample(
            len(conditions), labels=labels, seed=seed, gradient=classifier.gradient(conditions), scale=scale,
            description=description,
        )[0]  # fmt: skip

    return draw_guided


def _same_images(trained_on: str, provenance: str) -> None:
    if trained_on != provenance:
        raise InputError(
            "SIDE's surrogate was trained on other images than the generated ones; nothing was audited; delete the "
            "attack's folder and run the command again"
        )


def run_pilot(
    draw: Draw,
    conditions: np.ndarray,
    labels: np.ndarray | None,
    clusters: int,
    score_pilot: Callable[[np.ndarray], float],
    settings: SideSettings,
    seed: int,
    place: Path,
) -> list[PilotPoint]:
    """Score every scale of the settings, on the same noise and the same conditions (int64 [pilot])."""
    points = []
    for scale in settings.scales:
        images = saved_arrays(
            place / f"pilot-{clusters}-{scale:g}.npz",
            lambda scale=scale: {
                "images": draw(conditions, labels, scale, seed, f"pilot, {clusters} classes, scale {scale:g}")
            },
        )["images"]
        points.append(PilotPoint(clusters, scale, float(score_pilot(images))))
    return points


def best_point(pilot: Sequence[PilotPoint]) -> tuple[int, float]:
    """Clusters and scale of the highest score; of equals the first."""
    if not all(math.isfinite(point.score) for point in pilot):
        raise ValueError("score_pilot has to give finite numbers")
    best = max(pilot, key=lambda point: point.score)
    return best.clusters, best.scale


def uniform_conditions(count: int, rows: int, seed: int) -> np.ndarray:
    """Classes 0 .. count - 1, each as likely; int64 [rows]."""
    return np.random.default_rng(seed).integers(count, size=rows)


def seed_for(seed: int, name: str) -> int:
    """A seed for every use of its own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def kept_under(folder: Path, name: str, about: Sequence[str | bytes]) -> Path:
    """The folder (made if missing) of one call, known by all that its result depends on."""
    place = Path(folder) / f"{name}-{fingerprint([CODE, *about])[:16]}"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def saved_arrays(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in an .npz file, made and written if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        pass
    arrays = make()
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    write_whole(path, packed.getvalue())
    return arrays
