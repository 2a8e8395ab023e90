"""What may be released: a short policy in YAML, and the verdict on an audit's figures.

Fails when an interval lies wholly above its maximum, passes when all lie wholly below, and is undecided otherwise: a
value above the maximum proves nothing if its interval reaches below, nor does a low value whose interval
reaches above. A pass means that these attacks found no more than the policy allows. It is no evidence of privacy;
only a mechanism's guarantee is. A lower bound on ε above the claim is evidence of a bug; below it, of nothing.

The verdict is computed from private images without a guarantee: for their owner's eyes only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfumato.errors import InputError
from sfumato.evaluation.intervals import clopper_pearson

LEVEL = 0.95  # of the verdict as a whole
BYSTANDERS = ("conditioned",)
"""Attacks that are shown but not judged: the classifier that guides them was trained on the training images, so
copies may be the classifier's and not the generator's."""
EXIT_STATUS = {"pass": 0, "fail": 3, "undecided": 4}
REPEATED = 3  # matches per training image from which on it is said that few images account for them
LEAST_RECOGNISED = (
    0.5  # of training images with faint noise: a threshold that does not see these sees no copies
)
MOST_BLANK = 0.5  # of the generated images; of a generator with more of them nothing can be said
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Policy:
    """What an audit may find. The fields are the keys of the YAML file."""

    false_match_rate: float = 0.01
    """How often a fresh image of the same kind may match a training image; between 0 and 0.5. 1 %: the smallest
    that 100 held-out images can calibrate. A smaller rate needs a larger holdout and sees only closer copies."""

    maximum_excess: float = 0.03
    """Largest share of generated images that may match training images beyond chance; between 0 and 1. 3 %: with
    the default 1,000 images and a false match rate of 1 %, what cannot be told from 0 ends near 1.5 % (half of
    the time) and rarely above 3 %; a lower maximum would leave almost every clean generator undecided. With
    4,000 images or more 0.01 can be decided."""

    maximum_tpr_at_1_percent_fpr: float = 0.05
    """Largest share of training images that a membership attack may recognise while it takes 1 % of held-out
    images for training images; between 0.01 and 1. 5 %: five times what guessing gives, clear of the error of the
    threshold when there are only a few hundred held-out images."""

    epsilon_must_not_exceed_claim: bool = True
    """Whether a lower bound on ε above the claimed ε fails. True: it shows that the claim is false."""

    minimum_holdout: int = 100
    """Fewest held-out images, after those that repeat training images are removed; at least 2. 100: what a false
    match rate of 1 % can be calibrated with, barely; with 1,000 the threshold is known within a factor of two."""

    maximum_blind_auc: float = 0.55
    """Area under the ROC curve at which the blind baseline, which never sees the model, may tell training from
    held-out images; between 0.5 and 1. If its interval lies wholly above this, or below 1 minus this, the two sets
    differ by themselves and the verdict is withheld. 0.55: a difference that lifts the rate at 1 % false
    positives to about 1.5 %, small beside the 5 % above."""


_RANGES: dict[str, tuple[float, float]] = {
    "false_match_rate": (0, 0.5),
    "maximum_excess": (0, 1),
    "maximum_tpr_at_1_percent_fpr": (0.01, 1),
    "minimum_holdout": (2, math.inf),
    "maximum_blind_auc": (0.5, 1),
}


@dataclass(frozen=True)
class Verdict:
    """verdict, why in one sentence, and every figure that led there as a sentence of its own."""

    verdict: Literal["pass", "fail", "undecided"]
    sentence: str
    reasons: tuple[str, ...]

    @property
    def exit_status(self) -> int:
        return exit_status(self.verdict)


def exit_status(verdict: str) -> int:
    """0 for "pass", 3 for "fail", 4 for "undecided"."""
    return EXIT_STATUS[verdict]


def attack_level(attacks: int) -> float:
    """Level of each attack's interval, so that all of them together hold at 95 % (Bonferroni)."""
    return 1 - (1 - LEVEL) / max(1, attacks)


def read_policy(path: str | Path | None) -> Policy:
    """The policy in a YAML file whose keys are `Policy`'s fields; keys that are left out keep their defaults.

    None: the defaults. InputError for a file that cannot be read, an unknown or repeated key, a wrong type or a
    value out of range, naming the file and the key.
    """
    if path is None:
        return Policy()
    values = _read(path)
    known = {field.name: field.default for field in dataclasses.fields(Policy)}
    for key, value in values.items():
        if key not in known:
            raise InputError(
                f"{path}: {key!r} is no key of a policy; nothing was audited. The keys are {', '.join(known)}"
            )
        values[key] = _checked(path, key, value, known[key])
    return Policy(**values)


def _read(path: str | Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses repeated keys, of which YAML would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise InputError(f"{path}: {key!r} is set twice; nothing was audited. Keep one of them")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except OSError as error:
        raise InputError(
            f"{path}: the policy cannot be read ({error.strerror}); nothing was audited"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise InputError(
            f"{path}{line}: not a YAML file; nothing was audited. Write one `key: value` a line"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: a policy is `key: value` lines, one for each key; nothing was audited")
    return values


def _checked(path: str | Path, key: str, value: Any, default: Any) -> Any:
    kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
    fits = type(value) is type(default) or (type(default) is float and type(value) is int)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        hint = " (write 1e-3 as 0.001)" if isinstance(value, str) and type(default) is float else ""
        raise InputError(
            f"{path}: {key} has to be {kind}, not {str(value)[:40]!r}{hint}; nothing was audited"
        )
    if key in _RANGES:
        low, high = _RANGES[key]
        if not low <= value <= high or (key == "false_match_rate" and value == 0):
            allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise InputError(
                f"{path}: {key} is {str(value)[:40]} and has to be {allowed}; nothing was audited"
            )
    return type(default)(value)


@dataclass
class _Findings:
    against: list[str] = dataclasses.field(default_factory=list)
    undecided: list[str] = dataclasses.field(default_factory=list)
    within: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)


def judge(result: Figures, policy: Policy) -> Verdict:
    """The verdict on the figures of an audit (the dictionary that becomes audit.json, without its verdict).

    Read are `attacks`, `membership`, `blind`, `holdout`, `threshold`, `epsilon_lower_bound`, `epsilon_claimed` and
    `skipped`; a part that is missing or None was not measured. Intervals of the excess are taken as they
    are: the caller gives each the level `attack_level`. Those of true-positive rates are
    recomputed from their counts at the level that is due to each.

    Withheld ("undecided", whatever the attacks found) when the holdout is too small, or the blind baseline
    says that training and held-out images differ or was not run. Only a lower bound on ε above the claim fails even
    then, as it rests on the canaries' coins alone.
    """
    found = _Findings()
    _judge_epsilon(result, policy, found)
    certain = list(found.against)
    withheld = _withheld(result, policy)
    _judge_attacks(result, policy, found)
    _judge_membership(result, policy, found)
    for each in result.get("skipped") or ():
        found.remarks.append(f"{each['attack']} was not run: {each['why']}.")
    everything = found.against + found.undecided + found.within + found.remarks
    if certain or (found.against and not withheld):
        shown = certain if withheld else found.against
        rest = [reason for reason in everything if reason not in shown]
        return Verdict("fail", f"Fails the policy: {_first(shown)}", (*shown, *withheld, *rest))
    if withheld:
        return Verdict("undecided", f"Cannot be decided: {_first(withheld)}", (*withheld, *everything))
    if found.undecided:
        return Verdict("undecided", f"Cannot be decided: {_first(found.undecided)}", tuple(everything))
    members = result.get("membership") or {}
    seen = [name for name, of in members.items() if _hits(of) is not None]
    attacks = ", ".join([*_judged(result), *seen])
    return Verdict(
        "pass",
        f"Passes the policy: {attacks} found no more than it allows. That is what these attacks found, not "
        "evidence of privacy.",
        tuple(everything),
    )


def _withheld(result: Figures, policy: Policy) -> list[str]:
    """Why training and held-out images cannot be compared; empty when they can."""
    reasons = []
    held = int((result.get("holdout") or {}).get("images") or 0)
    if held < policy.minimum_holdout:
        reasons.append(
            f"{held:,} held-out images are fewer than the policy's minimum_holdout, {policy.minimum_holdout:,}: give "
            "a larger --holdout."
        )
    elif (result.get("threshold") or {}).get("value") is None:
        reasons.append(
            f"no threshold could be calibrated from {held:,} held-out images at a false match rate of "
            f"{policy.false_match_rate:g}: give a larger --holdout."
        )
    blind = result.get("blind") or {}
    if blind.get("ci") is None:
        reasons.append(
            "whether training and held-out images are of one kind was not checked (no blind baseline): without "
            "that no difference between them means anything."
        )
    else:
        low, high = blind["ci"]
        if low > policy.maximum_blind_auc or high < 1 - policy.maximum_blind_auc:
            reasons.append(
                f"training and held-out images can be told apart without the model (area {blind['auc']:.2f}, interval "
                f"{low:.2f} to {high:.2f}; 0.50 is chance): the attacks would measure that difference. Draw the "
                "holdout at random from the same images as the training set."
            )
    return reasons


def _judged(result: Figures) -> dict[str, Figures]:
    attacks = result.get("attacks") or {}
    return {
        name: figures
        for name, figures in attacks.items()
        if name not in BYSTANDERS and figures.get("ci") is not None
    }


def _judge_attacks(result: Figures, policy: Policy, found: _Findings) -> None:
    judged = _judged(result)
    if not judged:
        found.undecided.append(
            "no attack that looks for copies could run, so nothing is known of what the generator memorised."
        )
    recognised = (result.get("threshold") or {}).get("recognised")
    if recognised is not None and recognised < LEAST_RECOGNISED:
        found.undecided.append(
            "held-out images are so close to training images that the threshold from them recognises only "
            f"{_percent(recognised)} of training images with faint noise on them: copies could pass unseen. Give "
            "held-out images that are no changed copies of training images (nor their neighbours in a film), or "
            "another --similarity."
        )
    for name, figures in judged.items():
        images, matches, value = figures["num_images"], figures["matches"], figures["excess"]
        distinct = figures.get("distinct", round(figures["ums"] * images))
        low, high = figures["ci"]
        matched = _count(distinct, "training image") if matches else "a training image"
        says = (
            f"{name}: {matches:,} of {images:,} generated images match {matched}; beyond chance "
            f"{_percent(value)} (interval {_percent(low)} to {_percent(high)})"
        )
        limit = _percent(policy.maximum_excess)
        blank, shared = figures.get("filtered") or 0, figures.get("shared") or 0
        if low > policy.maximum_excess:
            found.against.append(f"{says}, above the policy's {limit}.")
        elif clopper_pearson(shared, images, figures.get("level", LEVEL))[0] > policy.maximum_excess:
            found.undecided.append(
                f"{name}: {shared:,} of {images:,} generated images match pictures that are in --train and in "
                "--holdout, and were left out of the comparison: they may be memorised. Give held-out images "
                "without copies of training images."
            )
        elif blank > MOST_BLANK * images:
            found.undecided.append(
                f"{name}: {blank:,} of {images:,} generated images are blank or nearly so, and say nothing."
            )
        elif high <= policy.maximum_excess:
            found.within.append(f"{says}, within the policy's {limit}.")
        else:
            says += f", which does not decide about the policy's {limit}"
            if 0 < distinct * REPEATED <= matches:
                found.undecided.append(
                    f"{says}: all {matches:,} matches are of {_count(distinct, 'training image')}. Look at them in "
                    "the report: pictures that many generated images repeat are memorised, or so generic that others "
                    "would have been matched in their place, and so few cannot be told from chance. A larger "
                    "--holdout could tell with fewer."
                )
            else:
                found.undecided.append(f"{says}: more images (--num-images) or a larger --holdout would.")


def _hits(figures: Figures) -> int | None:
    """Members found at 1 % false positives; None where so few held-out images cannot show that rate."""
    return ((figures.get("tpr") or {}).get("0.01") or {}).get("true_positives")


def _judge_membership(result: Figures, policy: Policy, found: _Findings) -> None:
    attacks = result.get("membership") or {}
    limit = _percent(policy.maximum_tpr_at_1_percent_fpr)
    for name, figures in attacks.items():
        hits, false = _hits(figures), ((figures.get("tpr") or {}).get("0.01") or {}).get("false_positives")
        members, others = figures["members"], figures["nonmembers"]
        if hits is None or false is None:
            found.remarks.append(
                f"{name}: {others:,} held-out images are too few to see a false-positive rate of 1 %."
            )
            continue
        level = attack_level(len(attacks))
        low, high = clopper_pearson(hits, members, level)
        of_chance = clopper_pearson(false, others, level)[1]  # what guessing may reach at this threshold
        says = (
            f"{name}: recognises {hits:,} of {members:,} training images, {_percent(hits / members)} (interval "
            f"{_percent(low)} to {_percent(high)}), while it takes {false:,} of {others:,} held-out images for them"
        )
        if low > max(policy.maximum_tpr_at_1_percent_fpr, of_chance):
            found.against.append(f"{says}; above the policy's {limit}.")
        elif high <= policy.maximum_tpr_at_1_percent_fpr:
            found.within.append(f"{says}; within the policy's {limit}.")
        else:
            found.undecided.append(
                f"{says}; that does not decide about the policy's {limit}: more training and held-out images would."
            )


def _down(bound: float) -> str:
    """A lower bound with two digits, never more than it is."""
    return f"{math.floor(100 * bound) / 100:.2f}"


def _judge_epsilon(result: Figures, policy: Policy, found: _Findings) -> None:
    bound, claim = result.get("epsilon_lower_bound"), result.get("epsilon_claimed")
    if not claim or claim.get("epsilon") is None:
        if bound:
            found.remarks.append(
                f"the canaries bound epsilon from below by {_down(bound['epsilon'])} at delta {bound['delta']:g}; no "
                "epsilon is claimed to compare it with."
            )
        return
    claimed, delta = claim["epsilon"], claim["delta"]
    if not bound:
        found.remarks.append(f"the claimed epsilon of {claimed:g} was not tested: there were no canaries.")
        return
    says = (
        f"the canaries bound epsilon from below by {_down(bound['epsilon'])} at delta {bound['delta']:g} "
        f"({bound['correct']:,} of {bound['guesses']:,} guesses right, {bound['canaries']:,} canaries)"
    )
    if bound["delta"] < delta * (1 - 1e-9) or claim.get("relation") == "replace_one":
        found.undecided.append(
            f"{says}, which cannot be compared with the claimed {claimed:g} at delta {delta:g} "
            f"({claim.get('relation')}): bound it at that delta, by adding or removing one."
        )
    elif bound["epsilon"] > claimed:
        says += (
            f"; {claimed:g} is claimed. The claim is false: look for a bug in how it was trained or accounted"
        )
        if policy.epsilon_must_not_exceed_claim:
            found.against.append(f"{says}.")
        else:
            found.remarks.append(f"{says} (the policy allows it).")
    elif bound["cap"] <= claimed:
        found.remarks.append(
            f"{says}; so few could not have shown more than {bound['cap']:.2f}, so the claimed {claimed:g} was not "
            "tested. More canaries are needed."
        )
    else:
        found.remarks.append(
            f"{says}; that does not contradict the claimed {claimed:g}, nor is it evidence for it (they could have "
            f"shown {bound['cap']:.2f} at most)."
        )


def _first(reasons: list[str]) -> str:
    more = len(reasons) - 1
    return reasons[0] + (f" And {_count(more, 'further reason')}." if more else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
