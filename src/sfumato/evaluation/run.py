"""`sfumato evaluate` from its options to summary.json: the order of work, and what may be written where.

Whatever is computed from real images has no guarantee and goes to `internal/evaluation/`. Only where the owner
declares the real images to be public, and they are not those that the release protects, do the figures go
into the release.
"""

from __future__ import annotations

import errno
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sfumato.data.duplicates import near_duplicates
from sfumato.data.files import write_whole
from sfumato.data.images import OwnerImages, OwnerOnly, PublicImages, same_content
from sfumato.data.release import InternalWriter, refuse_private
from sfumato.data.sources import default_holdout, open_source
from sfumato.encoders.encoder import open_encoder
from sfumato.errors import InputError
from sfumato.evaluation.accuracy import downstream_accuracies
from sfumato.evaluation.feature_metrics import Remembered, feature_metrics
from sfumato.evaluation.image_sets import (
    ImageSet,
    common_shape,
    copies,
    first_shape,
    image_set,
    in_words,
    pixel_digests,
    same_images,
)
from sfumato.evaluation.options import EvaluateOptions

FORMAT = "sfumato-evaluation/1"
FEWEST_IMAGES = 4  # that the kernel distance can be estimated from
MOST_LEARNED = 60_000  # images that classifiers are trained or tested on
SMALLEST_SIDE = 8  # pixels, that classifiers can be trained on
# Share of a public reference that may be protected images. Refusing a single one would tell everybody who sees
# the figures that none of the reference's images is protected.
MOST_PROTECTED = 0.1
LABELS_SHOWN, IMAGES_SHOWN = 40, 10
COPIED = (
    "The synthetic images ARE the real ones, image by image: every figure below measures a copy. A distance of 0 "
    "says that they were memorised or handed on, not that they are good."
)

Gallery = list[tuple[str, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, wrapped in `OwnerOnly` unless the real images were declared to be public.

    summary: the content of summary.json. gallery: for each label its name, synthetic and real examples uint8
    [n, H, W, C]. points: feature space -> set -> coordinates for a picture of that space. fresh: whether
    any figure was not known from an earlier call.
    """

    summary: dict[str, Any] | OwnerOnly[dict[str, Any]]
    gallery: Gallery | OwnerOnly[Gallery]
    points: dict[str, Any] | OwnerOnly[dict[str, Any]]
    place: Place
    fresh: bool


class Place:
    """Where results go: `FOLDER/internal/evaluation/`, or `RELEASE/evaluation/` for public references only."""

    def __init__(self, folder: Path, release: Path | None = None) -> None:
        self._internal = InternalWriter(folder)
        self._release = release
        self.working = self._internal.directory("evaluation")  # features and figures to go on from
        self.cache = self._internal.directory("cache")
        self.path = self.working if release is None else release / "evaluation"

    def json(self, name: str, content: Any) -> Path:
        """Write summary.json or the like; a release gets nothing that is for the owner only (`InputError`)."""
        if self._release is None:
            return self._internal.json(f"evaluation/{name}", content)
        refuse_private(content, name)
        return self._public(name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def text(self, name: str, text: str | OwnerOnly[str]) -> Path:
        """Write a page; a release gets nothing that is for the owner only (`InputError`)."""
        if self._release is None:
            return self._internal.text(f"evaluation/{name}", text)
        refuse_private(text, name)
        return self._public(name, str(text))

    def remembered(self) -> Remembered:
        """The figures of earlier calls; those of public references are kept apart."""
        name = "measured.json" if self._release is None else "measured-public.json"
        return Remembered(
            self.working / name, lambda kept: self._internal.json(f"evaluation/{name}", OwnerOnly(kept))
        )

    @property
    def accuracies(self) -> Path:
        """The file that keeps each accuracy that was measured."""
        return self.working / ("accuracies.json" if self._release is None else "accuracies-public.json")

    def _public(self, name: str, text: str) -> Path:
        place = self.path / name
        try:
            self.path.mkdir(exist_ok=True)
            write_whole(place, text.encode())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise InputError(
                f"'{place}' cannot be written ({'the disk is full' if full else error.strerror or error}); the "
                "release is unharmed. Put it right and run the command again"
            ) from None
        return place


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Measure, or go on measuring, and write summary.json.

    Raises:
        InputError: one line for the user; what was already measured is kept.
    """
    options.check()
    target, public = options.target, options.reference_is_public
    source = open_source(target.images)
    height, width, channels = common_shape(
        source, str(options.images), size=options.size, channels=options.channels
    )
    place = Place(options.folder, target.release if public else None)
    shape: dict[str, Any] = {"size": (height, width), "channels": channels, "cache_dir": place.cache}
    kind = PublicImages if public else OwnerImages
    made = PublicImages(source, **shape)
    notes: list[str] = []

    def reference(option: str, spec: str) -> PublicImages:
        opened = open_source(spec)
        own = first_shape(opened)
        if own is not None and own != (height, width, channels):
            notes.append(
                f"The {option} images are {in_words(own)}; they were brought to {in_words((height, width, channels))}."
            )
        return kind(opened, skip_unreadable=options.skip_unreadable, **shape)

    held_spec = options.holdout or default_holdout(options.against)
    real_opened = reference("--against", options.against)
    held_opened = reference("--holdout", held_spec) if held_spec else None
    names = real_opened.label_names or (held_opened.label_names if held_opened else None)
    generated = image_set(made, names, "the synthetic set")
    real = image_set(real_opened, names, "--against")
    held = None if held_opened is None else image_set(held_opened, names, "--holdout")
    if public:
        given = [("--against", real_opened, real)]
        given += [("--holdout", held_opened, held)] if held_opened and held else []
        _refuse_protected(target.run, given, shape)
    notes += _checked(generated, real, held)

    remembered = place.remembered()
    features, points = {}, {}
    for spec in options.feature_specs:
        encoder = open_encoder(spec)
        if encoder.name in features:
            raise InputError(
                f"--features gives two spaces the name {encoder.name}; name one of them otherwise, as NAME=PATH"
            )
        features[encoder.name], points[encoder.name] = feature_metrics(
            encoder, generated, real, held, directory=place.working / "features", remembered=remembered
        )  # fmt: skip
    before = _read(place.accuracies)
    accuracy, said = _accuracy(generated, real, held, names, range(options.seeds), place.accuracies)
    summary = {
        "format": FORMAT,
        "statement": _statement(public),
        "reference_is_public": public,
        "synthetic": _about(generated),
        "against": _about(real),
        "holdout": None if held is None else _about(held),
        "size": [height, width],
        "channels": channels,
        "label_names": None if names is None else list(names),
        "copies": {
            "synthetic": copies(generated, real),
            "holdout": 0 if held is None else copies(held, real),
        },
        "features": features,
        **accuracy,
        "notes": notes + said,
        "software": {name: metadata.version(name) for name in ("sfumato", "torch", "numpy", "scikit-learn")},
    }
    gallery, fresh = (
        _gallery(generated, real, names, show_real=not public),
        remembered.computed > 0 or before != _read(place.accuracies),
    )
    if public:
        points = {space: {"synthetic": of["synthetic"]} for space, of in points.items() if "synthetic" in of}
        place.json("summary.json", summary)
        return Evaluation(summary, gallery, points, place, fresh)
    place.json("summary.json", OwnerOnly(summary))
    return Evaluation(OwnerOnly(summary), OwnerOnly(gallery), OwnerOnly(points), place, fresh)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _statement(public: bool) -> str:
    if public:
        return (
            "The release was compared with images that its owner declared to be public. If they are, the guarantee of "
            "the release stands as it is."
        )
    return (
        "These figures were computed from real images without any guarantee. They are NOT differentially private: "
        "for the owner of the images only, not for release."
    )


def _checked(generated: ImageSet, real: ImageSet, held: ImageSet | None) -> list[str]:
    """Refuse sets that cannot be compared; notes on those that can, but mean something else than they seem."""
    sets = {"the synthetic set": generated, "--against": real} | ({"--holdout": held} if held else {})
    for option, images in sets.items():
        if len(images) < FEWEST_IMAGES:
            raise InputError(
                f"{option} has {len(images)} image{'s' if len(images) > 1 else ''}, too few to measure anything; "
                f"nothing was measured. Give {FEWEST_IMAGES} or more, better thousands"
            )
    notes = []
    if same_images(generated, real):
        notes.append(COPIED)
    elif (count := copies(generated, real)) > 0:
        notes.append(
            f"{count:,} of the {len(generated):,} synthetic images are, pixel by pixel, one of the real images: "
            "they were memorised or handed on."
        )
    if held is not None:
        shared = copies(held, real)
        if same_images(held, real) or shared == len(held):
            raise InputError(
                "--holdout holds no image that --against lacks, so nothing is held out; nothing was measured. Give "
                "images that the release was not made from, or leave it out"
            )
        if shared:
            notes.append(
                f"{shared:,} of the {len(held):,} held-out images are also among the real images: what is measured "
                "with the holdout looks better than it is."
            )
        if not 0.9 <= len(held) / len(generated) <= 1.1:
            notes.append(
                f"There are {len(generated):,} synthetic and {len(held):,} held-out images. The Fréchet distance and "
                "coverage depend on the number, so in these the two columns are not quite comparable."
            )
    return notes


def _accuracy(
    generated: ImageSet,
    real: ImageSet,
    held: ImageSet | None,
    names: Sequence[str] | None,
    seeds: range,
    remembered: Path,
) -> tuple[dict[str, Any], list[str]]:
    """ "accuracy", and its "ceiling" and "floor" where there are any, and what is to be said about them."""
    nothing: dict[str, Any] = {"accuracy": {}}
    if held is None:
        return nothing, [
            "Accuracy was skipped: it needs real labelled images that were held out (--holdout)."
        ]
    tested, trained = _labelled(held), _labelled(generated)
    lacking = [
        name
        for name, found in (("the synthetic images", trained), ("the held-out images", tested))
        if found is None
    ]
    if names is None or tested is None or trained is None:
        return nothing, [f"Accuracy was skipped: {' and '.join(lacking)} have no labels."]
    if min(generated.images.shape[1:3]) < SMALLEST_SIDE:
        return nothing, [f"Accuracy was skipped: classifiers need {SMALLEST_SIDE} pixels a side or more."]
    if len(np.unique(trained[1])) < 2:
        return nothing, [
            "Accuracy was skipped: the synthetic images have one label only, nothing to tell apart."
        ]
    notes = []
    if missing := [name for label, name in enumerate(names) if label not in trained[1]]:
        notes.append(
            f"No synthetic image has the label {', '.join(missing[:10])}{', …' if missing[10:] else ''}: no "
            "classifier can learn it from them."
        )
    if max(map(len, (generated, real, held))) > MOST_LEARNED:
        notes.append(
            f"Classifiers were trained and tested on {MOST_LEARNED:,} images of a set at most, at random."
        )
    common: dict[str, Any] = {"num_classes": len(names), "seeds": seeds, "remembered": remembered}
    found = {
        "accuracy": _plain(downstream_accuracies(*trained, *tested, description="synthetic", **common)),
        "floor": {"accuracy": max(Counter(tested[1].tolist()).values()) / len(tested[1])},
    }
    own = _labelled(real)
    if own is not None and len(np.unique(own[1])) > 1:
        measured = downstream_accuracies(*own, *tested, description="real", **common)
        found["ceiling"] = {"accuracy": _plain(measured)}
    return found, notes


def _plain(accuracies: dict[str, Any]) -> dict[str, Any]:
    return {name: asdict(each) | {"seeds": list(each.seeds)} for name, each in accuracies.items()}


def _labelled(images: ImageSet) -> tuple[np.ndarray, np.ndarray] | None:
    """The images that have a label, at random no more than MOST_LEARNED, and the labels; None without any."""
    if images.labels is None:
        return None
    labels, pixels = np.asarray(images.labels), np.asarray(images.images)
    rows = np.flatnonzero(labels >= 0)
    if len(rows) > MOST_LEARNED:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_LEARNED, replace=False))
    if len(rows) == len(images):
        return pixels, labels
    return (pixels[rows], labels[rows]) if len(rows) else None


def _about(images: ImageSet) -> dict[str, Any]:
    labelled = None if images.labels is None else int((np.asarray(images.labels) >= 0).sum())
    return {"description": images.description, "images": len(images), "labelled": labelled}


def _gallery(generated: ImageSet, real: ImageSet, names: Sequence[str] | None, *, show_real: bool) -> Gallery:
    """Examples for each label, at random, of both sets; without labels one row of as many as fit."""
    rng = np.random.default_rng(0)

    def some(images: ImageSet, label: int | None) -> np.ndarray:
        rows = np.arange(len(images))
        if label is not None and images.labels is not None:
            rows = np.flatnonzero(np.asarray(images.labels) == label)
        most = IMAGES_SHOWN if label is not None else 6 * IMAGES_SHOWN
        if images is real and not show_real:
            most = (
                0  # a page that may be handed on shows no picture of a reference, whoever declared it public
            )
        return images.images[np.sort(rng.permutation(rows)[:most])]

    if names is None or generated.labels is None or real.labels is None:
        return [("", some(generated, None), some(real, None))]
    made = set(np.unique(generated.labels).tolist())
    shown = sorted(range(len(names)), key=lambda label: label not in made)[:LABELS_SHOWN]
    return [(names[label], some(generated, label), some(real, label)) for label in sorted(shown)]


def _refuse_protected(
    run: Path | None, given: list[tuple[str, PublicImages, ImageSet]], shape: dict[str, Any]
) -> None:
    """Raise `InputError` when what was declared to be public is what the run protects, or a tenth of it is."""
    if run is None:
        return  # a release that was handed on: nobody here knows what it protects
    config, seen = run / "config.yaml", run / "internal" / "protected.json"
    try:
        options = yaml.safe_load(config.read_text(encoding="utf-8"))
        spec = str(options["private"])
        if seen.is_file():  # where they were, whatever folder this command is run in
            spec = str(json.loads(seen.read_text(encoding="utf-8"))["private"])
        skip = bool(options.get("skip_unreadable", False))
        private = OwnerImages(spec, skip_unreadable=skip, **shape)
    except (
        InputError,
        OSError,
        UnicodeDecodeError,
        yaml.YAMLError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise InputError(
            f"--reference-is-public: the images that '{run}' protects cannot be opened to make sure that they are not "
            f"what was declared public ({' '.join(str(error).split())}); nothing was measured. Run the command where "
            "the run was made"
        ) from None
    protected = pixel_digests(np.asarray(private.images), "checking the protected images")
    for option, opened, images in given:
        same_content(private, opened)
        alike = near_duplicates(opened, private).value >= 0
        count = int((alike | np.isin(images.digests, protected)).sum())
        said = f"{option}: {count:,} of its {len(images):,} images are among those that the run protects, or nearly"
        if count >= MOST_PROTECTED * len(images):
            raise InputError(
                f"{said}, so it is not public; nothing was measured. Take them out, or leave --reference-is-public out"
            )
        if count:
            print(f"note, for you alone: {said}; take them out unless they are public", file=sys.stderr)
