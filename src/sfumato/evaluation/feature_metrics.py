"""All distances between synthetic and real images in one feature space, each measured once and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.encoders.encoder import Encoder
from sfumato.evaluation.features import cached_features
from sfumato.evaluation.frechet import Moments, frechet_distance, rank_warning
from sfumato.evaluation.image_sets import ImageSet
from sfumato.evaluation.kernel_distance import kernel_distance
from sfumato.evaluation.memorisation import authenticity, feature_likelihood
from sfumato.evaluation.neighbours import neighbour_metrics

NEIGHBOURS = 5  # k of precision, recall, density and coverage
SCATTERED = 600  # images of each set in the picture of a feature space


class Remembered:
    """Figures that were computed before, by what they were computed from; one JSON file, replaced atomically.

    write: puts an object into that file. A figure of another version of this program is computed anew.
    """

    def __init__(self, path: Path, write: Callable[[dict[str, Any]], object]) -> None:
        self._write, self._version = write, metadata.version("sfumato")
        self._known: dict[str, Any] = {}
        self.computed = 0
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or damaged: measured again
            return
        if isinstance(kept, dict) and kept.get("version") == self._version:
            self._known = dict(kept.get("figures") or {})

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The JSON value of `compute()`, from the file where it has been computed for `key`."""
        if key not in self._known:
            self._known[key] = json.loads(json.dumps(compute()))
            self.computed += 1
            self._write({"version": self._version, "figures": self._known})
        return deepcopy(self._known[key])


def feature_metrics(
    encoder: Encoder,
    generated: ImageSet,
    real: ImageSet,
    held: ImageSet | None,
    *,
    directory: Path,
    remembered: Remembered,
) -> tuple[dict[str, Any], dict[str, list[list[float]]]]:
    """Figures of `generated` against `real` in one feature space, and points for a picture of that space.

    With `held`, "attainable" holds the same figures of those real images: what a perfect generator would
    score with as many images as `held` has. The points are coordinates of up to SCATTERED images of each set
    on the two main axes of the real features, in standard deviations.

    Raises:
        InputError: features are not finite, or the cache under `directory` is of another encoder.
    """
    space = _Space(encoder, directory)

    def once(figure: str, compute: Callable[[], Any], *sets: ImageSet) -> Any:
        key = " ".join([figure, encoder.name, encoder.identity, *(each.content for each in sets)])
        return remembered.get(key, compute)

    def distances(images: ImageSet) -> dict[str, Any]:
        """Of `images` against the real ones."""
        k = min(NEIGHBOURS, len(images) - 1, len(real) - 1)
        frechet = once(
            "frechet", lambda: frechet_distance(space.moments(real), space.moments(images)), real, images
        )
        kid = once(
            "kid", lambda: asdict(kernel_distance(space.features(real), space.features(images))), real, images
        )
        near = once(
            "neighbours", lambda: asdict(neighbour_metrics(space.features(real), space.features(images), k=k)),
            real, images,
        )  # fmt: skip
        return {
            "frechet": frechet, "kid": kid["value"], "kid_interval": [kid["low"], kid["high"]],
            **{name: near[name] for name in ("precision", "recall", "density", "coverage")},
            "neighbours": k,
        }  # fmt: skip

    figures = distances(generated)
    sets = [real, generated] + ([] if held is None else [held])
    copied = once("authenticity", lambda: _authenticity(space, real, generated, held), *sets)
    of_holdout = copied.pop("of_holdout")
    figures |= copied
    if held is not None:
        figures |= once("likelihood", lambda: _likelihood(space, real, held, generated), *sets)
        attainable = {"authenticity": of_holdout, "fld_gap": figures["fld_baseline_gap"]}
        figures["attainable"] = distances(held) | attainable
    points = once("points", lambda: _points(space, *sets), *sets)
    dimension = once("dimension", lambda: int(space.features(real).shape[1]), real)
    named = {"synthetic": generated, "real": real} | ({} if held is None else {"held-out": held})
    warnings = [
        f"{name} images: {warning}"
        for name, images in named.items()
        if (warning := rank_warning(len(images), dimension))
    ]
    if figures["memorised_by_authenticity"] or figures.get("memorised_by_fld"):
        warnings.append(
            "the synthetic images lie closer to the real ones than held-out images do: a sign of memorisation"
        )
    encoded = {"identity": encoder.identity, "dimension": dimension, "distance": encoder.distance}
    return {**figures, "encoder": encoded, "warnings": warnings}, points


class _Space:
    """Features and moments of image sets under one encoder, computed when first asked for."""

    def __init__(self, encoder: Encoder, directory: Path) -> None:
        self._encoder, self._directory = encoder, directory
        self._features: dict[str, np.ndarray] = {}
        self._moments: dict[str, Moments] = {}

    def features(self, images: ImageSet) -> np.ndarray:
        if images.content not in self._features:
            self._features[images.content] = cached_features(
                images.images, self._encoder, directory=self._directory, content=images.content,
                description=images.description,
            )  # fmt: skip
        return self._features[images.content]

    def moments(self, images: ImageSet) -> Moments:
        if images.content not in self._moments:
            self._moments[images.content] = Moments.of(self.features(images))
        return self._moments[images.content]


def _authenticity(
    space: _Space, real: ImageSet, generated: ImageSet, held: ImageSet | None
) -> dict[str, Any]:
    found = authenticity(
        space.features(real),
        space.features(generated),
        holdout=None if held is None else space.features(held),
    )
    return {
        "authenticity": found.value, "of_holdout": found.of_holdout,
        "memorised_by_authenticity": found.memorised,
    }  # fmt: skip


def _likelihood(space: _Space, real: ImageSet, held: ImageSet, generated: ImageSet) -> dict[str, Any]:
    found = feature_likelihood(space.features(real), space.features(held), space.features(generated))
    return {
        "fld": found.value, "fld_on_train": found.on_train, "fld_gap": found.gap,
        "fld_baseline_gap": found.baseline_gap, "memorised_by_fld": found.memorised,
    }  # fmt: skip


def _points(
    space: _Space, real: ImageSet, generated: ImageSet, held: ImageSet | None = None
) -> dict[str, Any]:
    moments = space.moments(real)
    variances, axes = np.linalg.eigh(moments.covariance)
    scale = np.sqrt(np.maximum(variances[[-1, -2]], 1e-12))
    points = {}
    for name, images in (("real", real), ("synthetic", generated), ("held-out", held)):
        if images is None:
            continue
        picked = np.random.default_rng(0).permutation(len(images))[:SCATTERED]
        features = np.asarray(space.features(images)[np.sort(picked)], np.float64)
        points[name] = ((features - moments.mean) @ axes[:, [-1, -2]] / scale).round(3).tolist()
    return points
