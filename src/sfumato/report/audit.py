"""The pages of `sfumato audit`: one for the owner, with private pictures; one without them, for the owner to hand on.

Both rest on private images without a guarantee, so both are `OwnerOnly`. No network, no scripts, prints well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.data.images import OwnerOnly
from sfumato.report.audit_figures import (
    BYSTANDERS,
    MEMBERSHIP,
    attack_name,
    bands,
    closeness,
    count,
    distinct,
    epsilon,
    extraction,
    is_distance,
    limit_status,
    membership,
    percent,
    saturation,
    side,
    skipped_name,
    threshold,
)
from sfumato.report.html import render, strip
from sfumato.report.redaction import redacted
from sfumato.report.words import number

PAIRS_SHOWN = 24  # of each kind
PICTURE_PIXELS = 96  # least side of a picture on the page; larger ones are reduced to MOST_PIXELS
MOST_PIXELS = 160

# verdict -> (sign, word, what it means for somebody who knows none of the terms)
VERDICTS = {
    "pass": ("✓", "PASS", "Within the limits: no attack that was run went further than the policy allows."),
    "fail": ("✕", "FAIL", "Do not release: {why}."),
    "undecided": (
        "?",
        "UNDECIDED",
        "Neither pass nor fail: this audit could not decide. Treat it as not passed.",
    ),
    "none": ("–", "NO VERDICT", "This audit ended without a verdict. Treat it as not passed."),
}
POLICY = {
    "false_match_rate": "share of unseen images that the threshold may take for copies",
    "maximum_excess": "largest excess of matches over what unseen images give",
    "maximum_tpr_at_1_percent_fpr": "largest share of members found when 1 % of unseen images raise a false alarm",
    "epsilon_must_not_exceed_claim": "whether a lower bound on ε above the claimed ε fails",
    "minimum_holdout": "fewest held-out images for a verdict",
    "maximum_blind_auc": "largest AUC of the blind baseline for a verdict",
}
KINDS = {
    "sfumato": "a sfumato model",
    "diffusers": "a diffusers pipeline",
    "images": "a set of generated images; the model itself was not at hand",
}
# Parts of the result that the template reads by itself; a missing one is None.
RESULT_PARTS = (
    "format", "statement", "sentence", "target", "train", "holdout", "extractor", "guidance_extractor",
    "searched", "skipped", "software",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A generated image and its closest reference image, uint8 [H, W, C].

    similarity: higher is closer, on the verdict extractor's scale. repeats: how many generated images match the
    reference's duplicate group.
    """

    generated: np.ndarray
    reference: np.ndarray
    similarity: float
    repeats: int


def audit_report(result: Mapping[str, Any], gallery: Mapping[str, Sequence[Pair]]) -> OwnerOnly[str]:
    """The owner's page as HTML, marked "NOT FOR RELEASE": it shows private images. Write it under `internal/` only.

    result: the content of audit.json; any part may be missing or None, and the page then says so.
    gallery: "train" -> closest generated-training pairs, "holdout" -> as many generated-holdout pairs.
    """
    lower = is_distance(result)
    shown = {
        kind: [_pair(pair, lower) for pair in list(gallery.get(kind) or ())[:PAIRS_SHOWN]]
        for kind in ("train", "holdout")
    }
    left_out = max(0, len(gallery.get("train") or ()) - PAIRS_SHOWN)
    return OwnerOnly(_page(result, shown, left_out=left_out, owner=True))


def redacted_report(result: Mapping[str, Any]) -> OwnerOnly[str]:
    """The page for third parties: no pictures, no names or descriptions of the owner's files (see `redacted`).

    Still `OwnerOnly`, for `internal/` only: its figures were computed on private images without a guarantee, and
    the owner decides whether to hand it over.
    """
    return OwnerOnly(_page(redacted(result), {"train": [], "holdout": []}, left_out=0, owner=False))


def _page(
    result: Mapping[str, Any], gallery: Mapping[str, list[dict[str, Any]]], *, left_out: int, owner: bool
) -> str:
    policy = result.get("policy") or {}
    attacks = {name: of for name, of in (result.get("attacks") or {}).items() if of}
    verdict = result.get("verdict") if result.get("verdict") in VERDICTS else "none"
    sign, word, meaning = VERDICTS[str(verdict)]
    page = {
        "title": "What did this generator memorise?",
        "result": {part: result.get(part) for part in RESULT_PARTS},
        "reasons": [reason for reason in result.get("reasons") or () if reason not in (result.get("sentence") or "")],
        "verdict": {
            "kind": verdict,
            "sign": sign,
            "word": word,
            "meaning": meaning.format(why=_why_it_fails(result, policy)),
        },
        "target_kind": KINDS.get((result.get("target") or {}).get("kind") or "", ""),
        "tiles": _tiles(attacks, result, policy),
        "gallery": gallery,
        "left_out": left_out,
        "closeness": "distance" if is_distance(result) else "similarity",
        "threshold": threshold(result),
        "extraction": extraction(attacks, result, policy),
        "saturation": saturation(attacks),
        "bands": bands(attacks, is_distance(result)),
        "side": side(result, attacks),
        "membership": membership(result, policy),
        "epsilon": epsilon(result),
        "policy": [(key, POLICY.get(key, ""), _plain(value)) for key, value in policy.items()],
        "seconds": _seconds(result.get("seconds") or {}),
        "number": number, "count": count, "percent": percent, "skipped_name": skipped_name,
    }  # fmt: skip
    return render("audit.html", page, owner=owner)


def _why_it_fails(result: Mapping[str, Any], policy: Mapping[str, Any]) -> str:
    """What a failed audit found, in words that need no explanation."""
    # A contradicted claim fails even where the rest is withheld, so it is all that can be said for certain then.
    if policy.get("epsilon_must_not_exceed_claim", True) and epsilon(result)["broken"]:
        return "more of the training images comes out of this generator than its privacy claim (ε) promises"
    beyond = {
        name: of
        for name, of in (result.get("attacks") or {}).items()
        if name not in BYSTANDERS
        and limit_status((of or {}).get("ci"), policy.get("maximum_excess"))[0] == "over"
    }
    if beyond:
        worst = max(beyond, key=lambda name: beyond[name].get("excess") or 0)
        return (
            "this generator repeats images that it was trained on "
            f"({count(beyond[worst].get('matches'))} of {count(beyond[worst].get('num_images'))} generated images "
            "match one)"
        )
    return (
        "one can tell from this generator which images it was trained on, more often than the policy allows"
    )


def _tiles(
    attacks: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any], policy: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """(figure, what it is, where it comes from) of the four figures that a verdict rests on."""
    largest, found, hits = "–", "–", "–"
    by, among, how = "no images were compared", "", "not tried"
    known = {
        name: of for name, of in attacks.items() if of.get("excess") is not None and name not in BYSTANDERS
    }
    if known:
        worst = max(known, key=lambda name: known[name]["excess"])
        largest = percent(known[worst]["excess"])
        by = f"by {attack_name(worst)}{_limit(policy, 'maximum_excess')}"
    counted = {name: many for name, of in attacks.items() if (many := distinct(of)) is not None}
    if counted:
        most = max(counted, key=lambda name: counted[name])
        among = f"by {attack_name(most)}, in {count(attacks[most].get('num_images'))} generated images"
        found = number(counted[most])
    rates = {
        name: rate
        for name, of in (result.get("membership") or {}).items()
        if (rate := (((of or {}).get("tpr") or {}).get("0.01") or {}).get("value")) is not None
    }
    if rates:
        best = max(rates, key=lambda name: rates[name])
        hits = percent(rates[best])
        how = f"by {MEMBERSHIP.get(best, (best,))[0]}{_limit(policy, 'maximum_tpr_at_1_percent_fpr')}"
    told = epsilon(result)
    return [
        (largest, "excess of copies, at worst", by),
        (found, "different training images matched, at most", among),
        (hits, "of members found, at 1 % false alarms", how),
        (
            f"ε ≥ {told['found']}" if told["found"] else "–",
            "lower bound on ε" + (f", {told['claimed']} claimed" if told["claimed"] else ""),
            f"could have shown {told['cap']} at most" if told["cap"] else "no canaries" * (not told["found"]),
        ),
    ]


def _limit(policy: Mapping[str, Any], key: str) -> str:
    if policy.get(key) is None:
        return ""
    return f"; the limit is {percent(policy[key])}".replace(
        " %", "\u00a0%"
    )  # a line never ends between the two


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    return count(value) if isinstance(value, (int, float)) else str(value)


def _pair(pair: Pair, lower: bool) -> dict[str, Any]:
    return {
        "generated": _picture(pair.generated),
        "reference": _picture(pair.reference),
        "closeness": closeness(float(pair.similarity), lower),
        "repeats": int(pair.repeats),
    }


def _picture(image: np.ndarray) -> dict[str, Any]:
    """One image, uint8 [H, W, C], as inline PNG: enlarged by a whole factor, or reduced to MOST_PIXELS."""
    from PIL import Image

    image = np.asarray(image)
    side = max(image.shape[:2])
    if side > MOST_PIXELS:
        height, width = (max(1, round(MOST_PIXELS * edge / side)) for edge in image.shape[:2])
        held = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        image = np.asarray(held.resize((width, height), Image.Resampling.BOX)).reshape(height, width, -1)
    enlarged = max(1, math.ceil(PICTURE_PIXELS / max(image.shape[:2])))
    size_on_page = {"width": enlarged * image.shape[1], "height": enlarged * image.shape[0]}
    return strip(image[None]) | size_on_page


def _seconds(stages: Mapping[str, float | None]) -> list[tuple[str, str, float]]:
    """(stage, time, length of its bar in per cent), their sum last."""
    known = {name: seconds for name, seconds in stages.items() if seconds is not None}
    longest = max(known.values(), default=0.0) or 1.0
    rows = [(name, f"{seconds:,.1f} s", 100 * seconds / longest) for name, seconds in known.items()]
    return [*rows, ("together", f"{sum(known.values()):,.1f} s", 0.0)] if rows else []
