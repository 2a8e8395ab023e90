"""The extraction attacks of an audit, one after the other: what each generated, and what of it matches.

Guarantee: none. Everything here is for the owner of the images only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.audit.calibration import Threshold, calibrate
from sfumato.audit.evidence import Found, References, figures
from sfumato.audit.extraction import cliques, tile_distances
from sfumato.audit.guided_arms import seed_for
from sfumato.audit.matching import best_matches
from sfumato.audit.options import AuditOptions
from sfumato.audit.policy import LEAST_RECOGNISED, attack_level
from sfumato.audit.sets import Sets
from sfumato.audit.side import SideSettings, classifier_conditioned, random_arm, side_attack
from sfumato.audit.similarity import open_extractor
from sfumato.audit.surrogate import NoUsableSurrogate
from sfumato.audit.target import Model, Target
from sfumato.data.images import PublicImages
from sfumato.encoders.encoder import open_encoder
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import label_positions
from sfumato.report.audit import Pair

SYNTHETIC = 4_000  # generated images that the surrogate is made from, at most
RELEASED = 20_000  # images of a release that are looked through, at most
OF_A_LABEL = 500  # images of one label that are searched for cliques (Carlini et al. 2023, section 4.2)
PAIRS = 24  # of each kind in the gallery
NO_MODEL = "it needs the model, and only its images were given"
SAYS = {
    "released": "the images that came with the target",
    "random": "images drawn as the generator's author would, without guidance",
    "side": "SIDE: images drawn towards clusters that were found in the generator's own images",
    "side-shuffled": "a control: SIDE with its cluster labels shuffled",
    "conditioned": "the older attack: images drawn towards the training images' own labels",
    "carlini": "unguided images by Carlini's ratio: nearer than the neighbour's own neighbours",
    "gu": "unguided images by Gu's ratio: the nearest far nearer than the second nearest",
    "cliques": "unguided images that a label gives again and again, one for each group of ten or more",
}
OF_UNGUIDED = ("carlini", "gu", "cliques")  # these look at the images of another attack again


@dataclass
class Extractions:
    """attacks: entries of audit.json by name. images: by attack, uint8 [N, H, W, C]. labels: the model's own, of the
    unguided images, or None. side: what SIDE chose, or why
    it was skipped. gallery: the closest pairs with training and with held-out images."""

    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None
    side: dict[str, Any] | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)
    gallery: dict[str, list[Pair]] = field(default_factory=lambda: {"train": [], "holdout": []})


def extract(
    options: AuditOptions,
    target: Target,
    generated: PublicImages | None,
    sets: Sets,
    references: References,
    threshold: Threshold,
    *,
    rate: float,
    folder: Path,
    timed: Callable[[str], AbstractContextManager[None]],
) -> Extractions:
    """Run the attacks that were asked for; `folder` keeps what they generate, so that the same call resumes.

    threshold: of `references.matches` at the false match rate `rate`; the ratios get their own.
    """
    done = Extractions()
    if generated is not None:
        with timed("reading"):
            done.images["released"], done.labels = released(generated, options.seed)
    if target.model is None:
        for attack in ("side", "conditioned"):
            if "side" in options.chosen:
                done.skipped.append({"attack": attack, "why": NO_MODEL})
        done.side = {"skipped": NO_MODEL} if "side" in options.chosen else None
    else:
        _draw(done, options, target, target.model, generated, sets, references, folder, timed)
    unguided = done.images.get("random", done.images.get("released"))
    again = OF_UNGUIDED if "carlini" in options.chosen and unguided is not None else ()
    if again and done.labels is None:
        done.skipped.append(
            {"attack": "cliques", "why": "it looks at images of one label, and there are no labels"}
        )
        again = again[:2]
    level = attack_level(len(done.images) + len(again))
    found: dict[str, Found] = {}
    with timed("matching"):
        for name, images in done.images.items():
            found[name] = references.search(images, references.matches)
            done.attacks[name] = figures(found[name], threshold, level=level) | {
                "says": SAYS[name],
                "shared": _shared(images, found[name], sets, references, threshold),
            }
        for name in again:
            assert unguided is not None
            if name == "cliques":
                done.attacks |= _cliques(done, unguided, found, references, threshold, rate, level)
                continue
            score = references.carlini if name == "carlini" else references.gu
            own = references.threshold(score, rate)
            if references.recognised(score, own.value) < LEAST_RECOGNISED:
                why = (
                    "held-out images are so close to training images that its threshold would let copies pass"
                )
                done.skipped.append({"attack": name, "why": why})
                continue
            closest = references.search(unguided, score)
            done.attacks[name] = figures(closest, own, level=level) | {"says": SAYS[name]}
    done.gallery = _gallery(done.images, found, references, threshold.value)
    return done


def released(generated: PublicImages, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The images that came with the target, `RELEASED` of them at most, and their labels."""
    rows = _rows(len(generated), RELEASED, seed)
    labels = None if generated.label_names is None else np.asarray(generated.labels)[rows]
    return np.asarray(generated.images)[rows], labels


def _shared(
    images: np.ndarray, found: Found, sets: Sets, references: References, threshold: Threshold
) -> int:
    """How many images match a picture that is in both sets, and so is counted for neither."""
    if not len(sets.shared):
        return 0
    close = references.matches(images, sets.shared)[0] >= threshold.value
    return int((close & found.informative).sum())


def _cliques(
    done: Extractions,
    unguided: np.ndarray,
    found: dict[str, Found],
    references: References,
    threshold: Threshold,
    rate: float,
    level: float,
) -> dict[str, dict[str, Any]]:
    """The entry of Carlini's conditional attack: of each clique of one label its first image, all others no match."""
    assert done.labels is not None
    tiles = open_extractor("tiles")
    near = calibrate(
        best_matches(references.holdout, references.train, tiles).similarity[:, 0], rate=rate
    ).value
    first = np.zeros(len(unguided), bool)
    sizes = []
    try:
        for label in np.unique(done.labels):
            rows = np.flatnonzero(done.labels == label)[:OF_A_LABEL]
            groups = cliques(tile_distances(tiles(unguided[rows])), -near)
            first[rows[[group[0] for group in groups]]] = True
            sizes += [len(group) for group in groups]
    except InputError as problem:
        done.skipped.append({"attack": "cliques", "why": str(problem)})
        return {}
    of = found["random" if "random" in found else "released"]
    blank = int((~of.informative).sum())
    of = replace(of, informative=of.informative & first)
    says = f"{SAYS['cliques']}: {len(sizes)} such groups, {sum(sizes):,} images in them"
    return {"cliques": figures(of, threshold, level=level) | {"filtered": blank, "says": says}}


def _draw(
    done: Extractions,
    options: AuditOptions,
    target: Target,
    model: Model,
    generated: PublicImages | None,
    sets: Sets,
    references: References,
    folder: Path,
    timed: Callable[[str], AbstractContextManager[None]],
) -> None:
    """The images of the attacks that draw from the model, into `done`."""
    common: dict[str, Any] = {
        "num_images": options.num_images, "score_pilot": references.closeness, "seed": options.seed, "folder": folder,
    }  # fmt: skip
    if "side" not in options.chosen:
        _unguided(done, options, model, folder, timed)
        return
    settings = replace(SideSettings(), branch=options.surrogate)
    with timed("surrogate"):
        images, labels = _synthetic(model, generated, settings, options.seed, folder)
    try:
        with timed("side"):
            side = side_attack(
                model, images, labels, open_encoder(options.guidance_features), settings=settings, **common
            )
        for name in ("random", "side", "side-shuffled"):
            done.images[name] = side.arms[name].images
        done.labels = side.arms["random"].labels
        done.side = {
            "clusters": side.clusters,
            "kept": len(side.surrogate),
            "scale": side.scale,
            "pilot": [asdict(point) for point in side.pilot],
            "provenance": side.provenance,
            "guidance_features": options.guidance_features,
            "says": f"{len(side.surrogate)} clusters of its own images guided it at strength {side.scale:g}",
        }
    except NoUsableSurrogate as problem:
        done.side = {"skipped": f"no usable surrogate condition: {problem}"}
        done.skipped.append({"attack": "side", "why": f"no usable surrogate condition: {problem}"})
        _unguided(done, options, model, folder, timed)
    own = sets.train_labels if (model.num_labels or 0) > 1 else sets.own_labels
    if own is None or len(np.unique(own[own >= 0])) < 2:
        why = "it needs training images of two labels or more, labelled as the model is"
        done.skipped.append({"attack": "conditioned", "why": why})
        return
    with timed("conditioned"):
        done.images["conditioned"] = classifier_conditioned(
            model, sets.train, own, settings=settings, **common
        ).arm.images


def _unguided(
    done: Extractions,
    options: AuditOptions,
    model: Model,
    folder: Path,
    timed: Callable[[str], AbstractContextManager[None]],
) -> None:
    with timed("random"):
        arm = random_arm(model, options.num_images, options.seed, folder)
    done.images["random"], done.labels = arm.images, arm.labels


def _synthetic(
    model: Model, generated: PublicImages | None, settings: SideSettings, seed: int, folder: Path
) -> tuple[np.ndarray, np.ndarray | None]:
    """Unguided images of the model for the surrogate, and its own labels of them: those that came with it, if any."""
    if generated is not None and len(generated) >= settings.synthetic_images:
        names, known = model.label_names, generated.label_names
        if names is None or len(names) < 2:
            labels = None if names is None else np.zeros(min(len(generated), SYNTHETIC), np.int64)
            return np.asarray(generated.images)[_rows(len(generated), SYNTHETIC, seed)], labels
        if known is not None and (generated.labels >= 0).all():
            labels = label_positions(known, names, "the target's images")[generated.labels]
            rows = _rows(len(generated), SYNTHETIC, seed)
            return np.asarray(generated.images)[rows], labels[rows]
    arm = random_arm(model, settings.synthetic_images, seed_for(seed, "images for the surrogate"), folder)
    return arm.images, arm.labels


def _rows(count: int, most: int, seed: int) -> np.ndarray:
    """All rows, or `most` of them at random, in random order: the first n are a sample, too."""
    return np.random.default_rng(seed).permutation(count)[:most]


def _gallery(
    images: dict[str, np.ndarray], found: dict[str, Found], references: References, tau: float
) -> dict[str, list[Pair]]:
    """The closest pairs over all attacks, one for each reference."""
    pairs: dict[str, list[Pair]] = {"train": [], "holdout": []}
    for kind, among in (("train", references.train), ("holdout", references.holdout)):
        every = [
            (float(close), name, row, int(index))
            for name, of in found.items()
            for row, (close, index) in enumerate(
                zip(of.similarity, of.index, strict=True) if kind == "train"
                else zip(of.held, of.held_index, strict=True)
            )
            if of.informative[row]
        ]  # fmt: skip
        every.sort(key=lambda each: -each[0])
        matched = Counter(index for close, _, _, index in every if close >= tau)
        shown: set[int] = set()
        for close, name, row, index in every:
            if index not in shown and len(shown) < PAIRS:
                shown.add(index)
                pairs[kind].append(Pair(images[name][row], among[index], close, matched[index]))
    return pairs
