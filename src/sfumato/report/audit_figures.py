"""The figures of an audit as the page tells them: counts beside shares, intervals, tracks and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.report.charts import line_chart, roc_chart, span, track
from sfumato.report.words import claim, delta_claim, number

ATTACKS = {
    "released": ("released images", "the images that came with the generator"),
    "random": ("plain sampling", "the generator is used as anybody would use it"),
    "side": ("SIDE", "the generator is steered towards groups of its own images, where memorised ones gather"),
    "side-shuffled": ("SIDE, shuffled groups", "control: the same steering with meaningless groups"),
    "conditioned": ("steered by real labels", "a stronger attacker, for comparison: knows the training images' labels"),
    "carlini": ("Carlini's ratio", "counts an image much closer to a training image than others like it are"),
    "cliques": ("Carlini's cliques", "counts images that the generator makes again and again"),
    "gu": ("Gu's ratio", "counts an image whose nearest training image is much closer than the second nearest"),
}  # fmt: skip
SKIPPED = {"extraction": "all that look for copies", "membership": "membership inference"}
BYSTANDERS = ("conditioned",)  # shown, not judged: its classifier has seen the training images
JUDGED_NOT = ("", "for comparison, not judged")
RATIOS = ("carlini", "gu")  # their similarity is minus a ratio, whatever the extractor's is
MEMBERSHIP = {
    "loss": ("loss", "how well the model removes noise from the image"),
    "secmi": ("SecMI", "error after one step forth and back along the sampler"),
    "pia": ("PIA", "error against the noise that the model itself predicts for the clean image"),
    "sima": ("SimA", "size of the noise that the model predicts for the clean image"),
}


def distinct(of: Mapping[str, Any]) -> int | None:
    """How many different training images (duplicate groups) an attack matched."""
    if of.get("distinct") is not None:
        return of["distinct"]
    known = of.get("ums") is not None and of.get("num_images") is not None
    return round(of["ums"] * of["num_images"]) if known else None


def threshold(result: Mapping[str, Any]) -> dict[str, Any] | None:
    of = result.get("threshold")
    if not of:
        return None
    holdout, achieved = of.get("holdout"), of.get("achieved")
    reached = None if holdout is None or achieved is None else round(achieved * holdout)
    return {
        "value": closeness(of.get("value"), is_distance(result)),
        "at": "at most" if is_distance(result) else "at least",
        "rate": percent(of.get("rate")),
        "achieved": percent(achieved),
        "interval": _interval((of.get("low"), of.get("high"))),
        "reached": count(reached),
        "holdout": count(holdout),
    }


def extraction(
    attacks: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any], policy: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Rows of counts and interval tracks for each attack, on common axes."""
    if not attacks:
        return None
    chance = (result.get("threshold") or {}).get("achieved")
    maximum = policy.get("maximum_excess")
    every = list(attacks.values())
    matched = span([end for of in every for end in (of.get("ams"), of.get("ums"), *_ends(of.get("ams_ci")))])
    excess = span([maximum, *(end for of in every for end in (of.get("excess"), *_ends(of.get("ci"))))])
    rows = []
    for name, of in attacks.items():
        ums, ratio = of.get("ums"), name in RATIOS and of.get("threshold") is not None
        rows.append(
            {
                "name": attack_name(name),
                "key": name if attack_name(name).lower() != name else "",
                "meaning": ATTACKS[name][1] if name in ATTACKS else of.get("says") or "",
                "own_threshold": f"ratio of {closeness(of['threshold'], True)} or less" if ratio else "",
                "filtered": of.get("filtered") or 0,
                "images": count(of.get("num_images")),
                "matches": count(of.get("matches")),
                "ams": percent(of.get("ams")),
                "ams_interval": _interval(of.get("ams_ci")),
                "ams_track": track(of.get("ams"), *_ends(of.get("ams_ci")), matched, {"chance": chance}),
                "distinct": count(distinct(of)),
                "ums": percent(ums),
                "ums_track": track(ums, None, None, matched),
                "excess": percent(of.get("excess")),
                "excess_interval": _interval(of.get("ci")),
                "excess_track": track(of.get("excess"), *_ends(of.get("ci")), excess, {"zero": 0.0, "limit": maximum}),
                "level": "" if of.get("level") is None else f"{100 * of['level']:.3g} %",
                "status": JUDGED_NOT if name in BYSTANDERS else limit_status(of.get("ci"), maximum),
            }
        )  # fmt: skip
    return {
        "rows": rows,
        "chance": percent(chance) if chance is not None else "",
        "maximum": percent(maximum) if maximum is not None else "",
        "matched_axis": ("0", percent(matched[1])),
        "excess_axis": ("0" if excess[0] == 0 else percent(excess[0]), percent(excess[1])),
    }


def limit_status(ends: Sequence[float | None] | None, maximum: float | None) -> tuple[str, str]:
    """(class, words): where an interval lies beside its limit."""
    low, high = _ends(ends)
    if low is None or high is None or maximum is None:
        return "", ""
    if low > maximum:
        return "over", "✕ above the limit"
    return ("within", "✓ within the limit") if high <= maximum else ("across", "? reaches across the limit")


def saturation(attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Charts of distinct training images found, and of the share that matches, over the images generated."""
    found: dict[str, list[tuple[float, float]]] = {}
    share: dict[str, list[tuple[float, float]]] = {}
    for name, of in attacks.items():
        points = [point for point in of.get("saturation") or () if point.get("num_images")]
        if points:
            said = attack_name(name)
            share[said] = [(p["num_images"], p["ams"]) for p in points if p.get("ams") is not None]
            different = [
                (p["num_images"], p["ums"] * p["num_images"]) for p in points if p.get("ums") is not None
            ]
            found[said] = [(0.0, 0.0), *different]
    if not found:
        return None
    return {
        "found": line_chart(found, across="images generated", up="different training images found"),
        "share": line_chart(share, across="images generated", up="images that match", percent=True),
    }


def bands(attacks: Mapping[str, Mapping[str, Any]], lower: bool) -> list[dict[str, Any]]:
    """A table of exclusive bands of closeness for each attack that matched anything, closest band first."""
    tables = []
    for name, of in attacks.items():
        closest_first = sorted(of.get("bands") or (), key=_low_end, reverse=True)
        if any(band.get("ams") for band in closest_first):
            turned = lower or name in RATIOS
            tables.append(
                {
                    "name": attack_name(name),
                    "measure": "ratio" if name in RATIOS else "distance" if lower else "similarity",
                    "rows": [
                        (
                            _band(band.get("low"), band.get("high"), turned),
                            percent(band.get("ams")),
                            percent(band.get("ums")),
                        )
                        for band in closest_first
                    ],
                }
            )
    return tables


def _low_end(band: Mapping[str, Any]) -> float:
    return -math.inf if band.get("low") is None else band["low"]


def _band(low: float | None, high: float | None, lower: bool) -> str:
    least, most = (high, low) if lower else (low, high)
    texts = [
        None if end is None or not math.isfinite(end) else closeness(end, lower) for end in (least, most)
    ]
    if texts[0] is None or texts[1] is None:
        return f"up to {texts[1]}" if texts[1] else f"{texts[0]} and more" if texts[0] else "all"
    return f"{texts[0]} to {texts[1]}"


def side(result: Mapping[str, Any], attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    of = result.get("side")
    if not of:
        return None
    own = (attacks.get("side") or {}).get("matches")
    against = []
    for name in ("random", "side-shuffled", "conditioned"):
        other = (attacks.get(name) or {}).get("matches")
        if own is not None and other is not None:
            ratio = f", {own / other:.2g} times as many" if other else ""
            against.append(
                f"SIDE against {attack_name(name)}: {number(own)} matches against {number(other)}{ratio}."
            )
    return {
        "skipped": of.get("skipped") or "",
        "says": of.get("says") or "",
        "facts": [
            (said, count(of[key]))
            for key, said in (("clusters", "groups asked for"), ("kept", "groups coherent enough to steer by"),
                              ("scale", "strength of the steering, λ"))
            if of.get(key) is not None
        ],
        "pilot": [
            tuple(count(row.get(key)) for key in ("clusters", "scale", "score")) for row in of.get("pilot") or ()
        ],
        "against": against,
    }  # fmt: skip


def membership(result: Mapping[str, Any], policy: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of AUC and true positive rates with counts, the blind baseline last, and the ROC chart."""
    attacks = {name: of for name, of in (result.get("membership") or {}).items() if of}
    blind = result.get("blind") or {}
    if not attacks and not blind:
        return None
    limit = policy.get("maximum_tpr_at_1_percent_fpr")
    rows = []
    for name, of in attacks.items():
        rates = [(of.get("tpr") or {}).get(rate) or {} for rate in ("0.001", "0.01")]
        cells = [
            {
                "value": percent(at["value"]),
                "interval": _interval((at.get("low"), at.get("high"))),
                "hits": f"{count(at.get('true_positives'))} of {count(of.get('members'))}",
                "alarms": f"{count(at.get('false_positives'))} of {count(of.get('nonmembers'))}",
            }
            if at.get("value") is not None
            else None
            for at in rates
        ]
        rows.append(_auc(MEMBERSHIP.get(name, (name, "")), of.get("auc"), of.get("auc_ci")) | {"tpr": cells})
    if blind:
        said = ("blind baseline", "never sees the generator: near 0.5, or the two sets differ by themselves")
        rows.append(_auc(said, blind.get("auc"), blind.get("ci")) | {"tpr": []})
    unseen = max((of.get("nonmembers") or 0 for of in attacks.values()), default=0)
    curves = {
        MEMBERSHIP.get(name, (name, ""))[0]: [(x, y) for x, y in of.get("roc") or ()]
        for name, of in attacks.items()
    }
    return {
        "rows": rows,
        "roc": roc_chart(curves, least=1 / unseen if unseen else 0.01),
        "limit": "" if limit is None else percent(limit),
        "too_few": 0 < unseen < 1000,
        "unseen": number(unseen),
    }  # fmt: skip


def _auc(said: tuple[str, str], auc: float | None, ends: Sequence[float | None] | None) -> dict[str, Any]:
    low, high = _ends(ends)
    return {
        "name": said[0],
        "meaning": said[1],
        "auc": "–" if auc is None else f"{auc:.3f}",
        "interval": "" if low is None or high is None else f"{low:.3f} to {high:.3f}",
        "track": track(auc, low, high, (0.0, 1.0), {"chance": 0.5}, base=0.5),
    }


def epsilon(result: Mapping[str, Any]) -> dict[str, Any]:
    claimed, bound = result.get("epsilon_claimed") or {}, result.get("epsilon_lower_bound") or {}
    said, found, cap = claimed.get("epsilon"), bound.get("epsilon"), bound.get("cap")
    both = said is not None and found is not None
    at, bound_at = claimed.get("delta"), bound.get("delta")
    # A smaller δ belongs to a larger ε: a bound at a smaller one says nothing of the claim.
    smaller = at is not None and bound_at is not None and bound_at < at * (1 - 1e-9)
    comparable = both and not smaller and claimed.get("relation") != "replace_one"
    broken = comparable and said is not None and found is not None and found > said
    axis = span([said, found, cap])
    digits = 2
    while broken and digits < 9 and math.floor(found * 10**digits) / 10**digits <= said:
        digits += 1
    claimed_text = (
        "" if said is None else "∞" if math.isinf(said) else f"{said:.{digits}f}" if broken else claim(said)
    )
    found_text = _down(found, digits)
    bars = [
        ("claimed", "ε that the generator's certificate promises not to exceed", claimed_text, said),
        ("lower bound", "ε that the canaries show was spent at the least", found_text, found),
        ("cap", "the largest bound that this many canaries could have shown", _down(cap, 2), cap),
    ]
    return {
        "bars": [(*bar, track(value, None, None, axis)) for *bar, value in bars if bar[2]],
        "claimed": claimed_text,
        "unit": claimed.get("unit") or "",
        "delta": "" if claimed.get("delta") is None else delta_claim(claimed["delta"]),
        "found": found_text,
        "broken": broken,
        "incomparable": both and not comparable,
        "cap": _down(cap, 2),
        "level": "" if bound.get("level") is None else f"{100 * bound['level']:.3g} %",
        "bound_delta": "" if bound.get("delta") is None else f"{bound['delta']:.2g}",
        "score": bound.get("score") or "",
        "counts": tuple(count(bound.get(key)) for key in ("correct", "guesses", "canaries")),
        "scores": [(name, _down(value, 2)) for name, value in (bound.get("scores") or {}).items()],
    }


def _down(epsilon: float | None, digits: int) -> str:
    """A lower bound as text, rounded down: the page never shows more than was proved."""
    if epsilon is None:
        return ""
    return (
        "∞" if math.isinf(epsilon) else f"{math.floor(epsilon * 10**digits + 1e-9) / 10**digits:.{digits}f}"
    )


def percent(share: float | None) -> str:
    """A share as per cent with no more digits than count; never rounded to a full hundred."""
    if share is None or not math.isfinite(share):
        return "–"
    text = f"{100 * share:.1f}" if abs(share) >= 0.01 else f"{100 * share:.2g}"
    if abs(100 * share - round(100 * share)) < 1e-9:
        text = f"{100 * share:.0f}"
    elif text == "100.0" and share < 1:
        text = "> 99.9"
    return ("0" if share == 0 else text.replace("-", "−")) + " %"


def attack_name(name: str) -> str:
    """An attack's name in words; its own where there are none."""
    return ATTACKS.get(name, (name, ""))[0]


def skipped_name(name: str) -> str:
    """The name of what was skipped, in words."""
    return SKIPPED.get(name) or attack_name(name)


def count(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) and math.isfinite(value) else "–"


def _interval(ends: Sequence[float | None] | None) -> str:
    """`0.5 to 1.8 %`, or nothing where there is no interval."""
    if not ends or any(end is None for end in ends):
        return ""
    low, high = (percent(end) for end in ends)
    return f"{low.removesuffix(' %')} to {high}"


def _ends(ends: Sequence[float | None] | None) -> tuple[float | None, float | None]:
    return (ends[0], ends[1]) if ends else (None, None)


def is_distance(result: Mapping[str, Any]) -> bool:
    """Whether the extractor's own figure is a distance; similarities are its negative then."""
    return "lower is closer" in ((result.get("extractor") or {}).get("direction") or "")


def closeness(similarity: float | None, lower: bool) -> str:
    if similarity is None or not math.isfinite(similarity):
        return "–"
    return f"{(-similarity if lower else similarity) + 0.0:.3g}"
