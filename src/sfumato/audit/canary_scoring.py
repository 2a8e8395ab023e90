"""How much each canary looks trained on, by the model or by its images, for the bound on epsilon.

Guarantee: none; for the owner of the images only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sfumato.audit.matching import best_matches
from sfumato.audit.membership import loss_scores, sima_scores
from sfumato.audit.similarity import open_extractor
from sfumato.data.decoding import fit_array
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import label_positions

if TYPE_CHECKING:
    from sfumato.audit.canaries import Sealed
    from sfumato.audit.target import Model

EXTRACTORS = ("pixels", "efficientnet-lite0")
SCORES = len(EXTRACTORS) + 2  # and two of the model
Attack = Callable[..., np.ndarray]


def canary_scores(
    model: Model | None,
    generated: np.ndarray | None,
    sealed: Sealed,
    *,
    reference: Model | None = None,
    extractors: Sequence[str] = EXTRACTORS,
    directory: Path | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Name -> float64 [m], higher where a canary looks trained on; for `epsilon_bound.best_bound`.

    generated: uint8 [N, H, W, C]; for each extractor the similarity of a canary to the nearest of them. model: "loss"
    and "sima" (membership.py) with the canary's own label where the model has it, else
    averaged over labels. None leaves these out.

    A bound holds only if a score depends on who is in through the model (or its images) alone. So extractors are
    given by name and opened here, fixed ones: never one that was trained on the training images, nor thresholds
    from them. The same holds for `reference`, a model whose own scores are subtracted, because some images are
    harder than others: it must not have been trained on any canary (the public model before DP training is one).
    Names, like everything here, have to be decided before the coins are looked at; whoever takes the best of
    several scores splits the level among them.

    Raises:
        InputError: neither a model nor images are given.
    """
    if model is None and generated is None:
        raise InputError("canaries need a model or generated images to be looked for in; nothing was audited")
    scores: dict[str, np.ndarray] = {}
    if generated is not None:
        canaries = fitted(sealed.images, generated.shape[1:])
        for spec in extractors:
            extractor = open_extractor(spec)
            found = best_matches(canaries, np.asarray(generated), extractor, directory=directory)
            scores[extractor.name] = found.similarity[:, 0].astype(float)
    if model is not None:
        scores |= {
            "loss": _asked(loss_scores, model, sealed, seed),
            "sima": _asked(sima_scores, model, sealed, seed),
        }
        if reference is not None:
            scores["loss"] -= _asked(loss_scores, reference, sealed, seed)
            scores["sima"] -= _asked(sima_scores, reference, sealed, seed)
    return scores


def _asked(attack: Attack, model: Model, sealed: Sealed, seed: int) -> np.ndarray:
    """The attack's scores of the canaries at the model's size."""
    images = fitted(sealed.images, (*model.size, model.channels))
    return attack(model, images, _labels(model, sealed), seed=seed)


def _labels(model: Model, sealed: Sealed) -> np.ndarray | None:
    """The canaries' labels as the model numbers them; None where it has none, or calls them otherwise."""
    if model.num_labels is None or model.label_names is None or sealed.label_names is None:
        return None
    try:
        positions = label_positions(sealed.label_names, model.label_names, "--canaries")
    except InputError:
        return None
    return positions[np.asarray(sealed.labels)]


def fitted(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The images as training at that size sees them: uint8 [m, *shape]."""
    pixels = np.asarray(images)
    if pixels.shape[1:] == shape:
        return pixels
    size = (shape[0], shape[1])
    return np.stack([fit_array(each, size=size, channels=shape[2], where="canary") for each in pixels])
