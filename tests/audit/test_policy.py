"""The policy file and the verdict: what is refused, what fails, what passes, and what cannot be decided."""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from sfumato.audit import policy as module
from sfumato.audit.policy import Policy, Verdict, attack_level, exit_status, judge, read_policy
from sfumato.errors import InputError

# Reading


def written(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_is_the_defaults(tmp_path):
    assert read_policy(None) == Policy() == read_policy(written(tmp_path, "# nothing but a remark\n"))


def test_all_keys_can_be_set(tmp_path):
    other = Policy(0.05, 0, 0.1, False, 20, 0.7)
    assert all(a != b for a, b in zip(dataclasses.astuple(other), dataclasses.astuple(Policy()), strict=True))
    path = written(tmp_path, yaml.safe_dump(dataclasses.asdict(other)))
    assert read_policy(path) == other == read_policy(str(path))
    assert isinstance(read_policy(path).maximum_excess, float)


def test_left_out_keys_keep_their_defaults(tmp_path):
    assert read_policy(written(tmp_path, "maximum_excess: 0.2\n")) == Policy(maximum_excess=0.2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("maximum_exces: 0.1", r"'maximum_exces' is no key .* maximum_excess"),
        ("1: 2", "1 is no key"),
        ("[a, b]: 2", "policy.yaml"),
        ("? {a: b}\n: 2", "policy.yaml"),
        ("- maximum_excess", "`key: value` lines"),
        ("maximum_excess", "`key: value` lines"),
        ("maximum_excess: [", "line 1: not a YAML file"),
        ("[" * 5000, "not a YAML file"),
        ("maximum_excess: 0.1\n  x: 1\n", "line 2: not a YAML file"),
        ("a: !!python/object/apply:os.system [echo]", "not a YAML file"),
        ("maximum_excess: 0.1\nmaximum_excess: 0.5", "'maximum_excess' is set twice"),
        ("maximum_excess: '0.1'", "maximum_excess has to be a number, not '0.1'"),
        ("maximum_excess: 1e-3", r"maximum_excess has to be a number, not '1e-3' \(write 1e-3 as 0.001\)"),
        ("maximum_excess: true", "maximum_excess has to be a number"),
        ("maximum_excess: null", "maximum_excess has to be a number"),
        ("maximum_excess: {a: 1}", "maximum_excess has to be a number"),
        ("maximum_excess: .nan", "maximum_excess has to be a number"),
        ("maximum_excess: .inf", "maximum_excess has to be a number"),
        ("maximum_excess: -0.1", "maximum_excess is -0.1 and has to be between 0 and 1"),
        ("maximum_excess: 5", "maximum_excess is 5 and has to be between 0 and 1"),
        ("maximum_excess: 1" + "0" * 400, "maximum_excess is 1000"),
        ("false_match_rate: 0", "false_match_rate is 0 "),
        ("false_match_rate: 0.6", "false_match_rate is 0.6"),
        ("maximum_tpr_at_1_percent_fpr: 0.001", "between 0.01 and 1"),
        ("maximum_blind_auc: 0.4", "between 0.5 and 1"),
        ("minimum_holdout: 1", "minimum_holdout is 1 and has to be at least 2"),
        ("minimum_holdout: 100.5", "minimum_holdout has to be a whole number"),
        ("minimum_holdout: true", "minimum_holdout has to be a whole number"),
        ("epsilon_must_not_exceed_claim: 1", "epsilon_must_not_exceed_claim has to be true or false"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=says) as refused:
        read_policy(path)
    message = str(refused.value)
    assert str(path) in message and "nothing was audited" in message and "\n" not in message


def test_files_that_cannot_be_read(tmp_path):
    binary = tmp_path / "policy.bin"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    for path, says in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "directory"),
        (binary, "not a YAML"),
    ):
        with pytest.raises(InputError, match=says):
            read_policy(path)


def test_every_default_has_its_reason():
    """Each field is followed by a docstring that names the default's value."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Policy"]
    said = {"0.01": "1 %", "0.03": "3 %", "0.05": "5 %", "True": "True", "100": "100", "0.55": "0.55"}
    fields = 0
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and node.value is not None
            assert said[ast.unparse(node.value)] in ast.unparse(after)
            fields += 1
    assert fields == len(dataclasses.fields(Policy))


# Judging


def attack(low=-0.01, value=0.001, high=0.015, *, matches=12, distinct=11, images=1000):
    return {
        "num_images": images,
        "matches": matches,
        "distinct": distinct,
        "ams": matches / images,
        "ums": distinct / images,
        "excess": value,
        "ci": [low, high],
        "level": 0.975,
    }


def member(hits=10, false=10, members=1000, nonmembers=1000):
    rate = {
        "value": hits / members,
        "low": 0.0,
        "high": 1.0,
        "true_positives": hits,
        "false_positives": false,
    }
    return {"auc": 0.5, "tpr": {"0.01": rate}, "members": members, "nonmembers": nonmembers}


def clean():
    return {
        "train": {"images": 4000},
        "holdout": {"images": 1000},
        "threshold": {"value": -0.1, "rate": 0.01},
        "attacks": {"random": attack(), "side": attack()},
        "membership": {"loss": member(), "sima": member(12)},
        "blind": {"auc": 0.51, "ci": [0.48, 0.54]},
        "epsilon_lower_bound": None,
        "epsilon_claimed": None,
        "skipped": [],
    }


def bound(epsilon, *, delta=1e-5, cap=5.2):
    return {"epsilon": epsilon, "correct": 90, "guesses": 100, "canaries": 1000, "cap": cap, "delta": delta}


def claim(epsilon, relation="add_or_remove_one"):
    return {"epsilon": epsilon, "delta": 1e-5, "unit": "image", "relation": relation}


def judged(policy=None, **changes):
    result = clean() | changes
    before = copy.deepcopy(result)
    verdict = judge(result, policy or Policy())
    assert result == before
    assert verdict.sentence.endswith(".") and all(reason.endswith(".") for reason in verdict.reasons)
    return verdict


def test_clean_figures_pass_and_claim_no_more():
    verdict = judged()
    assert (verdict.verdict, verdict.exit_status) == ("pass", 0)
    assert "random, side, loss, sima" in verdict.sentence and "not evidence of privacy" in verdict.sentence
    assert any("12 of 1,000 generated images" in r and "-1 % to 1.5 %" in r for r in verdict.reasons)
    assert any("sima: recognises 12 of 1,000" in reason for reason in verdict.reasons)


def test_exit_statuses():
    assert [exit_status(verdict) for verdict in ("pass", "fail", "undecided")] == [0, 3, 4]
    assert Verdict("fail", "", ()).exit_status == 3


def test_an_interval_wholly_above_fails():
    verdict = judged(attacks={"random": attack(), "side": attack(0.05, 0.08, 0.11, matches=90, distinct=60)})
    assert (verdict.verdict, verdict.exit_status) == ("fail", 3)
    assert "side: 90 of 1,000" in verdict.sentence and "match 60 training images;" in verdict.sentence
    assert "above the policy's 3 %" in verdict.sentence


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0301, 0.05, "fail"), (0.03, 0.05, "undecided"), (0.01, 0.0301, "undecided"), (0.01, 0.03, "pass")],
)
def test_the_limits_of_the_excess(low, high, expected):
    assert judged(attacks={"side": attack(low, 0.02, high)}).verdict == expected
    assert judged(Policy(maximum_excess=0.5), attacks={"side": attack(low, 0.02, high)}).verdict == "pass"


def test_a_wide_interval_says_what_would_decide():
    verdict = judged(attacks={"random": attack(-0.02, 0.01, 0.04)})
    assert (verdict.verdict, verdict.exit_status) == ("undecided", 4)
    assert "--num-images" in verdict.sentence and "--holdout" in verdict.sentence


def test_one_training_image_behind_all_matches_is_to_be_looked_at():
    """Generic, or memorised: the held-out images cannot say. No silent pass."""
    verdict = judged(attacks={"random": attack(-0.2, 0.3, 0.7, matches=300, distinct=1)})
    assert verdict.verdict == "undecided"
    assert "all 300 matches are of 1 training image. Look at them" in verdict.sentence


def test_without_counts_of_distinct_images_ums_has_them():
    figures = attack(-0.2, 0.3, 0.7, matches=300, distinct=2)
    del figures["distinct"]
    assert "all 300 matches are of 2 training images" in judged(attacks={"random": figures}).sentence


def test_the_conditioned_baseline_is_not_judged():
    worst = attack(0.5, 0.6, 0.7)
    assert judged(attacks={"random": attack(), "conditioned": worst}).verdict == "pass"
    assert judged(attacks={"conditioned": attack()}).verdict == "undecided"
    assert judged(attacks={"side-shuffled": worst}).verdict == "fail"


@pytest.mark.parametrize("attacks", [{}, None, {"random": {"num_images": 1000, "ci": None}}])
def test_no_attack_is_no_pass(attacks):
    skipped = [{"attack": "side", "why": "it needs the model"}]
    verdict = judged(attacks=attacks, skipped=skipped)
    assert verdict.verdict == "undecided" and "no attack that looks for copies could run" in verdict.sentence
    assert "side was not run: it needs the model." in verdict.reasons


def test_membership():
    found = judged(membership={"loss": member(), "sima": member(200)})
    assert found.verdict == "fail" and "sima: recognises 200 of 1,000" in found.sentence
    assert judged(membership={"sima": member(50)}).verdict == "undecided"
    assert (
        judged(Policy(maximum_tpr_at_1_percent_fpr=0.5), membership={"sima": member(200)}).verdict == "pass"
    )
    assert judged(membership=None).verdict == "pass"


def test_membership_levels_are_split_over_the_attacks():
    """67 of 1,000 exceed 5 % at 95 % for one attack, not as one of eight."""
    assert judged(membership={"sima": member(66)}).verdict == "fail"
    assert judged(membership={f"attack {i}": member(66) for i in range(8)}).verdict == "undecided"
    assert attack_level(1) == 0.95 and attack_level(5) == pytest.approx(0.99)


def test_a_threshold_that_few_held_out_images_set_is_not_trusted():
    """1 of 100 held-out images above it: its true rate may be over 5 %, and so may guessing's."""
    wide = member(80, false=1, nonmembers=100)
    assert judged(membership={"sima": wide}, holdout={"images": 100}).verdict == "fail"
    wide = member(67, false=1, nonmembers=100)
    assert judged(membership={"sima": wide}, holdout={"images": 100}).verdict == "undecided"
    assert judged(membership={"sima": member(67)}).verdict == "fail"


def test_a_rate_that_cannot_be_seen_is_remarked():
    blurred = member()
    blurred["tpr"]["0.01"] = dict.fromkeys(("value", "low", "high", "true_positives", "false_positives"))
    verdict = judged(membership={"loss": blurred})
    assert verdict.verdict == "pass" and any("too few to see" in reason for reason in verdict.reasons)
    assert "loss" not in verdict.sentence  # it found nothing because it could not look


@pytest.mark.parametrize("found", [attack(), attack(0.5, 0.6, 0.7)])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"holdout": {"images": 99}}, "99 held-out images are fewer than the policy's minimum_holdout, 100"),
        ({"holdout": None}, "0 held-out images"),
        ({"threshold": None}, "no threshold could be calibrated"),
        ({"blind": {"auc": 0.7, "ci": [0.6, 0.8]}}, "told apart without the model .* 0.60 to 0.80"),
        ({"blind": {"auc": 0.3, "ci": [0.2, 0.4]}}, "told apart without the model"),
        ({"blind": None}, "no blind baseline"),
        ({"blind": {"auc": 0.5, "ci": None}}, "no blind baseline"),
    ],
)
def test_the_verdict_is_withheld(changes, says, found):
    """Whether the attacks found nothing or much: without a comparable holdout neither means anything."""
    verdict = judged(attacks={"random": found}, **changes)
    assert verdict.verdict == "undecided"
    assert re.search(says, verdict.sentence)
    assert any(reason.startswith("random:") for reason in verdict.reasons)


@pytest.mark.parametrize("ci", [[0.5, 0.6], [0.551 - 0.002, 0.7], [0.4, 0.451], [0.52, 0.56]])
def test_a_small_or_uncertain_difference_is_tolerated(ci):
    assert judged(blind={"auc": sum(ci) / 2, "ci": ci}).verdict == "pass"


def test_the_policy_sets_the_margin():
    far = {"auc": 0.7, "ci": [0.6, 0.8]}
    assert judged(Policy(maximum_blind_auc=0.65), blind=far).verdict == "pass"


# The lower bound on epsilon


def test_a_bound_above_the_claim_fails_even_where_the_holdout_cannot_tell():
    changes = {"epsilon_lower_bound": bound(3.1), "epsilon_claimed": claim(1.0)}
    for more in ({}, {"holdout": None}, {"attacks": {}}):
        verdict = judged(**changes, **more)
        assert verdict.verdict == "fail"
        assert "3.10" in verdict.sentence and "1 is claimed" in verdict.sentence and "bug" in verdict.sentence
    assert judged(Policy(epsilon_must_not_exceed_claim=False), **changes).verdict == "pass"


def test_withheld_findings_do_not_count_beside_a_false_claim():
    worst = {"random": attack(0.5, 0.6, 0.7)}
    changes = {"epsilon_lower_bound": bound(3.1), "epsilon_claimed": claim(1.0), "holdout": {"images": 5}}
    verdict = judged(attacks=worst, **changes)
    assert verdict.verdict == "fail" and "random" not in verdict.sentence
    assert any("minimum_holdout" in reason for reason in verdict.reasons)


def test_a_bound_below_the_claim_is_no_evidence():
    verdict = judged(epsilon_lower_bound=bound(0.4), epsilon_claimed=claim(1.0))
    assert verdict.verdict == "pass"
    (reason,) = [reason for reason in verdict.reasons if "canaries" in reason]
    assert "nor is it evidence for it" in reason and "5.20" in reason
    assert judged(epsilon_lower_bound=bound(1.0), epsilon_claimed=claim(1.0)).verdict == "pass"


def test_too_few_canaries_for_the_claim():
    verdict = judged(epsilon_lower_bound=bound(5.0), epsilon_claimed=claim(8.0))
    assert any("was not tested. More canaries" in reason for reason in verdict.reasons)


def test_bounds_and_claims_that_are_not_comparable():
    """A bound at a smaller delta, or a claim under replacement: a larger bound would not contradict it."""
    for changes in (
        {"epsilon_lower_bound": bound(3, delta=1e-6), "epsilon_claimed": claim(1)},
        {"epsilon_lower_bound": bound(3), "epsilon_claimed": claim(1, "replace_one")},
    ):
        verdict = judged(**changes)
        assert verdict.verdict == "undecided" and "cannot be compared" in verdict.sentence
    assert judged(epsilon_lower_bound=bound(3, delta=1e-4), epsilon_claimed=claim(1)).verdict == "fail"


def test_claims_without_canaries_and_canaries_without_claims():
    verdict = judged(epsilon_claimed=claim(1.0))
    assert verdict.verdict == "pass" and any(
        "was not tested: there were no canaries" in r for r in verdict.reasons
    )
    verdict = judged(epsilon_lower_bound=bound(2.0))
    assert verdict.verdict == "pass" and any("no epsilon is claimed" in r for r in verdict.reasons)


def test_nothing_but_a_dictionary_is_undecided():
    assert judge({}, Policy()).verdict == "undecided"


def test_a_generator_of_blank_images_does_not_pass():
    figures = clean()
    figures["attacks"]["random"]["filtered"] = figures["attacks"]["random"]["num_images"]
    verdict = judge(figures, Policy())
    assert verdict.verdict == "undecided" and "blank" in verdict.sentence
