"""The images of an audit: generated ones, training images and held-out ones, at one size, each picture once.

Guarantee: none. Training and held-out images are opened for their owner's eyes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.audit.canaries import Sealed
from sfumato.audit.canary_scoring import fitted
from sfumato.audit.duplicates import duplicate_groups
from sfumato.audit.evidence import Copies
from sfumato.audit.options import AuditOptions
from sfumato.audit.target import Target
from sfumato.data.images import OwnerImages, PublicImages
from sfumato.data.release import InternalWriter
from sfumato.data.sources import default_holdout, open_source
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import common_shape, in_words, label_positions, pixel_digests


@dataclass(frozen=True)
class Sets:
    """The real images of an audit, at the target's size; each picture once, and none in both.

    train, holdout: uint8 [N, H, W, C] and [M, H, W, C]. train_copies, holdout_copies: the further images of these
    pictures. shared: training images that were in both, uint8 [S, H, W, C].
    train_labels, holdout_labels: int64, as the target numbers its labels, -1 where unknown, or None. own_labels: the
    training images' own labels, or None.
    """

    train: np.ndarray
    holdout: np.ndarray
    train_labels: np.ndarray | None
    holdout_labels: np.ndarray | None
    own_labels: np.ndarray | None
    shared: np.ndarray
    train_copies: Copies
    holdout_copies: Copies
    about: dict[str, Any]


def generated_images(target: Target, options: AuditOptions, internal: InternalWriter) -> PublicImages | None:
    """The images that came with the target, at the size that everything is compared at."""
    if target.images is None:
        return None
    source = open_source(target.images)
    if target.model is not None and options.size is None:
        height, width, channels = *target.model.size, target.model.channels
    else:
        channels = None if target.model is None else target.model.channels
        height, width, channels = common_shape(source, options.target, size=options.size, channels=channels)
    return PublicImages(
        source, size=(height, width), channels=channels, cache_dir=internal.directory("cache")
    )


def open_sets(
    options: AuditOptions,
    target: Target,
    generated: PublicImages | None,
    sealed: Sealed | None,
    internal: InternalWriter,
) -> Sets:
    """The training and held-out images, without duplicates and overlaps."""
    if generated is not None:
        size, channels = generated.size, generated.channels
    else:
        assert target.model is not None
        size, channels = target.model.size, target.model.channels
        if options.size is not None:
            size = (options.size, options.size)
    if target.model is not None and size != target.model.size:
        raise InputError(
            f"--size {options.size} is not the model's own size, {in_words((*target.model.size, channels))}; nothing "
            "was audited. Leave --size out"
        )
    held = options.holdout or default_holdout(options.train)
    if held is None:
        raise InputError(
            "--holdout is missing: what counts as a copy is calibrated on images that the target was not trained on; "
            "nothing was audited. Give images of the same kind that --train does not contain"
        )
    shape: dict[str, Any] = {
        "size": size, "channels": channels, "cache_dir": internal.directory("cache"),
        "skip_unreadable": options.skip_unreadable,
    }  # fmt: skip
    train, holdout = OwnerImages(options.train, **shape), OwnerImages(held, **shape)
    for option, images in (("--train", train), ("--holdout", holdout)):
        if not len(images):
            raise InputError(f"{option} has no images; nothing was audited. Give another set")
    mine, theirs = np.asarray(train.images), np.asarray(holdout.images)
    groups = duplicate_groups(mine, theirs)
    # A picture that is in both sets is evidence of nothing; it leaves both, so that they stay exchangeable.
    shared = np.intersect1d(groups.train, groups.holdout)
    rows = _firsts(groups.train, shared)
    if sealed is not None and sealed.kind == "pattern":  # nothing that was held out is like them
        patterns = pixel_digests(fitted(sealed.images, mine.shape[1:]), "leaving canaries out")
        rows = rows[~np.isin(pixel_digests(mine[rows], "looking for canaries"), patterns)]
    held_rows = _firsts(groups.holdout, shared)
    about = {
        "train": {
            "description": train.description, "images": len(mine), "groups": len(np.unique(groups.train)),
            "duplicates": len(mine) - len(np.unique(groups.train)),
        },
        "holdout": {
            "description": holdout.description, "images": len(held_rows), "given": len(theirs),
            "removed_overlap": int(groups.overlapping.sum()),
        },
    }  # fmt: skip
    if not len(rows):
        raise InputError(
            "--train and --holdout hold the same images, so nothing is held out; nothing was audited. Give images that "
            "the target was not trained on as --holdout"
        )
    own = np.asarray(train.labels)[rows] if train.label_names is not None else None
    return Sets(
        mine[rows], theirs[held_rows], _labels(train, rows, target), _labels(holdout, held_rows, target),
        own, mine[np.isin(groups.train, shared)], _copies(mine, groups.train, rows),
        _copies(theirs, groups.holdout, held_rows), about,
    )  # fmt: skip


def _firsts(groups: np.ndarray, without: np.ndarray) -> np.ndarray:
    """The first row of each group, in order, but of those in `without`."""
    found, first = np.unique(groups, return_index=True)
    return np.sort(first[~np.isin(found, without)])


def _copies(images: np.ndarray, groups: np.ndarray, firsts: np.ndarray) -> Copies:
    """The images that share a group with one of `firsts`, without these."""
    order = np.argsort(groups[firsts])
    place = np.minimum(np.searchsorted(groups[firsts], groups, sorter=order), len(firsts) - 1)
    of = order[place] if len(firsts) else np.zeros(len(groups), np.int64)
    further = np.flatnonzero(groups[firsts][of] == groups) if len(firsts) else np.zeros(0, np.int64)
    further = np.setdiff1d(further, firsts)
    return Copies(images[further], of[further])


def _labels(images: OwnerImages, rows: np.ndarray, target: Target) -> np.ndarray | None:
    """Labels as the target numbers them; None where it knows none, or others."""
    names = None if target.model is None else target.model.label_names
    if names is None or images.label_names is None:
        return None
    try:
        position = label_positions(images.label_names, names, "the real images")
    except InputError:
        return None
    own = np.asarray(images.labels)[rows]
    return np.where(own >= 0, position[own], -1)
