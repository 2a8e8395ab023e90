"""SIDE, surrogate conditional data extraction, with its controls (arXiv 2410.02467).

A condition is made for a generator from its own images: they are clustered (surrogate.py), a time-dependent
classifier learns the clusters (time_classifier.py; or low-rank adapters do, lora.py), and guided sampling
s(x, sigma) + scale * grad log p(c | x, sigma) asks for one cluster at a time.

Guarantee: none. The attack itself sees only generated images, but the pilot's score looks at training images, so
what it chooses, and everything under `folder`, is for their owner's eyes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sfumato.audit.guided_arms import (
    PAPER,
    Arm,
    Draw,
    PilotPoint,
    SideSettings,
    best_point,
    check_images,
    kept_under,
    learn,
    run_pilot,
    saved_arrays,
    seed_for,
    uniform_conditions,
)
from sfumato.audit.provenance import content_of, identity_of
from sfumato.audit.surrogate import NoUsableSurrogate, Surrogate, find_clusters, labels_of_conditions
from sfumato.audit.target import Model
from sfumato.encoders.encoder import Encoder
from sfumato.errors import InputError
from sfumato.evaluation.features import cached_features

__all__ = ["PAPER", "SideSettings", "classifier_conditioned", "random_arm", "side_attack"]


@dataclass(frozen=True, eq=False)
class SideResult:
    """arms: "side", "side-shuffled" (the same with shuffled pseudo-labels) and "random" (no guidance), as many images
    each. clusters, scale: chosen by the pilot; pilot: its table, empty for a grid of one point. surrogate: the
    chosen clusters (their number is what was kept). unusable: why other numbers of clusters were not tried.
    provenance: SHA-256 of the generated images, the only ones that the surrogate was made and trained from."""

    arms: dict[str, Arm]
    clusters: int
    scale: float
    pilot: tuple[PilotPoint, ...]
    surrogate: Surrogate
    unusable: tuple[str, ...]
    provenance: str


@dataclass(frozen=True, eq=False)
class ConditionedResult:
    """The classifier-conditioned baseline: its arm, the scale that the pilot chose, and the pilot's table (its
    `clusters` are the number of labels)."""

    arm: Arm
    scale: float
    pilot: tuple[PilotPoint, ...]


def side_attack(
    model: Model,
    synthetic_images: np.ndarray,
    synthetic_labels: np.ndarray | None,
    encoder: Encoder,
    *,
    num_images: int,
    score_pilot: Callable[[np.ndarray], float],
    settings: SideSettings | None = None,
    seed: int = 0,
    folder: Path,
) -> SideResult:
    """Attack a model with conditions made of its own images, and draw both controls at equal numbers.

    synthetic_images: uint8 [N, H, W, C], drawn from the model without guidance; synthetic_labels: int64 [N], its own
    labels of them, None for an unconditional model (a guided image's label is drawn from its cluster's). encoder:
    the features to cluster in, another space than the one that copies are judged in. score_pilot: how close images
    are to the training images, higher is closer; it sees the pilot's images only, which are drawn with other
    seeds than any arm. folder: receives features, surrogates, pilot and arms, so that the same call resumes; what
    another call left (model, images, settings, seed, encoder) is never used.

    Raises:
        NoUsableSurrogate: no number of clusters leaves two that are coherent.
        InputError: no image asked for, or images that are not the model's.
    """
    settings = settings or SideSettings()
    check_images(model, synthetic_images, synthetic_labels, num_images)
    own = None
    if model.num_labels is not None and synthetic_labels is not None:
        own = np.asarray(synthetic_labels, np.int64)
    provenance = content_of(synthetic_images, "SIDE: checking generated images")
    features = cached_features(
        synthetic_images, encoder, directory=folder / "features", content=provenance, description="SIDE"
    )
    labels = b"" if own is None else own.tobytes()
    about = [
        identity_of(model),
        provenance,
        labels,
        encoder.identity,
        json.dumps(asdict(settings)),
        str(seed),
    ]
    place = kept_under(folder, "side", about)
    surrogates, unusable = _surrogates(np.asarray(features), settings, seed)

    def learnt(count: int, pseudo_labels: np.ndarray, name: str) -> Draw:
        return learn(
            model, synthetic_images, pseudo_labels, own, len(surrogates[count]), settings,
            seed_for(seed, name), place / f"{name}.safetensors", provenance,
        )  # fmt: skip

    def asked(
        count: int, pseudo_labels: np.ndarray, rows: int, name: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Conditions uniform over the kept clusters, and labels that go with them."""
        conditions = uniform_conditions(len(surrogates[count]), rows, seed_for(seed, f"{name} conditions"))
        if own is None:
            return conditions, None
        return conditions, labels_of_conditions(
            conditions, pseudo_labels, own, seed_for(seed, f"{name} labels")
        )

    choices = len(surrogates) * len(settings.scales)
    draws: dict[int, Draw] = {}
    pilot: list[PilotPoint] = []
    for count, surrogate in surrogates.items():
        draws[count] = learnt(count, surrogate.labels, f"clusters-{count}")
        if choices > 1:
            conditions, its_labels = asked(count, surrogate.labels, settings.pilot, "pilot")
            pilot += run_pilot(
                draws[count],
                conditions,
                its_labels,
                count,
                score_pilot,
                settings,
                seed_for(seed, "pilot"),
                place,
            )
    count, scale = best_point(pilot) if pilot else (next(iter(surrogates)), settings.scales[0])
    surrogate = surrogates[count]
    shuffled = np.random.default_rng(seed_for(seed, "shuffle")).permutation(surrogate.labels)
    draws_shuffled = learnt(count, shuffled, f"clusters-{count}-shuffled")

    def arm(name: str, draw: Draw, pseudo_labels: np.ndarray) -> Arm:
        conditions, its_labels = asked(count, pseudo_labels, num_images, name)
        images = saved_arrays(
            place / f"{name}-{count}-{scale:g}-{num_images}.npz",
            lambda: {"images": draw(conditions, its_labels, scale, seed_for(seed, name), name)},
        )["images"]
        return Arm(images, conditions, its_labels)

    arms = {
        "side": arm("side", draws[count], surrogate.labels),
        "side-shuffled": arm("side-shuffled", draws_shuffled, shuffled),
        "random": random_arm(model, num_images, seed, folder),
    }
    return SideResult(arms, count, scale, tuple(pilot), surrogate, unusable, provenance)


def random_arm(model: Model, num_images: int, seed: int, folder: Path) -> Arm:
    """Unguided images: the very "random" arm of `side_attack` with this seed and folder."""

    def drawn() -> dict[str, np.ndarray]:
        images, labels = model.sample(num_images, seed=seed_for(seed, "random"), description="random")
        return {"images": images} if labels is None else {"images": images, "labels": labels}

    place = kept_under(folder, "random", [identity_of(model), str(seed)])
    found = saved_arrays(place / f"random-{num_images}.npz", drawn)
    return Arm(found["images"], None, found.get("labels"))


def classifier_conditioned(
    model: Model,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    *,
    num_images: int,
    score_pilot: Callable[[np.ndarray], float],
    settings: SideSettings | None = None,
    seed: int = 0,
    folder: Path,
) -> ConditionedResult:
    """The baseline with real labels: a time classifier of the labelled training images guides, one label at a time.

    train_images: uint8 [N, H, W, C]; train_labels: int64 [N], negative where there is none. A model with two labels
    or more has to number them alike, and draws each image under the label that guides it. The pilot chooses the
    scale. An attacker without the training images cannot do this; SIDE is measured against it.

    Raises:
        InputError: fewer than two labels, or labels that the model does not have.
    """
    settings = replace(settings or SideSettings(), branch="classifier")
    labelled = np.flatnonzero(np.asarray(train_labels) >= 0)
    real = np.asarray(train_labels, np.int64)[labelled]
    present, classes = np.unique(real, return_inverse=True)
    if len(present) < 2:
        raise InputError(
            "the classifier-conditioned baseline needs training images of two labels or more, and there are "
            f"{len(present)}; it was not run; give labelled images or leave it out"
        )
    own_labels = model.num_labels is not None and model.num_labels > 1
    if own_labels and int(real.max()) >= (model.num_labels or 0):
        raise InputError(
            f"the training images have label {real.max()} and the model has {model.num_labels} labels; nothing was "
            "audited; number the labels as the model does"
        )
    images = np.ascontiguousarray(np.asarray(train_images)[labelled])
    check_images(model, images, classes, num_images)
    content = content_of(images, "classifier-conditioned: checking images")
    about = [
        identity_of(model),
        content,
        classes.tobytes(),
        present.tobytes(),
        json.dumps(asdict(settings)),
        str(seed),
    ]
    place = kept_under(folder, "conditioned", about)
    draw = learn(
        model, images, classes, None, len(present), settings, seed_for(seed, "real labels"),
        place / "labels.safetensors", content,
    )  # fmt: skip

    def asked(rows: int, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        conditions = uniform_conditions(len(present), rows, seed_for(seed, f"{name} conditions"))
        if model.num_labels is None:
            return conditions, None
        return conditions, present[conditions] if own_labels else np.zeros_like(conditions)

    pilot, scale = [], settings.scales[0]
    if len(settings.scales) > 1:
        name = "conditioned pilot"
        conditions, its_labels = asked(settings.pilot, name)
        pilot = run_pilot(
            draw, conditions, its_labels, len(present), score_pilot, settings, seed_for(seed, name), place
        )
        _, scale = best_point(pilot)
    conditions, its_labels = asked(num_images, "conditioned")
    images = saved_arrays(
        place / f"conditioned-{scale:g}-{num_images}.npz",
        lambda: {"images": draw(conditions, its_labels, scale, seed_for(seed, "conditioned"), "conditioned")},
    )["images"]
    return ConditionedResult(Arm(images, present[conditions], its_labels), scale, tuple(pilot))


def _surrogates(
    features: np.ndarray, settings: SideSettings, seed: int
) -> tuple[dict[int, Surrogate], tuple[str, ...]]:
    """Usable surrogates by the number of clusters that k-means was given, and why others are not usable."""
    found: dict[int, Surrogate] = {}
    reasons: list[str] = []
    for count in sorted(set(settings.clusters)):
        try:
            surrogate = find_clusters(
                features, clusters=count, cohesion=settings.cohesion, seed=seed_for(seed, "clusters")
            )
            found.setdefault(surrogate.asked, surrogate)  # a K above the cap is the cap's
        except NoUsableSurrogate as problem:
            reasons.append(str(problem))
    if not found:
        raise NoUsableSurrogate(reasons[-1])
    return found, tuple(reasons)
