"""What the owner wants to know of a release: accuracy on real held-out images, beside floors and a ceiling.

Nothing here is differentially private; it is written under `internal/` only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sfumato.data.files import write_whole
from sfumato.data.images import OwnerImages, ProtectedImages
from sfumato.errors import InputError
from sfumato.evaluation.downstream import downstream_accuracy
from sfumato.report.facts import AccuracyRow, OwnerFacts
from sfumato.synthesis.methods import METHODS
from sfumato.synthesis.planner import FLOOR_IMAGES
from sfumato.synthesis.privimage import PrivImage

CLASSIFIER_IMAGES = 4_000
NO_HOLDOUT = "No labelled holdout was given (--holdout), so nothing was measured on real images."

Images = tuple[np.ndarray, np.ndarray]


def classifiers(method: str) -> int:
    """How many classifiers `figures` trains for a method, with a labelled holdout."""
    kind = METHODS[method]
    floors = 0 if kind.public == "none" else 1 if kind.private == "none" else 2
    return 2 + floors


def check_holdout(holdout: OwnerImages, private: ProtectedImages, spec: str) -> None:
    """Refuse a holdout whose labels the private images lack, before anything is spent."""
    unknown = set(holdout.label_names or ()) - set(private.label_names)
    if private.has_labels and unknown:
        raise InputError(
            f"--holdout {spec} has labels that the private images lack: {', '.join(sorted(unknown)[:10])}; no "
            "budget was spent. Give a holdout with the same labels, or leave it out"
        )


def figures(
    model: PrivImage,
    pictures: np.ndarray,
    labels: np.ndarray,
    *,
    private: ProtectedImages,
    holdout: OwnerImages | None,
    own: Callable[[], OwnerImages],
    seed: int,
    remembered: Path,
) -> OwnerFacts:
    """Accuracy on the holdout of classifiers trained on this release, on its floors and on the real images.

    own: opens the private images for their owner's eyes. remembered: file where each accuracy is kept, so
    that an interrupted call goes on where it stopped.
    """
    if holdout is None or not private.has_labels or not holdout.label_names:
        return OwnerFacts("none", notes=[NO_HOLDOUT])
    position = np.array([private.label_names.index(name) for name in holdout.label_names])
    real, real_labels = np.asarray(holdout.images), position[np.asarray(holdout.labels)]
    known: dict[str, float] = (
        json.loads(remembered.read_text(encoding="utf-8")) if remembered.exists() else {}
    )
    rng = np.random.default_rng(seed)

    def measure(name: str, note: str, made: Callable[[], Images]) -> AccuracyRow:
        if name not in known:
            images, targets = made()
            known[name] = downstream_accuracy(
                images, targets, real, real_labels, num_classes=len(private.label_names), seed=seed, description=name
            )  # fmt: skip
            write_whole(remembered, json.dumps(known).encode())
        return AccuracyRow(name, known[name], note)

    rows = [measure("this release", f"{len(pictures)} synthetic images", lambda: (pictures, labels))]
    if (before := model.public_generator) is not None:
        count = min(len(pictures), FLOOR_IMAGES)
        rows.append(
            measure(
                "public-only generator (floor)", "the same generator before DP-SGD",
                lambda: before.generate(count, seed=seed),
            )
        )  # fmt: skip
    if model.selected is not None:
        images, targets, weights = model.selected
        picked = rng.choice(len(images), CLASSIFIER_IMAGES, p=weights / weights.sum())
        note = "classifier straight on the selected public images, no generator"
        rows.append(
            measure("selected public images (floor)", note, lambda: (images[picked], targets[picked]))
        )

    def private_images() -> Images:
        opened = own()
        return np.asarray(opened.images), np.asarray(opened.labels)

    rows.append(measure("real data (ceiling)", "the private images themselves", private_images))
    notes = []
    best_floor = max((row.accuracy for row in rows[1:-1]), default=0.0)
    if rows[0].accuracy < best_floor:
        notes.append(
            f"The release ({rows[0].accuracy:.1%}) is below its best public floor ({best_floor:.1%}): at this "
            "epsilon the private stage costs more than it brings. Use more budget, more time or more images, or "
            "hand on the public images instead."
        )
    examples = real[np.sort(rng.choice(len(real), min(80, len(real)), replace=False))]
    return OwnerFacts(holdout.description, rows, examples, notes)
