"""`sfumato audit` from its options to a verdict: the order of work, and what is written where.

An audit looks at private images without a guarantee. All it finds goes to `internal/audit/`, wrapped in
`OwnerOnly`; the release's writer refuses it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.audit.attacks import NO_MODEL, OF_UNGUIDED, Extractions, extract, released
from sfumato.audit.blind import blind_baseline
from sfumato.audit.calibration import TooFewHeldOut
from sfumato.audit.canaries import Sealed, check_training, open_sealed
from sfumato.audit.canary_scoring import canary_scores
from sfumato.audit.copy_encoder import train_copy_encoder
from sfumato.audit.epsilon_bound import best_bound
from sfumato.audit.evidence import References
from sfumato.audit.guided_arms import saved_arrays
from sfumato.audit.membership import loss_scores, membership, pia_scores, secmi_scores, sima_scores
from sfumato.audit.options import AuditOptions
from sfumato.audit.policy import exit_status, judge, read_policy
from sfumato.audit.provenance import content_of, identity_of
from sfumato.audit.sets import Sets, generated_images, open_sets
from sfumato.audit.similarity import Extractor, open_extractor
from sfumato.audit.target import Target, open_target
from sfumato.data.images import OwnerOnly, PublicImages
from sfumato.data.records import fingerprint
from sfumato.data.release import InternalWriter
from sfumato.errors import InputError
from sfumato.report.audit import audit_report, redacted_report

FORMAT = "sfumato-audit/1"
STATEMENT = (
    "This audit looked at private images without any guarantee. Nothing in it is differentially private: for the "
    "owner of the images only, not for release."
)
MEMBERSHIP = {"loss": loss_scores, "secmi": secmi_scores, "pia": pia_scores, "sima": sima_scores}
MEMBERS = 1_000  # training and held-out images that membership is inferred of, at most
DELTA = 1e-5  # of the lower bound on ε where the target claims none
PACKAGES = ("sfumato", "torch", "diffusers", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Audit:
    """result: the content of audit.json. folder: where it lies, with report.html and report-redacted.html.
    exit_status: 0 pass, 3 fail, 4 undecided."""

    result: OwnerOnly[dict[str, Any]]
    folder: Path
    exit_status: int


def audit(options: AuditOptions, target: Target | None = None) -> Audit:
    """Audit, or go on auditing, and write audit.json and both reports under `internal/audit/`.

    target: in the place of the one that the options name.

    Guarantee: none. What is returned and written is for the owner of the images only.

    Raises:
        InputError: one line for the user; what was already generated is kept.
    """
    options.check()
    policy = read_policy(options.policy)
    target = target or open_target(options.target)
    if target.model is not None and torch.cuda.is_available():
        target.model.network.to("cuda")
    sealed = None if options.canaries is None else open_sealed(options.canaries)
    internal = InternalWriter(options.folder)
    work = internal.directory("audit/work")
    seconds: dict[str, float] = {}
    with _timed(seconds, "images"):
        if sealed is not None:
            check_training(sealed, options.train, cache_dir=internal.directory("cache"))
        generated = generated_images(target, options, internal)
        sets = open_sets(options, target, generated, sealed, internal)
    with _timed(seconds, "extractor"):
        extractor = _extractor(options, sets, work)
    result: dict[str, Any] = {
        "format": FORMAT,
        "statement": STATEMENT,
        "target": {
            "description": target.description, "kind": target.kind, "identity": target.identity,
            "images": None if generated is None else len(generated),
        },
        **sets.about,
        "extractor": _about(extractor),
        "threshold": None,
        "attacks": {},
        "side": {"skipped": "it was not asked for"},
        "membership": {},
        "blind": None,
        "epsilon_lower_bound": None,
        "epsilon_claimed": None if target.claim is None else vars(target.claim),
        "policy": vars(policy),
        "skipped": [],
    }  # fmt: skip
    found = Extractions()
    references = None
    if len(sets.holdout):
        references = References(
            sets.train,
            sets.holdout,
            extractor,
            seed=options.seed,
            directory=work / "features",
            train_copies=sets.train_copies,
            holdout_copies=sets.holdout_copies,
        )
    try:
        if references is None:
            raise TooFewHeldOut("no held-out image is left that the training images do not hold, too")
        with _timed(seconds, "calibration"):
            threshold = references.threshold(references.matches, policy.false_match_rate)
            recognised = references.recognised(references.matches, threshold.value)
        result["threshold"] = vars(threshold) | {"recognised": recognised}
        found = extract(
            options, target, generated, sets, references, threshold, rate=policy.false_match_rate, folder=work,
            timed=lambda stage: _timed(seconds, stage),
        )  # fmt: skip
    except TooFewHeldOut as error:
        result["skipped"].append({"attack": "extraction", "why": str(error)})
    result |= {"attacks": found.attacks, "side": found.side or result["side"]}
    result["skipped"] += found.skipped
    with _timed(seconds, "membership"):
        result |= _membership(options, target, sets, work, result["skipped"])
    if sealed is not None:
        with _timed(seconds, "canaries"):
            result["epsilon_lower_bound"] = _bound(sealed, options, target, generated, found, work)
    result["searched"] = _searched(options, result)
    verdict = judge(result, policy)
    result |= {"verdict": verdict.verdict, "sentence": verdict.sentence, "reasons": list(verdict.reasons)}
    result["seconds"] = {stage: round(spent, 1) for stage, spent in seconds.items()}
    result["software"] = {name: metadata.version(name) for name in PACKAGES}
    internal.json("audit/audit.json", OwnerOnly(result))
    internal.text("audit/report.html", audit_report(result, found.gallery))
    internal.text("audit/report-redacted.html", redacted_report(result))
    return Audit(OwnerOnly(result), internal.path / "audit", exit_status(verdict.verdict))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started


def _extractor(options: AuditOptions, sets: Sets, work: Path) -> Extractor:
    if options.similarity != "copy":
        return open_extractor(options.similarity)
    return train_copy_encoder(sets.train, sets.holdout, seed=options.seed, saved=work / "copy.safetensors")


def _membership(
    options: AuditOptions, target: Target, sets: Sets, work: Path, skipped: list[dict[str, str]]
) -> dict[str, Any]:
    """The entries "membership" and "blind" of audit.json."""
    found: dict[str, Any] = {"membership": {}, "blind": None}
    try:
        found["blind"] = vars(blind_baseline(sets.train, sets.holdout, options.seed))
    except InputError as error:
        skipped.append({"attack": "blind baseline", "why": str(error)})
    if "membership" not in options.chosen:
        return found
    if target.model is None:
        skipped.append({"attack": "membership", "why": NO_MODEL})
        return found
    if min(len(sets.train), len(sets.holdout)) < 2:
        skipped.append({"attack": "membership", "why": "it needs held-out images to compare with"})
        return found
    # With labels on one side only, the model would be asked in two ways, and the difference pass for membership.
    labelled = all(
        labels is not None and bool((labels >= 0).all())
        for labels in (sets.train_labels, sets.holdout_labels)
    )
    sides = []
    for images, labels in ((sets.train, sets.train_labels), (sets.holdout, sets.holdout_labels)):
        rows = np.random.default_rng(options.seed).permutation(len(images))[:MEMBERS]
        sides.append((images[rows], labels[rows] if labelled and labels is not None else None))
    parts = [identity_of(target.model), str(options.seed)]
    parts += [content_of(images, "membership: checking") for images, _ in sides]
    parts += [b"" if labels is None else labels.tobytes() for _, labels in sides]
    for name, attack in MEMBERSHIP.items():
        model = target.model
        kept = saved_arrays(
            work / f"membership-{name}-{fingerprint(parts)[:16]}.npz",
            lambda attack=attack, model=model: {
                side: attack(model, images, labels, seed=options.seed)
                for side, (images, labels) in zip(("members", "nonmembers"), sides, strict=True)
            },
        )
        found["membership"][name] = asdict(membership(kept["members"], kept["nonmembers"]))
    return found


def _bound(
    sealed: Sealed,
    options: AuditOptions,
    target: Target,
    generated: PublicImages | None,
    found: Extractions,
    work: Path,
) -> dict[str, Any]:
    """The entry "epsilon_lower_bound" of audit.json: the best of a fixed set of scores, each at its share of 5 %."""
    drawn = [found.images[name] for name in ("released", "random") if name in found.images]
    if not drawn and generated is not None:  # too few held-out images for extraction: canaries need none
        drawn = [released(generated, options.seed)[0]]
    scores = canary_scores(
        target.model, np.concatenate(drawn) if drawn else None, sealed, directory=work / "features",
        seed=options.seed,
    )  # fmt: skip
    delta = DELTA if target.claim is None else target.claim.delta
    level = 1 - 0.05 / len(scores)
    bounds = {
        name: best_bound(score, np.asarray(sealed.included), delta=delta, level=level)
        for name, score in scores.items()
    }
    best = max(bounds, key=lambda name: bounds[name].epsilon)
    of = bounds[best]
    return {
        "epsilon": _down(of.epsilon), "score": best, "correct": of.correct, "guesses": of.guesses,
        "canaries": of.canaries,
        "cap": _down(of.cap), "level": 0.95, "delta": delta,
        "scores": {name: bound.epsilon for name, bound in bounds.items()},
    }  # fmt: skip


def _down(bound: float) -> float:
    """Four digits, never more than it was."""
    return math.floor(bound * 1e4) / 1e4


def _about(extractor: Extractor) -> dict[str, str]:
    return {name: getattr(extractor, name) for name in ("name", "identity", "preprocessing", "direction")}


def _searched(options: AuditOptions, result: dict[str, Any]) -> str:
    images = sum(of["num_images"] for name, of in result["attacks"].items() if name not in OF_UNGUIDED)
    return (
        f"{images:,} generated images were compared with {result['train']['groups']:,} different training images in "
        f"{result['extractor']['name']}, with flips"
        f"{' and shifts by a pixel' if result['extractor']['name'] in ('pixels', 'tiles') else ''}. Copies rarer than "
        f"three in {options.num_images:,} images of an attack, copies that were cropped, turned, made brighter or "
        "of less contrast, and likeness that this measure does not see were not searched for; other attacks than those "
        "listed were not tried."
    )
